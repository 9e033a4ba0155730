#!/usr/bin/env bash
# peft 0.21.2, transformers 5.19.0: an adapter folder that one of the two loaders applies and the other leaves without effect.
#
# An adapter was trained on LlamaModel, the class without head, as encoders are. Its factors are named `layers.0...`; under
# LlamaForCausalLM the same layers are `model.layers.0...`. transformers' model.load_adapter(folder) allows for the prefix;
# PeftModel.from_pretrained(model, folder) does not: all factors stay at zero, and a UserWarning lists missing keys.
#
# Seen: load_adapter: the adapted model exactly; PeftModel: the logits of the base exactly.
# Expected: the same of both, and an error where not one key of the file fits.
# Why it matters: an adapter that does nothing looks like a base that is good already. Evaluations and merges over it pass.
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
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
ids = torch.arange(8)[None]

LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
with torch.no_grad():
    model = get_peft_model(LlamaModel.from_pretrained("base"), LoraConfig(r=4, target_modules=["q_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    model.save_pretrained("adapter")
    base = LlamaForCausalLM.from_pretrained("base").eval()
    plain, wanted = base(ids).logits, base.lm_head(model(ids).last_hidden_state)
    by_peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter").eval()(ids).logits
    base.load_adapter("adapter")
    by_transformers = base(ids).logits
print("the adapter moves logits by", (wanted - plain).abs().max().item())
print("PeftModel.from_pretrained moves them by", (by_peft - plain).abs().max().item())
print("load_adapter is off by", (by_transformers - wanted).abs().max().item())
held = torch.equal(by_peft, plain) and torch.allclose(by_transformers, wanted, atol=1e-6) and not torch.allclose(plain, wanted, atol=1e-3)
sys.exit(0 if held else 1)
EOF
