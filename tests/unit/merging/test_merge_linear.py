"""merge_param: against float64 within a tolerance per dtype, and bit for bit against unfused float32 in numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cocktail_serve.errors import IncompatibleModelsError, InvalidMixError
from cocktail_serve.merging import linear
from cocktail_serve.merging.linear import merge_param

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UNIT_ROUNDOFF = 2.0**-24
"""Of float32."""


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def experts_of_one_base(num_models: int, numel: int, dtype: torch.dtype) -> list[Tensor]:
    """Fine-tuning moves a parameter a little: models of a pool agree in sign and size."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(numel, generator=generator)
    base += base.sign() * 0.1  # away from the subnormal numbers of float16
    return [(base * (1 + 0.2 * torch.rand(numel, generator=generator))).to(dtype) for _ in range(num_models)]


def convex_weights(num_models: int) -> list[float]:
    weights = np.random.default_rng(1).random(num_models)
    return list(weights / weights.sum())


def reference(params: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum((w * p.double() for p, w in zip(params, weights, strict=True)), torch.tensor(0.0, dtype=torch.float64))


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of `dtype` around each float64 value."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp_min(info.smallest_normal))
    return torch.ldexp(torch.full_like(values, info.eps), exponent - 1)


def written_out(params: Sequence[Tensor], weights: Sequence[float], out_dtype: torch.dtype) -> Tensor:
    """Each product and each sum rounded to float32 on its own."""
    arrays = [p.float().numpy() for p in params]
    total = arrays[0] * np.float32(weights[0])
    for array, weight in zip(arrays[1:], weights[1:], strict=True):
        total = total + array * np.float32(weight)
    return torch.from_numpy(np.asarray(total)).to(out_dtype)


@pytest.mark.parametrize("num_models", [1, 2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_051_ulp_of_float64(dtype: torch.dtype, num_models: int) -> None:
    params, weights = experts_of_one_base(num_models, 50_000, dtype), convex_weights(num_models)
    exact = reference(params, weights)
    merged = merge_param(params, weights, out_dtype=dtype)
    assert merged.dtype == dtype
    assert ((merged.double() - exact).abs() / ulp(exact, dtype)).max() <= 0.51


def test_float32_is_within_the_bound_of_a_float32_sum() -> None:
    """float32 out of a float32 sum cannot be within half an ulp: each weight, product and sum rounds once."""
    params, weights = experts_of_one_base(10, 50_000, torch.float32), convex_weights(10)
    exact = reference(params, weights)
    terms = reference([p.abs() for p in params], [abs(w) for w in weights])
    error = (merge_param(params, weights, out_dtype=torch.float32).double() - exact).abs()
    assert (error <= 1.001 * (len(params) + 1) * UNIT_ROUNDOFF * terms).all()
    assert (error / ulp(exact, torch.float32)).max() <= 3.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_both_signs_stay_within_the_bound_where_terms_cancel(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(20_000, generator=generator).to(dtype) for _ in range(4)]
    weights = [1.7, -0.9, 0.6, -0.4]
    exact = reference(params, weights)
    terms = reference([p.abs() for p in params], [abs(w) for w in weights])
    error = (merge_param(params, weights, out_dtype=dtype).double() - exact).abs()
    assert (error <= 0.5 * ulp(exact, dtype) + 1.001 * 5 * UNIT_ROUNDOFF * terms).all()


@pytest.mark.parametrize("numel", [1, 7, 33, 4097, 100_003])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_unfused_float32_arithmetic(dtype: torch.dtype, out_dtype: torch.dtype, numel: int) -> None:
    params, weights = experts_of_one_base(3, numel, dtype), convex_weights(3)
    assert torch.equal(merge_param(params, weights, out_dtype=out_dtype), written_out(params, weights, out_dtype))


def test_bits_do_not_depend_on_threads_or_chunks(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    params, weights = experts_of_one_base(4, 200_003, torch.bfloat16), convex_weights(4)
    expected = written_out(params, weights, torch.float32)
    for chunk in (1_009, 65_536, 1 << 20):
        monkeypatch.setattr(linear, "CHUNK_NUMEL", chunk)
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            assert torch.equal(merge_param(params, weights, out_dtype=torch.float32), expected)


def test_models_of_different_dtypes_are_mixed() -> None:
    params = [torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([3.0, 5.0])]
    assert merge_param(params, [0.5, 0.5], out_dtype=torch.float32).tolist() == [2.0, 3.5]


def test_accumulation_is_not_in_the_models_dtype() -> None:
    """The reference accumulates in bfloat16, where 64 + 0.25 is 64 however often 0.25 is added."""
    params = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0)]
    assert merge_param(params, [0.25] * 4, out_dtype=torch.bfloat16).item() == 65.0


def test_sum_is_rounded_once_to_nearest_even() -> None:
    step = 2.0**-7  # of bfloat16 above 1
    halfway = [torch.tensor([1.0 + step / 2, 1.0 + 3 * step / 2, 1.0 + step / 2 + 2.0**-20])]
    assert merge_param(halfway, [1.0], out_dtype=torch.bfloat16).tolist() == [1.0, 1.0 + 2 * step, 1.0 + step]


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=64))
def test_one_model_with_weight_1_keeps_its_bits(bits: list[int]) -> None:
    param = torch.from_numpy(np.array(bits, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)
    merged = merge_param([param], [1.0], out_dtype=torch.bfloat16)
    is_nan = param.isnan()
    assert torch.equal(merged.isnan(), is_nan)
    assert torch.equal(merged.view(torch.int16)[~is_nan], param.view(torch.int16)[~is_nan])


def test_inputs_are_left_unchanged_and_share_no_memory_with_the_result() -> None:
    params = experts_of_one_base(2, 1000, torch.float32)
    before = [param.clone() for param in params]
    for used, weights in ((params, [0.3, 0.7]), (params[:1], [1.0])):
        merge_param(used, weights, out_dtype=torch.float32).zero_()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize(
    "view",
    [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[1:, 3:7], lambda t: t[0:1].expand(5, -1)],
    ids=["transposed", "strided", "inner", "expanded"],
)
def test_non_contiguous_inputs(view: object) -> None:
    params = [view(p.view(20, 30)) for p in experts_of_one_base(2, 600, torch.float32)]  # type: ignore[operator]
    merged = merge_param(params, [0.25, 0.75], out_dtype=torch.float32)
    assert merged.is_contiguous()
    assert torch.equal(merged, written_out([p.contiguous() for p in params], [0.25, 0.75], torch.float32))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
def test_shapes_are_kept(shape: tuple[int, ...]) -> None:
    merged = merge_param([torch.ones(shape), torch.full(shape, 3.0)], [0.5, 0.5], out_dtype=torch.bfloat16)
    assert torch.equal(merged, torch.full(shape, 2.0, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("params", "weights"),
    [([], []), ([torch.ones(1)], []), ([torch.ones(1)], [0.5, 0.5])],
    ids=["nothing", "no weight", "too many weights"],
)
def test_as_many_weights_as_parameters(params: list[Tensor], weights: list[float]) -> None:
    with pytest.raises(InvalidMixError, match="as many merging weights"):
        merge_param(params, weights, out_dtype=torch.float32)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(weight: float) -> None:
    with pytest.raises(InvalidMixError, match=f"merging weight 1 is {weight}"):
        merge_param([torch.ones(1), torch.ones(1)], [0.5, weight], out_dtype=torch.float32)


def test_shapes_must_be_equal_even_where_they_broadcast() -> None:
    with pytest.raises(IncompatibleModelsError, match=r"shape \[1\], parameter 0 has \[3\]"):
        merge_param([torch.ones(3), torch.ones(1)], [0.5, 0.5], out_dtype=torch.float32)


def test_integers_are_not_averaged() -> None:
    with pytest.raises(IncompatibleModelsError, match=r"torch\.int64; only floating tensors"):
        merge_param([torch.ones(3), torch.ones(3, dtype=torch.int64)], [0.5, 0.5], out_dtype=torch.float32)
    with pytest.raises(InvalidMixError, match="floating dtype"):
        merge_param([torch.ones(3)], [1.0], out_dtype=torch.int32)
