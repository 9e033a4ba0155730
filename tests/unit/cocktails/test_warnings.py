"""What whoever makes a cocktail hears although nothing failed."""

from __future__ import annotations

from typing import Any

import pytest

from cocktail_serve.cocktails.options import CocktailOptions
from cocktail_serve.cocktails.warnings import warnings_of_losses
from cocktail_serve.weighting.softmax import softmax_weights


def options(**changes: Any) -> CocktailOptions:
    values = {"weighting": "softmax", "temperature": 5.0, "peers": ("base", "one", "two"), "num_examples": 3}
    return CocktailOptions(name="x", pool="p", pool_fingerprint="f", **(values | changes))


LOSSES = {"base": 0.90, "one": 0.88, "two": 0.92}
"""Of which tau 5 makes .333, .335 and .332."""


def test_level_weights_are_told_with_their_reason() -> None:
    weights = softmax_weights(LOSSES, temperature=5.0)
    (warning,) = warnings_of_losses(options(), LOSSES, {}, 0.5)
    share = max(weights.values()) / min(weights.values()) - 1
    assert warning == (
        f"the weights are level: losses that differ by 0.04 nats at temperature 5 differ by {share:.1%} of a weight; "
        "try a lower temperature, or weighting search"
    )
    assert warnings_of_losses(options(weighting="paper"), LOSSES, {}, 0.5) == (warning,)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.2},
        {"weighting": "uniform", "temperature": None},
        {"weighting": "search", "temperature": None},
        {"weighting": "blackbox", "temperature": None},
        {"peers": ("base",)},
    ],
    ids=str,
)
def test_what_tells_models_apart_or_was_asked_for_is_not_told(changes: dict[str, Any]) -> None:
    assert warnings_of_losses(options(**changes), LOSSES, {}, 0.5) == ()


def test_models_that_lose_the_same_weigh_the_same() -> None:
    assert warnings_of_losses(options(), dict.fromkeys(LOSSES, 0.9), {}, 0.5) == ()


@pytest.mark.parametrize(("spread", "is_level"), [(0.47, True), (0.48, False)])
def test_weights_are_level_up_to_a_tenth(spread: float, is_level: bool) -> None:
    losses = {"base": 1.0, "one": 1.0 + spread, "two": 1.2, "own": 9.0}
    weights = softmax_weights({name: losses[name] for name in ("base", "one", "two")}, temperature=5.0)
    assert (max(weights.values()) / min(weights.values()) < 1.1) == is_level
    told = warnings_of_losses(options(target="own", alpha=0.5), losses, {}, 0.5)
    assert any("level" in warning for warning in told) == is_level, "the target is not weighed by its loss"


def test_a_mixture_that_loses_more_than_its_best_model_is_told_beside_it() -> None:
    level, worse = warnings_of_losses(options(), LOSSES, {}, 1.0)
    assert level.startswith("the weights are level")
    assert worse.startswith("the mixture's loss 1 on the examples is above that of 'one' alone, 0.88")
