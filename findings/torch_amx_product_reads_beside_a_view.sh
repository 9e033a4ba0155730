#!/usr/bin/env bash
# torch 2.13.0 (CPU build, oneDNN): on a processor with AMX a bfloat16 product of a view whose rows have an odd length is NaN where a
# NaN lies beside the view.
#
# x is a column slice of a wider tensor, [60, 31] with a stride of 34, all its elements finite; w is finite. `x @ w.T` and
# `torch.nn.functional.linear(x, w)` should not depend on the elements of the wider tensor that x does not have.
#
# Seen: with 31 columns both hold NaN if the wider tensor's other elements are NaN, and none if they are zero. With 32 columns, of
# `x.contiguous()`, in float32, and with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 both are finite and right.
# Why it matters: padding and unused places of a buffer are often NaN or infinite, on purpose in tests; a product that is right on one
# machine is NaN on the next, and nothing says so.
# Needs a processor with AMX (amx_bf16 in /proc/cpuinfo); on another there is nothing to see, and the script says so and ends with 0.
set -euo pipefail
if ! grep -qw amx_bf16 /proc/cpuinfo; then
  echo "no amx_bf16 on this processor: nothing to see"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile uv
install=(venv/bin/uv pip install --quiet --python venv/bin/python)
"${install[@]}" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} torch==2.13.0+cpu numpy==2.3.5 \
  || "${install[@]}" --torch-backend cpu torch==2.13.0 numpy==2.3.5
cat > products.py <<'EOF_PYTHON'
import sys

import torch
from torch.nn.functional import linear


def num_nan(columns, beside, dtype=torch.bfloat16, contiguous=False):
    torch.manual_seed(0)
    wide = torch.full((60, columns + 3), beside, dtype=dtype)
    x = wide[:, 1 : 1 + columns]
    x.copy_(torch.randn(60, columns))
    w = torch.randn(16, columns).to(dtype)
    assert bool(x.isfinite().all() and w.isfinite().all())
    if contiguous:
        x = x.contiguous()
    return int((x @ w.T).isnan().sum()), int(linear(x, w).isnan().sum())


nan = float("nan")
seen = {
    "31 columns, NaN beside them": num_nan(31, nan),
    "31 columns, zeros beside them": num_nan(31, 0.0),
    "32 columns, NaN beside them": num_nan(32, nan),
    "31 columns, copied": num_nan(31, nan, contiguous=True),
    "31 columns, float32": num_nan(31, nan, torch.float32),
}
for case, counts in seen.items():
    print(f"{case}: NaN in x @ w.T {counts[0]}, in linear {counts[1]} of 960")
wrong, *right = seen.values()
is_expected = (min(wrong) > 0) == (sys.argv[1] == "amx") and all(counts == (0, 0) for counts in right)
sys.exit(0 if is_expected else 1)
EOF_PYTHON
venv/bin/python products.py amx
echo "without AMX:"
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 venv/bin/python products.py none
echo "as described"
