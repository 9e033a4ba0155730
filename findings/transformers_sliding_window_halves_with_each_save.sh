#!/usr/bin/env bash
# transformers 4.57.6: each load and save of an EmbeddingGemma configuration halves its sliding window.
#
# With use_bidirectional_attention, Gemma3TextConfig stores `sliding_window // 2 + 1` in place of what it was given, at every
# construction, and save_pretrained writes that. Nothing else has to change for the model to become another one.
#
# Seen: 512 -> 257 -> 129 -> 65 -> 33 in config.json after four saves. (5.19.0 writes back what it read.)
# Expected: what is loaded and saved unchanged stays as it was.
# Why it matters: a fine-tune of a fine-tune attends to ever fewer tokens. The parameters are equal, so a comparison of tensors
# finds nothing; the setting has to be held against the base's.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile transformers==4.57.6
venv/bin/python - <<'EOF'
import json, sys

from transformers import AutoConfig, Gemma3TextConfig

Gemma3TextConfig(use_bidirectional_attention=True, sliding_window=512).save_pretrained("model")
windows = [512]
for _ in range(4):
    windows.append(json.load(open("model/config.json"))["sliding_window"])
    AutoConfig.from_pretrained("model").save_pretrained("model")
print("sliding_window as stored, save after save:", windows)
sys.exit(0 if windows == [512, 257, 129, 65, 33] else 1)
EOF
