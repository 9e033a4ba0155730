#!/usr/bin/env bash
# sentence-transformers 6.2.0, peft 0.21.2: add_adapter trains a Dense module whole, load_adapter does not load it.
#
# add_adapter(LoraConfig(...)) freezes the transformer and puts factors into it. A Dense module behind it stays trainable and
# is trained. save() writes the adapter and 2_Dense/model.safetensors into one folder. load_adapter(folder) on the base, the
# call that belongs to add_adapter, takes the factors alone and keeps the base's Dense; SentenceTransformer(folder) takes both.
#
# Seen: SentenceTransformer(folder) equals the trained model; load_adapter(folder) has a cosine of 0.48 to it; no warning.
# Expected: both ways give the model that was saved, or load_adapter says what it leaves behind.
# Why it matters: an adapter folder of an encoder is more than its adapter_model.safetensors. Whoever folds or serves that file
# over the base (peft, engines, merges) serves a model that was never trained.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0 sentence-transformers==6.2.0 peft==0.21.2
venv/bin/python - <<'EOF'
import sys

from peft import LoraConfig

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

base = SentenceTransformer(modules=[modules.Transformer("bert"), modules.Pooling(32), modules.Dense(32, 16)], device="cpu")
base.save("base", create_model_card=False)
model = SentenceTransformer("base", device="cpu")
model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]))
print("trainable beside the adapter:", [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n])
with torch.no_grad():  # a training step
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter += torch.randn_like(parameter) * 0.3
trained = model.encode("a dog runs", convert_to_tensor=True)
model.save("expert", create_model_card=False)
whole = SentenceTransformer("expert", device="cpu").encode("a dog runs", convert_to_tensor=True)
loaded = SentenceTransformer("base", device="cpu")
loaded.load_adapter("expert")
alone = loaded.encode("a dog runs", convert_to_tensor=True)
cosines = [torch.cosine_similarity(trained, other, dim=0).item() for other in (whole, alone)]
print("cosine to the trained model: SentenceTransformer(folder)", cosines[0], "load_adapter(folder)", cosines[1])
sys.exit(0 if cosines[0] > 0.9999 and cosines[1] < 0.95 else 1)
EOF
