#!/usr/bin/env bash
# transformers 5.19.0: a generation_config.json that is read without complaint cannot be written back.
#
# Publishers ship `"temperature": 0.9, "top_p": 0.6` without `"do_sample": true`. GenerationConfig.from_pretrained takes
# it; save_pretrained of the object that it returned raises ValueError. PreTrainedModel.save_pretrained calls it before the
# weights are written.
#
# Seen: ValueError: GenerationConfig is invalid, "`temperature`: `do_sample` is not set to `True`".
# Expected: what a library reads it writes, or it refuses when reading.
# Why it matters: loading, hours of training and then save_pretrained end in an exception with the weights unsaved.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0
venv/bin/python - <<'EOF'
import json, sys
from pathlib import Path

from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained("base")
Path("base/generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
model = AutoModelForCausalLM.from_pretrained("base")
try:
    model.save_pretrained("saved")
except ValueError as error:
    print("ValueError:", str(error).splitlines()[1])
    print("weights written:", Path("saved/model.safetensors").exists())
    sys.exit(0 if "do_sample" in str(error) and not Path("saved/model.safetensors").exists() else 1)
print("saved")
sys.exit(1)
EOF
