"""The bound of a mixture's elements holds for every method, and is no wider than it must be for the usual one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cocktail_serve.merging.bounds import largest_of_mixture
from cocktail_serve.merging.merger import merger
from cocktail_serve.methods import METHODS
from cocktail_serve.recipe import Recipe

numbers = st.floats(-1000, 1000, width=32)
coefficients = st.floats(-3, 3)
METHOD_PARAMS = [
    ("linear", {}),
    ("task_arithmetic", {"lambda": -2.5}),
    ("ties", {"density": 0.5}),
    ("ties", {"density": 0.5, "normalize": False, "lambda": 3.0}),
    ("dare_linear", {"density": 0.1}),
    ("dare_linear", {"density": 0.5, "rescale": False}),
    ("dare_ties", {"density": 0.3, "normalize": True, "lambda": 0.2}),
    ("slerp", {}),
]


@pytest.mark.parametrize(("method", "params"), METHOD_PARAMS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_element_is_larger(method: str, params: dict[str, float], data: st.DataObject) -> None:
    rule = METHODS[method]
    count = rule.num_models or data.draw(st.integers(2, 4))
    models = [torch.tensor(data.draw(st.lists(numbers, min_size=8, max_size=8))) for _ in range(count)]
    if rule.adds_task_vectors:
        weights = [1.0, *data.draw(st.lists(coefficients, min_size=count - 1, max_size=count - 1))]
    else:
        weights = data.draw(st.lists(coefficients, min_size=count - 1, max_size=count - 1))
        weights = [1.0 - math.fsum(weights), *weights]
    names = [chr(97 + index) for index in range(count)]
    recipe = Recipe("a", tuple(zip(names, weights, strict=True)), "float32", method, rule.check_params(params))
    largest = {name: float(model.abs().max()) for name, model in zip(names, models, strict=True)}
    found = float(merger(recipe)("w", models).abs().max())
    assert found <= largest_of_mixture(recipe, largest)


def test_a_usual_mixture_is_bounded_by_its_models() -> None:
    recipe = Recipe("a", (("a", 0.3), ("b", 0.7)), "float16")
    assert largest_of_mixture(recipe, {"a": 10.0, "b": 20.0}) == pytest.approx(17.0, rel=1e-4)


def test_models_that_nobody_has_looked_at_have_no_bound() -> None:
    recipe = Recipe("a", (("a", 0.3), ("b", 0.7)), "float16")
    assert largest_of_mixture(recipe, {"a": 10.0, "b": math.inf}) == math.inf
    never = Recipe("a", (("a", 1.0), ("b", 0.0)), "float16", "slerp")
    assert largest_of_mixture(never, {"a": 10.0, "b": math.inf}) == math.inf


def test_a_base_without_task_vectors_is_itself() -> None:
    recipe = Recipe("a", (("a", 1.0),), "float16", "ties", METHODS["ties"].check_params({}))
    assert largest_of_mixture(recipe, {"a": 10.0}) == pytest.approx(10.0, rel=1e-4)


def test_a_mean_over_weights_of_either_sign_has_no_bound() -> None:
    recipe = Recipe("a", (("a", 1.0), ("b", 1.0), ("c", -1.0)), "float16", "ties", METHODS["ties"].check_params({}))
    assert largest_of_mixture(recipe, {"a": 1.0, "b": 1.0, "c": 1.0}) == math.inf
