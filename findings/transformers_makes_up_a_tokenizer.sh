#!/usr/bin/env bash
# transformers 5.19.0: AutoTokenizer of a folder that has no tokenizer returns one.
#
# A folder with config.json alone, `"model_type": "bert"` (roberta, gpt2, qwen2, xlm-roberta, t5 and gemma2 alike): the tokenizer
# that comes back has special tokens and no words. A folder of a Llama is refused with a ValueError.
#
# Seen: BertTokenizer, 5 tokens; "the capital of france" becomes [CLS] [UNK] [UNK] [UNK] [UNK] [SEP]; GPT-2: no id at all.
# Expected: an error, as 4.57.6 raises one (a TypeError).
# Why it matters: a download that missed tokenizer.json trains, embeds and ranks without an error: every text of a length is
# the same text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile transformers==5.19.0 tokenizers==0.23.3
venv/bin/python - <<'EOF'
import json, sys
from pathlib import Path

from transformers import AutoTokenizer

folder, ids = Path("model"), {}
folder.mkdir()
for family in ("bert", "gpt2"):
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids[family] = tokenizer("the capital of france")["input_ids"]
    print(family, type(tokenizer).__name__, len(tokenizer), "tokens", tokenizer.convert_ids_to_tokens(ids[family]))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
try:
    refused = not AutoTokenizer.from_pretrained(folder)
except (OSError, ValueError) as error:
    refused = True
    print("llama:", type(error).__name__)
sys.exit(0 if len(set(ids["bert"][1:-1])) == 1 and not ids["gpt2"] and refused else 1)
EOF
