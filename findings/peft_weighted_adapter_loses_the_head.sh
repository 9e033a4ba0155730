#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter over adapters of a classifier gives them the base's untrained head.
#
# A SEQ_CLS adapter carries its trained `score` head (modules_to_save). Combining that one adapter with weight 1.0 takes the
# factors and leaves the head: the new adapter answers through the head of the base, which was never trained.
#
# Seen: logits [8.8, 9.1] of the adapter, [-0.2, 0.0] of its combination with itself alone; no error, no warning.
# Expected: the heads are combined too, or modules_to_save is refused, as it is by other tools.
# Why it matters: rerankers and classifiers tuned with LoRA seem to combine, and rank by a random head.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0 peft==0.21.2
venv/bin/python - <<'EOF'
import sys, warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
ids = torch.arange(8)[None]

config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
model = get_peft_model(LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=2, pad_token_id=0)), config, adapter_name="expert")
model.eval()
with torch.no_grad():  # the head is trained with the adapter
    model.base_model.model.score.modules_to_save["expert"].weight += 1.0
    wanted = model(ids).logits
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.add_weighted_adapter(["expert"], [1.0], "combined", combination_type="cat")
    model.set_adapter("combined")
    got = model(ids).logits
difference = (got - wanted).abs().max().item()
print("logits of the adapter", wanted.tolist(), "combined alone with weight 1", got.tolist(), "warnings", len(told))
sys.exit(0 if difference > 1 and not told else 1)
EOF
