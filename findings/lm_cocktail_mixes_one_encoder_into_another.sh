#!/usr/bin/env bash
# LM-Cocktail 0.0.4, sentence-transformers 6.2.0: mixing one encoder with weight 1.0 does not give that encoder.
#
# mix_models(..., "encoder", ..., output_path) mixes the transformer and then writes a sentence-transformers folder of its own:
# CLS pooling and normalisation, whatever the model's modules.json says. Mean pooling and Dense modules are gone.
#
# Seen: a mean-pooling model of 16 dimensions (Dense) comes back as a CLS-pooling model of 32; a line on stdout says so.
# Expected: the modules of the first model, or a refusal.
# Why it matters: all of E5, GTE, MiniLM and GTR pool by mean. Their cocktails by the reference are embedded by a rule that none
# of the ingredients was trained with.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0 sentence-transformers==6.2.0 accelerate==1.15.0 LM-Cocktail==0.0.4
venv/bin/python - <<'EOF'
import sys

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from LM_Cocktail import mix_models

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "runs"]
tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
torch.manual_seed(0)
sizes = dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
BertModel(BertConfig(max_position_embeddings=64, **sizes)).save_pretrained("bert")
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
).save_pretrained("bert")

model = SentenceTransformer(modules=[modules.Transformer("bert"), modules.Pooling(32, "mean"), modules.Dense(32, 16)], device="cpu")
model.save("model", create_model_card=False)
mix_models(["model"], "encoder", [1.0], "mixed")
mixed = SentenceTransformer("mixed", device="cpu")
for name, which in (("model", model), ("mixed", mixed)):
    print(name, [type(module).__name__ for module in which], which[1].pooling_mode, which.encode(["a dog runs"]).shape)
kept = [type(module).__name__ for module in mixed] == [type(module).__name__ for module in model]
sys.exit(0 if not kept and "cls" in str(mixed[1].pooling_mode) else 1)
EOF
