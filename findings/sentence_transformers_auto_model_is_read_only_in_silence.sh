#!/usr/bin/env bash
# sentence-transformers 6.2.0 (6.0.0 and 6.1.0 alike): assigning `model[0].auto_model` is accepted and ignored.
#
# Up to version 5 `auto_model` was the transformer, and the way to exchange it (for an adapted one, a merged one). It is a
# property of `model` now. torch.nn.Module registers the assigned module beside it: the model has both, computes with the
# old one, and reading `auto_model` gives the old one back.
#
# Seen: embeddings unchanged, `model[0].auto_model is other` False, children ['model', 'auto_model'], twice the parameters.
# Expected: AttributeError, as a property without a setter raises on any other class.
# Why it matters: code of the version before runs without an error and embeds with the model that it meant to replace.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0 sentence-transformers==6.2.0
venv/bin/python - <<'EOF'
import sys

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]
tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
for seed in (0, 1):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(**sizes)).save_pretrained(f"bert-{seed}")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(f"bert-{seed}")
model, other = (
    SentenceTransformer(modules=[modules.Transformer(f"bert-{seed}"), modules.Pooling(32)], device="cpu") for seed in (0, 1)
)
before, wanted = model.encode(["a dog"]), other.encode(["a dog"])
model[0].auto_model = other[0].auto_model
after = model.encode(["a dog"])
print("moved by", np.abs(after - before).max(), "wanted", np.abs(wanted - before).max())
print("reads back:", model[0].auto_model is other[0].auto_model, "children:", [name for name, _ in model[0].named_children()])
sys.exit(0 if np.array_equal(after, before) and model[0].auto_model is not other[0].auto_model else 1)
EOF
