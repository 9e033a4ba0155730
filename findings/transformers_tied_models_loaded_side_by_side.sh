#!/usr/bin/env bash
# transformers 5.19.0, torch 2.13.0: T5 encoders loaded by several threads end up with parameters on the meta device.
#
# T5EncoderModel ties `shared` and `encoder.embed_tokens`. from_pretrained puts modules on the meta device by a setting that
# is not the thread's own; four threads that load four folders leave models whose embed_tokens has no values. from_pretrained
# returns them without an error; the first forward pass fails.
#
# Seen: 37 to 40 of 40 loads have encoder.embed_tokens.weight on meta; one at a time none has.
# Expected: from_pretrained is safe in threads, or says that it is not.
# Why it matters: pools of sentence-t5 or GTR models that start side by side fail by chance, and pass every test that loads
# one model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile torch==2.13.0 transformers==5.19.0
venv/bin/python - <<'EOF'
import sys, threading

from transformers import T5Config, T5EncoderModel

sizes = dict(vocab_size=2000, d_model=64, d_kv=16, d_ff=128, num_layers=6, num_heads=4)
folders = [f"model-{index}" for index in range(4)]
for folder in folders:
    T5EncoderModel(T5Config(**sizes)).save_pretrained(folder)
broken = []

def load(folder):
    try:
        model = T5EncoderModel.from_pretrained(folder)
        broken.extend(name for name, parameter in model.named_parameters() if parameter.is_meta)
    except (RuntimeError, NotImplementedError) as error:  # an earlier form of the same
        broken.append(str(error).splitlines()[0])

for folder in folders:
    load(folder)
alone = len(broken)
for _ in range(10):
    threads = [threading.Thread(target=load, args=(folder,)) for folder in folders]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print("broken one at a time:", alone, "of 4; side by side:", len(broken), "of 40", sorted(set(broken)))
sys.exit(0 if alone == 0 and len(broken) > 0 else 1)
EOF
