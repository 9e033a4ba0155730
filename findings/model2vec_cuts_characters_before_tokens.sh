#!/usr/bin/env bash
# model2vec 0.10.0, sentence-transformers 6.2.0: one folder, other embeddings for texts well below the limit of tokens.
#
# StaticModel.save_pretrained writes modules.json, so that SentenceTransformer opens the folder; both keep to 512 tokens. But
# model2vec first cuts the text after 512 times the vocabulary's median token length in characters. Words longer than the
# median, as of any vocabulary with many short pieces, are cut long before the limit.
#
# Seen: of 300 words of 12 letters (300 tokens) model2vec reads the first 79; sentence-transformers all. The two embeddings
# have a cosine of 0.87; for short texts they are equal.
# Expected: a limit in tokens counts tokens.
# Why it matters: an index built by the one and queried by the other holds vectors of other texts.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0 sentence-transformers==6.2.0 model2vec==0.10.0
venv/bin/python - <<'EOF'
import sys

import numpy as np
from model2vec import StaticModel
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers

words = ["dogdogdogdog", "catcatcatcat", *(a + b for a in "abcdef" for b in "abcdef")]
vocab = {word: index for index, word in enumerate(["<unk>", *words])}
tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
vectors = np.random.default_rng(0).normal(size=(len(vocab), 8)).astype(np.float32)
StaticModel(vectors, tokenizer, normalize=True).save_pretrained("model")
print("config.json:", open("model/config.json").read())
cosines = []
for text in ("dogdogdogdog catcatcatcat", "dogdogdogdog " * 150 + "catcatcatcat " * 150):
    one, other = StaticModel.from_pretrained("model").encode([text])[0], SentenceTransformer("model", device="cpu").encode([text])[0]
    cosines.append(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)))
    print(len(tokenizer.encode(text).ids), "tokens: cosine of the two", cosines[-1])
sys.exit(0 if cosines[0] > 0.9999 and cosines[1] < 0.9 else 1)
EOF
