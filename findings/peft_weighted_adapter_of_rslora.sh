#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter over rank-stabilised adapters is too large by the root of the rank.
#
# The new adapter gets r = lora_alpha, meant as scaling 1, and inherits use_rslora from the first adapter, which makes it
# alpha / sqrt(r) = sqrt(r). A single adapter taken with weight 1.0 should be that adapter.
#
# Seen: with use_rslora False the delta is reproduced; with True it is twice as large at rank 4, for cat, linear and svd.
# Expected: the same adapter.
# Why it matters: mixtures of rank-stabilised experts made this way overshoot, the more the higher the rank, in silence.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0 peft==0.21.2
venv/bin/python - <<'EOF'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
ids = torch.arange(8)[None]

ratios = {}
for rslora in (False, True):
    config = LoraConfig(r=4, lora_alpha=4, use_rslora=rslora, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config, adapter_name="expert")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for kind in ("cat", "linear", "svd"):
        model.add_weighted_adapter(["expert"], [1.0], kind, combination_type=kind)
        ratios[rslora, kind] = (layer.get_delta_weight(kind).norm() / layer.get_delta_weight("expert").norm()).item()
print("size of the combined delta over that of the only adapter, by (use_rslora, combination_type):", ratios)
plain = [ratio for (rslora, _), ratio in ratios.items() if not rslora]
scaled = [ratio for (rslora, _), ratio in ratios.items() if rslora]
sys.exit(0 if all(abs(r - 1) < 1e-3 for r in plain) and all(abs(r - 2) < 1e-3 for r in scaled) else 1)
EOF
