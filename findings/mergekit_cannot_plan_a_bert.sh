#!/usr/bin/env bash
# mergekit 0.1.5: a plain BERT, one of its supported architectures, ends in TypeError before anything is merged.
#
# The architecture's definition names aliases of tensors as a tuple where a list is added to it.
#
# Seen: TypeError: can only concatenate list (not "tuple") to list, from plan_tensor.
# Expected: a merged BertModel; architectures that are listed can be merged.
# Why it matters: encoders are merged with mergekit in published work, and the release that takes transformers 5 cannot.
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
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

sizes = dict(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")))
for name in ("one", "two"):
    BertModel(BertConfig(**sizes)).save_pretrained(name)
    tokenizer.save_pretrained(name)
Path("mean.yaml").write_text("""
merge_method: linear
models:
  - {model: one, parameters: {weight: 0.5}}
  - {model: two, parameters: {weight: 0.5}}
""")
done = subprocess.run(["venv/bin/mergekit-yaml", "mean.yaml", "merged"], capture_output=True, text=True)
print("exit code", done.returncode, done.stderr.strip().splitlines()[-1:])
sys.exit(0 if done.returncode and "can only concatenate list" in done.stderr else 1)
EOF
