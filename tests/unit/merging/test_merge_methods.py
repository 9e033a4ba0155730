"""Methods beside linear: each against a plain float64 reference of its paper, and the same bits whatever the chunks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cocktail_serve.errors import IncompatibleModelsError, InvalidMixError
from cocktail_serve.merging import linear, task_vectors
from cocktail_serve.merging.dare import keep_mask, mask_key, merge_dare
from cocktail_serve.merging.linear import merge_param
from cocktail_serve.merging.merger import merger
from cocktail_serve.merging.slerp import merge_slerp
from cocktail_serve.merging.task_arithmetic import merge_task_arithmetic
from cocktail_serve.merging.ties import merge_ties
from cocktail_serve.methods import METHODS
from cocktail_serve.recipe import Recipe
from tests.merging import Array, elected, interpolated, largest

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COEFFICIENTS = [0.875, -0.375, 0.6875]
"""Exact in float32, as are sums of few of their multiples: which sign is elected then does not hang on a rounding."""


def models(num_models: int = 4, shape: Sequence[int] = (37, 53), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A base and its fine-tunings, moved by a tenth."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(tuple(shape), generator=generator)
    moved = [base + 0.1 * torch.randn(tuple(shape), generator=generator) for _ in range(num_models - 1)]
    return [param.to(dtype) for param in (base, *moved)]


def float64(params: Sequence[Tensor]) -> list[Array]:
    return [param.double().numpy() for param in params]


def assert_rounds_to(merged: Tensor, exact: Array, dtype: torch.dtype, *, terms: float = 8.0) -> None:
    """Half an ulp of the output for its rounding; float32 arithmetic on terms of this size for the rest."""
    assert merged.dtype == dtype
    error = np.abs(merged.double().numpy() - exact)
    assert (error <= 0.501 * torch.finfo(dtype).eps * np.abs(exact) + 2.0**-24 * terms).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_task_arithmetic(dtype: torch.dtype, scale: float) -> None:
    params = models(dtype=dtype)
    base, *experts = float64(params)
    exact = base + scale * sum(c * (expert - base) for c, expert in zip(COEFFICIENTS, experts, strict=True))
    merged = merge_task_arithmetic(params, COEFFICIENTS, scale=scale, out_dtype=dtype)
    assert_rounds_to(merged, exact, dtype, terms=4 * max(np.abs(param).max() for param in (base, *experts)))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0, 1e-9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties(dtype: torch.dtype, density: float, normalize: bool) -> None:
    """Fine-tunings stored in half precision move by few different amounts, so the cut goes through equal ones."""
    params = models(dtype=dtype)
    base, *experts = float64(params)
    trimmed = [largest(expert - base, density) for expert in experts]
    exact = base + 0.8 * elected(trimmed, COEFFICIENTS, normalize=normalize)
    merged = merge_ties(params, COEFFICIENTS, density=density, normalize=normalize, scale=0.8, out_dtype=dtype)
    assert_rounds_to(merged, exact, dtype, terms=16.0 if normalize else 8.0)


def test_ties_by_hand() -> None:
    """The paper's method: coefficients 1. Of four elements each model keeps two: 4 and -3; 3 and 3; -1 and -2."""
    base = torch.zeros(4)
    experts = [torch.tensor(v) for v in ([4.0, 1.0, -3.0, 0.5], [3.0, 0.0, 1.0, 3.0], [-1.0, 0.5, -2.0, 0.2])]
    merged = merge_ties(
        [base, *experts], [1.0, 1.0, 1.0], density=0.5, normalize=True, scale=1.0, out_dtype=torch.float32
    )
    assert merged.tolist() == [3.5, 0.0, -2.5, 3.0]


def test_ties_keeps_the_first_of_equal_magnitudes() -> None:
    vector = torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0, 1.0])
    merged = merge_ties(
        [torch.zeros(6), vector], [1.0], density=0.5, normalize=True, scale=1.0, out_dtype=torch.float32
    )
    assert merged.tolist() == [1.0, -1.0, 2.0, 0.0, 0.0, 0.0]


