#!/usr/bin/env bash
# transformers 5.19.0, tokenizers 0.23.3: tokenizer_class decides, tokenizer.json is rebuilt to its likeness.
#
# A folder holds a byte-level BPE in tokenizer.json and `"tokenizer_class": "LlamaTokenizerFast"` in tokenizer_config.json,
# as several published Llama derivatives do whose vocabulary is not Llama's. AutoTokenizer loads it as LlamaTokenizer, puts
# Metaspace where the file says ByteLevel, and drops the spaces: "the capital of france" decodes to "thecapitaloffrance".
#
# Seen: 4 ids by tokenizer.json, 6 others by AutoTokenizer; decoded "thecapitaloffrance"; no warning.
# Expected: the pipeline in tokenizer.json is what runs, as in transformers 4, or a refusal.
# Why it matters: every text becomes other ids than the model was trained on. An expert weighed or tuned with such a tokenizer
# is judged on nonsense, and nothing says so.
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

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

text = "the capital of france"
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator([text] * 3, trainer)
folder = Path("model")
folder.mkdir()
tokenizer.save(str(folder / "tokenizer.json"))
config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
(folder / "tokenizer_config.json").write_text(json.dumps(config))

loaded = AutoTokenizer.from_pretrained(folder)
stored = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
ids = loaded(text, add_special_tokens=False)["input_ids"]
print("tokenizer.json:", stored, repr(tokenizer.decode(stored)))
print("AutoTokenizer: ", ids, repr(loaded.decode(ids)), type(loaded).__name__, loaded.backend_tokenizer.pre_tokenizer)
sys.exit(0 if ids != stored and loaded.decode(ids) == "thecapitaloffrance" else 1)
EOF
