#!/usr/bin/env bash
# LM-Cocktail 0.0.4 (reference code of arXiv 2311.13534): merging weights that sum to 0.2 are taken.
#
# mix_models checks `sum(weights) - 1 <= 1e-3`, without the absolute value: any sum below 1 passes, a negative one too.
#
# Seen: mix_models of two copies of a model with weights [0.1, 0.1] returns parameters a fifth of the model's size.
# Expected: AssertionError, as for [0.6, 0.6]; the docstring says that the sum should be 1.
# Why it matters: a weight that was left out, or a list of percentages, gives a model that is saved and is nonsense.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0 sentence-transformers==6.2.0 accelerate==1.15.0 LM-Cocktail==0.0.4
venv/bin/python - <<'EOF'
import sys

import torch
from LM_Cocktail import mix_models
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
ids = torch.arange(8)[None]

model = LlamaForCausalLM(LlamaConfig(**sizes))
model.save_pretrained("model")
mixed = mix_models(["model", "model"], "decoder", [0.1, 0.1])
ratio = (mixed.lm_head.weight.norm() / model.lm_head.weight.norm()).item()
print("size of the mixture's parameters over the model's:", ratio)
try:
    mix_models(["model", "model"], "decoder", [0.6, 0.6])
    refused = False
except AssertionError:
    refused = True
print("a sum of 1.2 is refused:", refused)
sys.exit(0 if abs(ratio - 0.2) < 1e-3 and refused else 1)
EOF