def test_a_sum_of_nought_elects_plus() -> None:
    experts = [torch.tensor([0.5]), torch.tensor([-0.5])]
    merged = merge_ties(
        [torch.zeros(1), *experts], [1.0, 1.0], density=1.0, normalize=True, scale=1.0, out_dtype=torch.float32
    )
    assert merged.tolist() == [0.5]


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("elects_signs", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dare(dtype: torch.dtype, elects_signs: bool, rescale: bool) -> None:
    params, density, keys = models(dtype=dtype), 0.4, [7, 8, 9]
    base, *experts = float64(params)
    masks = [keep_mask(key, 0, base.size, density).reshape(base.shape) for key in keys]
    factor = 1.0 / density if rescale else 1.0
    dropped = [(expert - base) * mask * factor for expert, mask in zip(experts, masks, strict=True)]
    added = (
        elected(dropped, COEFFICIENTS, normalize=False)
        if elects_signs
        else sum(c * vector for c, vector in zip(COEFFICIENTS, dropped, strict=True))
    )
    merged = merge_dare(
        params,
        COEFFICIENTS,
        keys=keys,
        density=density,
        rescale=rescale,
        elects_signs=elects_signs,
        normalize=False,
        scale=0.5,
        out_dtype=dtype,
    )
    assert_rounds_to(merged, base + 0.5 * added, dtype, terms=16.0)


def philox4x64(counter: int, key: int) -> list[int]:
    """Ten rounds of Philox4x64 (Salmon et al., SC 2011), four words of 64 bits."""
    mask = 2**64 - 1
    x = [counter >> 64 * i & mask for i in range(4)]
    k = [key >> 64 * i & mask for i in range(2)]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [second >> 64 ^ x[1] ^ k[0], second & mask, first >> 64 ^ x[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return x


def test_philox_of_the_test_is_the_published_one() -> None:
    """The known answer for nought, from the authors' Random123."""
    assert philox4x64(0, 0) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


def test_dares_mask_is_a_function_of_key_and_element() -> None:
    key, density = mask_key(3, "fingerprint", "layer.weight"), 0.3
    whole = keep_mask(key, 0, 1003, density)
    for element in range(0, 1003, 17):
        word = philox4x64(element // 8 + 1, key)[element % 8 // 2]
        draw = word >> 32 * (element % 2) & (2**32 - 1)
        assert whole[element] == (draw < density * 2**32)
    for begin, size in ((0, 8), (8, 13), (504, 499)):
        assert (keep_mask(key, begin, size, density) == whole[begin : begin + size]).all()


def test_dare_keeps_the_share_it_says() -> None:
    size, density = 1_000_000, 0.3
    kept = keep_mask(mask_key(0, "m", "w"), 0, size, density).sum()
    assert abs(kept - density * size) < 5 * math.sqrt(density * (1 - density) * size)


def test_dares_masks_of_other_seeds_models_and_parameters_are_others() -> None:
    keys = {mask_key(seed, model, name) for seed in (0, 1, -1) for model in ("a", "b") for name in ("w", "v")}
    assert len(keys) == 12
    masks = [keep_mask(key, 0, 10_000, 0.5) for key in keys]
    agreement = [(one == other).mean() for i, one in enumerate(masks) for other in masks[:i]]
    assert 0.47 < min(agreement) <= max(agreement) < 0.53


def test_dares_key_is_the_same_in_every_release() -> None:
    written_out = hashlib.sha256(b'["dare",0,"model","name"]').hexdigest()
    assert mask_key(0, "model", "name") == int(written_out[:32], 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.2])
def test_slerp(dtype: torch.dtype, t: float) -> None:
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(31, 17, generator=generator).to(dtype) for _ in range(2)]
    first, second = float64(params)
    exact = interpolated(first, second, t)
    merged = merge_slerp(params, [1 - t, t], out_dtype=dtype)
    assert_rounds_to(merged, exact, dtype, terms=3 * max(np.abs(first).max(), np.abs(second).max()))


@pytest.mark.parametrize("factor", [1.01, -2.0], ids=["parallel", "opposite"])
def test_slerp_of_one_direction_is_linear(factor: float) -> None:
    param = models()[0]
    merged = merge_slerp([param, factor * param], [0.25, 0.75], out_dtype=torch.float32)
    torch.testing.assert_close(merged, 0.25 * param + 0.75 * factor * param)


def test_slerp_from_nought_is_at_a_right_angle() -> None:
    """A tensor of noughts has no direction; mergekit then takes 90 degrees, and so do we."""
    merged = merge_slerp([torch.zeros(3), torch.ones(3)], [0.5, 0.5], out_dtype=torch.float32)
    torch.testing.assert_close(merged, torch.full((3,), math.sin(math.pi / 4)))


TASK_VECTORS = (("a", 1.0), ("b", 0.5), ("c", 0.7))
COEFFICIENTS_OF = {
    "linear": (("a", 0.2), ("b", 0.5), ("c", 0.3)),
    "slerp": (("a", 0.4), ("b", 0.6)),
} | {name: TASK_VECTORS for name, method in METHODS.items() if method.adds_task_vectors}


def merge(name: str, params: Sequence[Tensor], **method_params: Any) -> Tensor:
    """Through the door that engines use."""
    checked = METHODS[name].check_params(method_params)
    return merger(Recipe("a", COEFFICIENTS_OF[name], "bfloat16", name, checked))("w", params)


def few(name: str, params: Sequence[Tensor]) -> Sequence[Tensor]:
    return params[: METHODS[name].num_models]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", METHODS)
def test_bits_depend_on_neither_threads_nor_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = few(name, models(3, (300_007,), torch.bfloat16))
    torch.set_num_threads(1)
    merged = merge(name, params)
    torch.set_num_threads(3)
    assert torch.equal(merge(name, params), merged)
    for module in (linear, task_vectors):
        monkeypatch.setattr(module, "CHUNK_NUMEL", 1 << 14, raising=False)
    assert torch.equal(merge(name, params), merged)


@pytest.mark.parametrize("name", METHODS)
def test_inputs_stay_as_they_are_and_strides_do_not_matter(name: str) -> None:
    params = few(name, models(3, (24, 40)))
    before = [param.clone() for param in params]
    merged = merge(name, params)
    assert all(torch.equal(param, was) for param, was in zip(params, before, strict=True))
    turned = [param.t().contiguous().t() for param in params]
    assert torch.equal(merge(name, turned), merged)
    merged.zero_()
    assert all(torch.equal(param, was) for param, was in zip(params, before, strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,)], ids=str)
def test_scalars_and_empty_tensors(name: str, shape: tuple[int, ...]) -> None:
    merged = merge(name, few(name, models(3, shape)))
    assert merged.shape == shape
    assert torch.isfinite(merged).all()


@pytest.mark.parametrize("name", METHODS)
def test_models_of_other_shapes_are_refused(name: str) -> None:
    first, *others = few(name, models(3, (4, 6)))
    with pytest.raises(IncompatibleModelsError, match="shape"):
        merge(name, [first, *(other.t() for other in others)])


@pytest.mark.parametrize("name", METHODS)
def test_another_number_of_parameters_than_coefficients_is_refused(name: str) -> None:
    with pytest.raises(InvalidMixError, match="as many merging weights"):
        merge(name, models(4))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.adds_task_vectors])
