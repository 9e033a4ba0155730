#!/usr/bin/env bash
# peft 0.21.2: with a PiSSA adapter, disable_adapter() and unload() do not give the base.
#
# init_lora_weights="pissa" moves the leading singular part of each weight from the base into the factors, when an adapter is
# made and again when it is loaded. What is left under the adapter is the base without that part.
#
# Seen: PeftModel.from_pretrained of a PiSSA adapter computes what was saved; under disable_adapter() and after unload() the
# logits differ from the base's by 0.1, with no warning. With plain LoRA both are the base exactly.
# Expected: "the base model" is the model that was passed in, or these calls say that it is gone.
# Why it matters: the reference of preference training, and servers that answer for base and adapter from one model, answer
# with a model that nobody has. The factors alone are no plain LoRA either: folded into the true base they are wrong.
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
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
ids = torch.arange(8)[None]

LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
differences = {}
with torch.no_grad():
    base = LlamaForCausalLM.from_pretrained("base").eval()(ids).logits
    for init in (True, "pissa"):
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
        get_peft_model(LlamaForCausalLM.from_pretrained("base"), config).save_pretrained(f"adapter-{init}")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), f"adapter-{init}").eval()
            adapted = (model(ids).logits - base).abs().max().item()  # untrained: the base, split differently
            with model.disable_adapter():
                disabled = (model(ids).logits - base).abs().max().item()
            unloaded = (model.unload()(ids).logits - base).abs().max().item()
        differences[init] = adapted, disabled, unloaded
        print(init, "largest difference to the base: adapted, disabled, unloaded", differences[init], "warnings", len(told))
held = max(differences[True]) < 1e-6 and differences["pissa"][0] < 1e-5 and min(differences["pissa"][1:]) > 0.01
sys.exit(0 if held and not told else 1)
EOF
