#!/usr/bin/env bash
# safetensors 0.8.0, torch 2.13.0 and transformers 5.19.0: tensors that were loaded change when the file is written over.
#
# load_file, safe_open and from_pretrained on a CPU return tensors that lie in the mapped file. `cp new.safetensors
# model.safetensors` writes into the same inode: the parameters of every process that has the model loaded change under it.
#
# Seen: after the file's data is overwritten with zeros, load_file's tensor and a loaded model's embeddings are zero.
# Expected: loaded is loaded; the documentation calls it loading, not a view.
# Why it matters: replacing an expert on disk while it is served changes answers at once, and by halves while the copy runs.
# Fingerprints taken at loading say nothing about what is computed with. Replace by rename, or copy what is mapped.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0 safetensors==0.8.0
venv/bin/python - <<'EOF'
import sys

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
ids = torch.arange(8)[None]

LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("model")
path, name = "model/model.safetensors", "model.embed_tokens.weight"
tensor, model = load_file(path)[name], LlamaForCausalLM.from_pretrained("model")
parameter = model.model.embed_tokens.weight
print("before:", tensor.abs().sum().item(), parameter.abs().sum().item())
content = open(path, "rb").read()
begin = 8 + int.from_bytes(content[:8], "little")
with open(path, "r+b") as file:  # as cp does; the length stays
    file.write(content[:begin] + bytes(len(content) - begin))
print("after: ", tensor.abs().sum().item(), parameter.abs().sum().item())
sys.exit(0 if not tensor.any() and not parameter.any() else 1)
EOF
