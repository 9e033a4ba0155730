"""merge_param: within 0.51 ulp of float64, and bit for bit unfused float64 arithmetic rounded once, by numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from cocktail_serve.errors import IncompatibleModelsError, InvalidMixError
from cocktail_serve.merging import linear, native, threads
from cocktail_serve.merging.linear import merge_param

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
LEAST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two ways to the same bits."""
    if request.param == "torch":
        monkeypatch.setattr(linear, "load_kernel", lambda: "left out by the test")
    elif not isinstance(native.load_kernel(), native.Kernel):
        pytest.skip(str(native.load_kernel()))
    return str(request.param)


pytestmark = pytest.mark.usefixtures("path")


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
    terms = (w * p.double() for p, w in zip(params, weights, strict=True))
    return sum(terms, torch.tensor(0.0, dtype=torch.float64))


def ulp(values: NDArray[np.float64], dtype: torch.dtype) -> NDArray[np.float64]:
    """Distance between neighbours of `dtype` around each value."""
    _, exponent = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponent - 1, LEAST_EXPONENT[dtype]) - (BITS[dtype] - 1))


def written_out(params: Sequence[Tensor], weights: Sequence[float], out_dtype: torch.dtype) -> Tensor:
    """Each product and each sum rounded to float64 on its own, and the sum once to the output dtype."""
    arrays = [p.double().numpy() for p in params]
    total = arrays[0] * weights[0]
    for array, weight in zip(arrays[1:], weights[1:], strict=True):
        total = total + array * weight
    unit = ulp(total, out_dtype)
    rounded = np.rint(total / unit) * unit  # numpy's rint goes to even
    rounded = np.where(np.abs(rounded) > torch.finfo(out_dtype).max, np.copysign(np.inf, total), rounded)
    return torch.from_numpy(np.asarray(rounded)).to(out_dtype)


def unlike(num_models: int, numel: int, dtype: torch.dtype) -> list[Tensor]:
    """Parameters that agree in nothing, so that many sums cancel."""
    generator = torch.Generator().manual_seed(num_models)
    return [torch.randn(numel, generator=generator).to(dtype) for _ in range(num_models)]


@pytest.mark.parametrize("num_models", [1, 2, 3, 10])
@pytest.mark.parametrize("make", [experts_of_one_base, unlike])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_within_051_ulp_of_float64(dtype: torch.dtype, make: object, num_models: int) -> None:
    params, weights = make(num_models, 50_000, dtype), convex_weights(num_models)  # type: ignore[operator]
    exact = reference(params, weights).numpy()
    merged = merge_param(params, weights, out_dtype=dtype)
    assert merged.dtype == dtype
    assert (np.abs(merged.double().numpy() - exact) / ulp(exact, dtype)).max() <= 0.51


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_both_signs_stay_within_051_ulp(dtype: torch.dtype) -> None:
    params, weights = unlike(4, 20_000, dtype), [1.7, -0.9, 0.6, -0.4]
    exact = reference(params, weights).numpy()
    merged = merge_param(params, weights, out_dtype=dtype).double().numpy()
    assert (np.abs(merged - exact) / ulp(exact, dtype)).max() <= 0.51


@pytest.mark.parametrize("numel", [1, 7, 33, 64, 4097, 100_003])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_bits_are_those_of_unfused_float64_arithmetic(dtype: torch.dtype, out_dtype: torch.dtype, numel: int) -> None:
    params, weights = unlike(3, numel, dtype), convex_weights(3)
    assert torch.equal(merge_param(params, weights, out_dtype=out_dtype), written_out(params, weights, out_dtype))


def test_bits_do_not_depend_on_threads_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    params, weights = unlike(4, 200_003, torch.bfloat16), convex_weights(4)
    expected = written_out(params, weights, torch.bfloat16)
    for chunk in (1_009, 65_536, 1 << 20):
        monkeypatch.setattr(linear, "CHUNK_NUMEL", chunk)
        monkeypatch.setattr(linear, "TORCH_CHUNK_NUMEL", chunk)
        for num_threads in (1, 2, 5):
            monkeypatch.setattr(threads, "num_threads", lambda count=num_threads: count)
            threads.mixing_threads.cache_clear()
            assert torch.equal(merge_param(params, weights, out_dtype=torch.bfloat16), expected)
    threads.mixing_threads.cache_clear()


