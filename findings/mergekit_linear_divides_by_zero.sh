#!/usr/bin/env bash
# mergekit 0.1.5: `merge_method: linear` with weights that sum to 0 writes infinities and NaN and ends with 0.
#
# linear divides by the sum of the weights unless `normalize: false` is given. Weights 1 and -1, the difference of two models,
# are divided by 0.
#
# Seen: exit code 0, and every parameter in the folder that is written infinite or NaN.
# Expected: an error, as a sum of weights that cannot be divided by is known before any tensor is read.
# Why it matters: task vectors are differences, and this is how one would write one. The folder loads everywhere.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0 mergekit==0.1.5
venv/bin/python - <<'EOF'
import subprocess, sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
ids = torch.arange(8)[None]

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")))
for name in ("one", "two"):
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(name)
    tokenizer.save_pretrained(name)
Path("difference.yaml").write_text("""
merge_method: linear
dtype: float32
models:
  - {model: one, parameters: {weight: 1.0}}
  - {model: two, parameters: {weight: -1.0}}
""")
done = subprocess.run(["venv/bin/mergekit-yaml", "difference.yaml", "merged", "--no-write-model-card"], capture_output=True, text=True)
params = {name: value for file in Path("merged").glob("*.safetensors") for name, value in load_file(file).items()}
share = sum((~value.isfinite()).sum().item() for value in params.values()) / sum(value.numel() for value in params.values())
print("exit code", done.returncode, "share of infinite or NaN", share)
sys.exit(0 if done.returncode == 0 and share == 1.0 else 1)
EOF
