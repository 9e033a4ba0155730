"""The Triton kernel: in Triton's interpreter everywhere, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cocktail_serve.merging.linear import merge_param

_INTERPRETED = """
import torch
from cocktail_serve.merging import cuda
from cocktail_serve.merging.linear import merge_param
generator = torch.Generator().manual_seed(0)
weights = [0.3, 0.9, -0.2]
dtypes = (torch.bfloat16, torch.float16, torch.float32)
for dtype in dtypes:
    params = [torch.randn(3001, generator=generator).to(dtype) for _ in weights]
    params[0][:3] = torch.tensor([float("inf"), float("nan"), 0.0])
    for out_dtype in dtypes:
        out = torch.empty(3001, dtype=out_dtype)
        cuda.launch(params, torch.tensor(weights, dtype=torch.float64), out)
        expected = merge_param(params, weights, out_dtype=out_dtype)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
print("equal")
"""


def test_interpreted_it_gives_the_bits_of_the_cpu() -> None:
    """Says nothing of what Triton's compiler makes of it."""
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", "-c", _INTERPRETED]
    ran = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == "equal", ran.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("is_pinned", [False, True], ids=["on the device", "pinned on the host"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu_it_gives_the_bits_of_the_cpu(
    dtype: torch.dtype, is_pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    cuda = pytest.importorskip("cocktail_serve.merging.cuda")
    monkeypatch.setattr(cuda, "STAGED_NUMEL", 10_000)
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(100_003, generator=generator).to(dtype) for _ in range(10)]
    weights = [0.1 + 0.01 * number for number in range(10)]
    expected = merge_param(params, weights, out_dtype=dtype)
    given = [param.pin_memory() if is_pinned else param.cuda() for param in params]
    out = torch.empty(100_003, dtype=dtype, device="cuda")
    assert cuda.is_mergeable(given, out)
    assert torch.equal(merge_param(given, weights, out_dtype=dtype, out=out).cpu(), expected)
