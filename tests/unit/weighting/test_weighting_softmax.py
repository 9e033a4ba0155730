"""Eq. 2: losses to merging weights."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocktail_serve.errors import InvalidMixError
from cocktail_serve.weighting.softmax import (
    entropy,
    keep_largest,
    softmax_weights,
    uniform_weights,
    weights_from_losses,
)

LOSSES = st.dictionaries(st.text(min_size=1, max_size=3), st.floats(allow_nan=False, allow_infinity=False), min_size=1)
TEMPERATURES = st.floats(min_value=1e-300, max_value=1e300)


def test_is_the_softmax_of_negated_losses_over_the_temperature() -> None:
    losses = {"base": 2.31, "ag-news": 0.4, "nq": 1.7}
    exponentials = np.exp(-np.array(list(losses.values())) / 0.7)
    assert list(softmax_weights(losses, temperature=0.7).values()) == pytest.approx(
        list(exponentials / exponentials.sum()), rel=1e-14
    )


def test_the_papers_temperature_is_nearly_uniform() -> None:
    losses = dict.fromkeys("abcdefghi", 2.0) | {"best": 1.0}
    assert softmax_weights(losses, temperature=5.0)["best"] == pytest.approx(0.119, abs=5e-4)


def test_order_of_names_is_kept() -> None:
    assert list(softmax_weights({"z": 1.0, "a": 2.0, "m": 0.0}, temperature=1.0)) == ["z", "a", "m"]


def test_what_is_kept_is_the_softmax_over_it_alone() -> None:
    losses = {"base": 2.0, "a": 1.0, "b": 3.0, "c": 0.5, "d": 1.5}
    kept = keep_largest(softmax_weights(losses, temperature=0.7), 2)
    alone = softmax_weights({name: losses[name] for name in ("base", "a", "c")}, temperature=0.7)
    assert list(kept) == list(losses)
    assert kept == pytest.approx({**dict.fromkeys(losses, 0.0), **alone})
    assert math.fsum(kept.values()) == pytest.approx(1.0)


def test_the_base_is_kept_beside_the_experts_and_of_equals_the_first() -> None:
    shares = {"x": 0.2, "base": 0.1, "y": 0.2, "z": 0.2, "w": 0.3}
    assert {name for name, share in keep_largest(shares, 2).items() if share} == {"base", "w", "x"}
    assert keep_largest(shares, 4) == pytest.approx(shares)
    assert set(keep_largest({"a": 0.5, "b": 0.5}, 1).values()) == {0.0, 1.0}


def test_the_target_is_no_expert_that_is_left_out() -> None:
    losses = {"base": [2.0], "a": [1.0], "b": [0.5]}
    weights = weights_from_losses(losses, rows=None, temperature=1.0, target="t", alpha=0.4, max_experts=1)
    assert (weights["t"], weights["a"]) == (0.4, 0.0)
    assert math.fsum(weights.values()) == pytest.approx(1.0)


@given(LOSSES, TEMPERATURES)
def test_weights_of_any_finite_losses_sum_to_1_and_follow_them(losses: dict[str, float], temperature: float) -> None:
    weights = softmax_weights(losses, temperature=temperature)
    assert math.fsum(weights.values()) == pytest.approx(1.0, abs=1e-12)
    assert all(weight >= 0.0 for weight in weights.values())
    by_loss = sorted(losses, key=losses.__getitem__)
    assert all(weights[a] >= weights[b] for a, b in itertools.pairwise(by_loss))


def test_the_largest_float64_losses_do_not_overflow() -> None:
    largest = 1.7976931348623157e308
    assert softmax_weights({"a": largest, "b": -largest}, temperature=5.0) == {"a": 0.0, "b": 1.0}
    assert softmax_weights({"a": largest, "b": largest}, temperature=5e-324) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_names_its_model(loss: float) -> None:
    remedy = "leave the model out with 'experts', or use float32"
    with pytest.raises(
        InvalidMixError, match=f"^the loss of 'nq' on the examples is {loss}: .* express them; {remedy}$"
    ) as caught:
        softmax_weights({"base": 1.0, "nq": loss}, temperature=5.0)
    assert caught.value.param == "examples"


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan"), float("inf"), True, "5", None])
def test_temperature_must_be_a_finite_number_above_0(temperature: object) -> None:
    with pytest.raises(InvalidMixError, match="temperature must be a finite number above 0") as caught:
        softmax_weights({"base": 1.0}, temperature=temperature)  # type: ignore[arg-type]
    assert caught.value.param == "temperature"


def test_no_losses_no_weights() -> None:
    with pytest.raises(InvalidMixError) as caught:
        softmax_weights({}, temperature=5.0)
    assert str(caught.value) == "there are no losses to weigh: the pool has no model to mix"
    assert caught.value.param == "examples"


def test_uniform_weights() -> None:
    assert uniform_weights(["a", "b", "a", "c", "d"]) == {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}
    with pytest.raises(InvalidMixError, match=r"^there is no model to mix$"):
        uniform_weights([])


def test_entropy_goes_from_0_to_the_logarithm_of_the_number_of_models() -> None:
    assert entropy({"a": 1.0, "b": 0.0}) == 0.0
    assert entropy(uniform_weights("abcde")) == pytest.approx(math.log(5))
    assert entropy({"a": 0.9, "b": 0.1}) == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_entropy_of_weights_that_are_no_distribution(weight: float) -> None:
    with pytest.raises(InvalidMixError, match="'b' has"):
        entropy({"a": 0.5, "b": weight})
