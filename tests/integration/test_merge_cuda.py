"""The Triton kernel: in Triton's interpreter everywhere, and on a GPU where there is one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

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


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WEIGHTS = [0.7 - 0.13 * number for number in range(10)]  # of either sign


@pytest.fixture
def cuda() -> ModuleType:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return pytest.importorskip("cocktail_serve.merging.cuda")


def some_models(dtype: torch.dtype, numel: int = 100_003) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(numel, generator=generator).to(dtype) for _ in WEIGHTS]


@pytest.mark.gpu
@pytest.mark.parametrize("staged_numel", [1, 7_001, 1 << 24])
@pytest.mark.parametrize("is_pinned", [False, True], ids=["on the device", "pinned on the host"])
@pytest.mark.parametrize(("dtype", "out_dtype"), [*itertools.product(DTYPES, DTYPES)], ids=str)
def test_on_a_gpu_it_gives_the_bits_of_the_cpu(
    cuda: ModuleType, dtype: torch.dtype, out_dtype: torch.dtype, is_pinned: bool, staged_numel: int
) -> None:
    """Which lie within 0.51 ulp of float64; whatever the parts that are copied."""
    params = some_models(dtype, 101 if staged_numel == 1 else 100_003)
    expected = merge_param(params, WEIGHTS, out_dtype=out_dtype)
    given = [param.pin_memory() if is_pinned else param.cuda() for param in params]
    out = torch.empty(expected.shape, dtype=out_dtype, device="cuda")
    assert cuda.is_mergeable(given, out)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cuda, "STAGED_NUMEL", staged_numel)
        assert torch.equal(merge_param(given, WEIGHTS, out_dtype=out_dtype, out=out).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_every_element_is_within_051_ulp_of_float64(cuda: ModuleType, dtype: torch.dtype) -> None:
    params = [param.abs() for param in some_models(dtype)]
    weights = [abs(weight) for weight in WEIGHTS]
    exact = sum((w * p.double() for w, p in zip(weights, params, strict=True)), torch.zeros((), dtype=torch.float64))
    merged = merge_param([param.cuda() for param in params], weights, out_dtype=dtype).cpu()
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.ones_like(exact), exponent - bits)
    assert ((merged.double() - exact).abs() / unit).max() <= 0.51