def test_models_of_different_dtypes_are_mixed() -> None:
    params = [torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([3.0, 5.0])]
    assert merge_param(params, [0.5, 0.5], out_dtype=torch.float32).tolist() == [2.0, 3.5]


def test_accumulation_is_not_in_the_models_dtype() -> None:
    """The reference accumulates in bfloat16, where 64 + 0.25 is 64 however often 0.25 is added."""
    params = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0)]
    assert merge_param(params, [0.25] * 4, out_dtype=torch.bfloat16).item() == 65.0


def test_sum_is_rounded_to_nearest_even() -> None:
    step = 2.0**-7  # of bfloat16 above 1
    halfway = [torch.tensor([1.0 + step / 2, 1.0 + 3 * step / 2, 1.0 + step / 2 + 2.0**-20])]
    assert merge_param(halfway, [1.0], out_dtype=torch.bfloat16).tolist() == [1.0, 1.0 + 2 * step, 1.0 + step]


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sum_is_rounded_once(dtype: torch.dtype, step: float, sign: float) -> None:
    """By way of float32 the rest, 2**-40, would be lost, and with it the side of the tie."""
    params = [torch.tensor([sign * (1 + step / 2), sign * (1 + 3 * step / 2)]), torch.tensor([2.0**-40, -(2.0**-40)])]
    merged = merge_param(params, [1.0, sign], out_dtype=dtype)
    assert merged.tolist() == [sign * (1 + step), sign * (1 + step)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_model_with_weight_1_keeps_all_65536_values(dtype: torch.dtype) -> None:
    param = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    merged = merge_param([param], [1.0], out_dtype=dtype)
    is_nan = param.isnan()
    assert torch.equal(merged.isnan(), is_nan)
    assert torch.equal(merged.view(torch.int16)[~is_nan], param.view(torch.int16)[~is_nan])


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_overflow_is_infinite_and_nan_stays_nan(out_dtype: torch.dtype) -> None:
    largest = torch.finfo(out_dtype).max
    values = [largest, -largest, float("inf"), float("-inf"), float("nan"), 0.0, 1.0]
    params = [torch.tensor(values, dtype=torch.float64), torch.tensor([*values[:2], 0, 0, 0, 0, 1.0]).double()]
    merged = merge_param(params, [1.0, 1.0], out_dtype=out_dtype).tolist()
    assert merged[:4] == [float("inf"), float("-inf"), float("inf"), float("-inf")]
    assert np.isnan(merged[4])
    assert merged[5:] == [0.0, 2.0]


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.floats(width=64), min_size=1, max_size=20))
def test_any_value_is_rounded_once_to_nearest_even(out_dtype: torch.dtype, values: list[float]) -> None:
    """Subnormal, huge, tiny and special ones; numpy's own rounding where it has it, else by `rint`."""
    param = torch.tensor(values, dtype=torch.float64)
    merged = merge_param([param], [1.0], out_dtype=out_dtype).double().numpy()
    with np.errstate(all="ignore"):
        unit = ulp(param.numpy(), out_dtype)
        expected = np.rint(param.numpy() / unit) * unit
        beyond = np.abs(expected) > torch.finfo(out_dtype).max
        expected = np.where(beyond, np.copysign(np.inf, expected), expected)
    np.testing.assert_array_equal(merged, expected)


def test_subnormal_results_are_kept_where_a_library_flushes_them(path: str) -> None:
    if path == "torch":
        pytest.skip("torch does as its threads were told")
    params = [torch.full((100,), 2.0**-130)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush")
    try:
        merged = merge_param(params, [0.5], out_dtype=torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert merged.tolist() == [2.0**-131] * 100


def test_out_is_written_and_returned() -> None:
    params, out = experts_of_one_base(2, 1000, torch.float32), torch.empty(1000, dtype=torch.bfloat16)
    assert merge_param(params, [0.5, 0.5], out_dtype=torch.bfloat16, out=out) is out
    assert torch.equal(out, written_out(params, [0.5, 0.5], torch.bfloat16))
    with pytest.raises(InvalidMixError, match=r"out must be a contiguous torch.float32 tensor of shape \[1000\]"):
        merge_param(params, [0.5, 0.5], out_dtype=torch.float32, out=out)


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
