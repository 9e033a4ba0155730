#!/usr/bin/env bash
# sentence-transformers 6.2.0, transformers 5.19.0, tokenizers 0.23.3: what a model did before it was saved is saved with it.
#
# encode() sets truncation and padding on the tokenizers object; save() writes them into tokenizer.json. Saved before its
# first encode() a model has `"truncation": null`, saved after it `{"max_length": 64, ...}`.
#
# Seen: Tokenizer.from_file of the one gives 200 ids for 200 words, of the other 64.
# Expected: calls leave no trace in the saved tokenizer; two saves of one model are the same file.
# Why it matters: those who read tokenizer.json themselves (Rust servers, converters, ONNX pipelines, token counters) cut texts
# in silence, and two folders of the same model compare as different, or hash differently.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0 sentence-transformers==6.2.0
venv/bin/python - <<'EOF'
import json, sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "runs"]
tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
torch.manual_seed(0)
sizes = dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
BertModel(BertConfig(max_position_embeddings=64, **sizes)).save_pretrained("bert")
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
).save_pretrained("bert")

model = SentenceTransformer(modules=[modules.Transformer("bert"), modules.Pooling(32)], device="cpu")
model.save("before", create_model_card=False)
model.encode(["a dog"])
model.save("after", create_model_card=False)
lengths = []
for folder in ("before", "after"):
    path = Path(folder, "tokenizer.json")
    lengths.append(len(Tokenizer.from_file(str(path)).encode("dog " * 200).ids))
    print(folder, "truncation", json.loads(path.read_text())["truncation"], "ids of 200 words:", lengths[-1])
sys.exit(0 if lengths == [200, 64] else 1)
EOF
