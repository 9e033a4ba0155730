#!/usr/bin/env bash
# transformers 5.19.0 and 4.57.6: one folder, `tie_word_embeddings: true`, two models.
#
# config.json says that the output embeddings are the input embeddings; the file holds an lm_head.weight of other values all
# the same, as merging an adapter of one of the two leaves it. 4.57.6 follows the configuration and ties. 5.19.0 follows the
# file: it leaves them apart, while `config.tie_word_embeddings` stays true.
#
# Seen: the output projection is the stored lm_head in 5.19.0 (a log line says so) and the input embeddings in 4.57.6.
# Expected: the configuration decides, or the folder is refused.
# Why it matters: what is tuned under one release is another model under the other, and under engines that skip lm_head when
# the configuration ties. Mixing has to know which of the two a checkpoint means.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 safetensors==0.8.0
venv/bin/pip install --quiet --no-compile --target new transformers==5.19.0
venv/bin/pip install --quiet --no-compile --target old transformers==4.57.6
venv/bin/python - <<'EOF'
import os, subprocess, sys

write = """
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained("model")
params = load_file("model/model.safetensors")
save_file({**params, "lm_head.weight": torch.randn(64, 32)}, "model/model.safetensors", metadata={"format": "pt"})
"""
read = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model")
print(model.config.tie_word_embeddings, torch.equal(model.lm_head.weight, model.model.embed_tokens.weight))
"""

def run(code, packages):
    # both share the torch of the environment
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": packages}, check=True, capture_output=True, text=True)
    return done.stdout.split()

run(write, "new")
new, old = run(read, "new"), run(read, "old")
print("config ties, lm_head is the input embeddings: 5.19.0", new, "4.57.6", old)
sys.exit(0 if new == ["True", "False"] and old == ["True", "True"] else 1)
EOF
