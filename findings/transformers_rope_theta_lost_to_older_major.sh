#!/usr/bin/env bash
# transformers 5.19.0 writes, transformers 4.57.6 reads: the rotary base falls back to 10,000 in silence.
#
# transformers 5 stores `rope_parameters: {"rope_theta": 1000000.0, ...}` and no longer a top-level `rope_theta`. The last
# release of the previous major reads that file without error or warning, and has rope_theta 10000, its default.
#
# Seen: written 1000000.0, read 10000.0.
# Expected: the old key beside the new one, or a refusal; the file names the release that wrote it.
# Why it matters: an expert that was only re-saved is another model wherever tools of the older major serve, convert or merge
# it, more so the longer the text. A base's config.json had better be copied than written anew.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --target new transformers==5.19.0
venv/bin/pip install --quiet --no-compile --target old transformers==4.57.6
venv/bin/python - <<'EOF'
import os, subprocess, sys

write = "from transformers import Qwen2Config; Qwen2Config(rope_parameters={'rope_type': 'default', 'rope_theta': 1e6})" \
    ".save_pretrained('model')"
read = "from transformers import AutoConfig; print(AutoConfig.from_pretrained('model').rope_theta)"
subprocess.run([sys.executable, "-c", write], env=os.environ | {"PYTHONPATH": "new"}, check=True)
print(open("model/config.json").read())
done = subprocess.run(
    [sys.executable, "-c", read], env=os.environ | {"PYTHONPATH": "old", "TRANSFORMERS_VERBOSITY": "warning"},
    check=True, capture_output=True, text=True,
)
print("rope_theta read by 4.57.6:", done.stdout.strip(), "said:", done.stderr.strip())
sys.exit(0 if float(done.stdout) == 10000.0 and "rope" not in done.stderr else 1)
EOF
