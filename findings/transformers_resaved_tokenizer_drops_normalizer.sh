#!/usr/bin/env bash
# transformers 5.19.0, tokenizers 0.23.3: loading and saving a Llama-2 style tokenizer rewrites its pipeline.
#
# tokenizer.json of the Llama-2 family has the normalizer Sequence(Prepend, Replace) and no pre-tokenizer. from_pretrained
# followed by save_pretrained, with nothing changed between, writes a file with `"normalizer": null` and a Metaspace
# pre-tokenizer.
#
# Seen: normalizer Sequence -> null, pre_tokenizer null -> Metaspace; the ids of a sentence are the same.
# Expected: a file that was read and not changed is written as it was.
# Why it matters: a fine-tune of such a base has another tokenizer.json than the base. Whoever compares files, or pipelines
# part by part, takes the two for different tokenizers; they have to be compared by what they do.
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

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

special = ["<unk>", "<s>", "</s>"]
pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz", "he", "\u2581t"]
vocab = {piece: index for index, piece in enumerate(pieces)}
merges = [("h", "e"), ("\u2581", "t")]
tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
published = Path("published")
published.mkdir()
tokenizer.save(str(published / "tokenizer.json"))
tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
(published / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **tokens}))

AutoTokenizer.from_pretrained(published).save_pretrained("saved")
before, after = (json.loads(Path(folder, "tokenizer.json").read_text()) for folder in ("published", "saved"))
for part in ("normalizer", "pre_tokenizer"):
    print(part, json.dumps(before[part]), "->", json.dumps(after[part]))
ids = [Tokenizer.from_file(f"{folder}/tokenizer.json").encode("the cat  sat", add_special_tokens=False).ids
       for folder in ("published", "saved")]
print("same ids:", ids[0] == ids[1])
held = before["normalizer"] and after["normalizer"] is None and after["pre_tokenizer"]["type"] == "Metaspace"
sys.exit(0 if held and ids[0] == ids[1] else 1)
EOF