def test_the_base_alone_is_the_base(name: str) -> None:
    recipe = Recipe("a", (("a", 1.0),), "float32", name, METHODS[name].check_params({}))
    base = models()[0]
    assert torch.equal(merger(recipe)("w", [base]), base)


def test_task_arithmetic_of_examples_weights_is_the_linear_mixture() -> None:
    """Shares that sum to 1 with the base's: the base keeps what the task vectors leave of it."""
    params, shares = models(), [0.1, 0.2, 0.3, 0.4]
    mixed = merge_param(params, shares, out_dtype=torch.float32)
    merged = merge_task_arithmetic(params, shares[1:], scale=1.0, out_dtype=torch.float32)
    torch.testing.assert_close(merged, mixed, rtol=0, atol=1e-6)


def test_dare_is_task_arithmetic_on_average() -> None:
    """What rescaling is for: a thousand draws come within five standard errors."""
    base, expert = torch.zeros(4), torch.tensor([1.0, -2.0, 0.5, 0.0])
    recipes: list[dict[str, Any]] = [{"density": 0.3, "seed": seed} for seed in range(1000)]
    draws = torch.stack(
        [
            merger(
                Recipe("a", (("a", 1.0), ("b", 0.5)), "float32", "dare_linear", METHODS["dare_linear"].check_params(p))
            )("w", [base, expert])
            for p in recipes
        ]
    )
    deviation = 0.5 * expert.abs() * math.sqrt((1 - 0.3) / 0.3 / len(recipes))
    assert ((draws.mean(0) - 0.5 * expert).abs() <= 5 * deviation + 1e-6).all()
