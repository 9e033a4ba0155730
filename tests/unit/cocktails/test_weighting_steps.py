"""Losses become weights by Eq. 2, and join the target by Eq. 1 and 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from cocktail_serve.cocktails.cocktail import WeightingResult
from cocktail_serve.cocktails.options import CocktailOptions
from cocktail_serve.cocktails.weighting_steps import advance
from cocktail_serve.cocktails.weighting_steps import weighting_steps as weigh_in_steps
from cocktail_serve.weighting.candidates import Candidate

LOSSES = {"base": 2.0, "nq": 1.0, "squad": 3.0}


def options(**chosen: Any) -> CocktailOptions:
    return CocktailOptions(name="films", pool="flan", pool_fingerprint="fp", **chosen)


def weighting_steps(options: CocktailOptions, losses: Mapping[str, float]) -> WeightingResult:
    """Of two examples with these mean losses, by a weighting that tries no mixture."""
    weighing = advance(weigh_in_steps(options, {name: [loss - 0.5, loss + 0.5] for name, loss in losses.items()}), None)
    assert isinstance(weighing, WeightingResult)
    return weighing


def test_softmax_over_base_and_peers() -> None:
    weighing = weighting_steps(options(peers=("base", "nq", "squad"), weighting="softmax", temperature=2.0), LOSSES)
    total = sum(math.exp(-loss / 2.0) for loss in LOSSES.values())
    assert weighing.merging_weights == pytest.approx({n: math.exp(-loss / 2.0) / total for n, loss in LOSSES.items()})
    assert weighing.losses == LOSSES
    assert weighing.entropy == pytest.approx(-sum(w * math.log(w) for w in weighing.merging_weights.values()))


def test_the_target_takes_alpha_and_its_loss_decides_nothing() -> None:
    chosen = options(peers=("base", "nq"), weighting="softmax", temperature=1.0, target="squad", alpha=0.25)
    weights = weighting_steps(chosen, LOSSES).merging_weights
    assert weights["squad"] == 0.25
    assert weights["nq"] / weights["base"] == pytest.approx(math.e)
    assert weighting_steps(chosen, {**LOSSES, "squad": 9.0}).merging_weights == weights


def test_experts_beyond_the_limit_weigh_nothing_and_are_still_reported() -> None:
    chosen = options(peers=("base", "nq", "squad"), weighting="softmax", temperature=2.0, max_experts=1)
    weighing = weighting_steps(chosen, LOSSES)
    assert weighing.merging_weights["squad"] == 0.0
    assert weighing.merging_weights["nq"] / weighing.merging_weights["base"] == pytest.approx(math.exp(0.5))
    assert math.fsum(weighing.merging_weights.values()) == pytest.approx(1.0)
    assert weighing.losses == LOSSES


def test_uniform_reports_losses_but_does_not_read_them() -> None:
    weighing = weighting_steps(options(peers=("base", "nq"), weighting="uniform"), LOSSES)
    assert weighing.merging_weights == {"base": 0.5, "nq": 0.5}
    assert weighing.losses == {"base": 2.0, "nq": 1.0}


def test_a_target_alone_is_mixed_with_the_base() -> None:
    weighing = weighting_steps(options(target="nq", alpha=1.0), {})
    assert weighing.merging_weights == {"base": 0.0, "nq": 1.0}
    assert (weighing.losses, weighing.entropy) == ({}, 0.0)


def test_weights_by_hand_are_taken_as_they_are() -> None:
    weighing = weighting_steps(options(merging_weights={"base": -0.5, "nq": 1.5}), {})
    assert weighing.merging_weights == {"base": -0.5, "nq": 1.5}
    assert weighing.entropy is None, "a negative weight has no entropy"


@pytest.mark.parametrize(
    ("by_hand", "entropy"),
    [
        ({"base": 0.25, "nq": 0.75}, -0.25 * math.log(0.25) - 0.75 * math.log(0.75)),
        ({"base": 0.0, "nq": 0.5, "squad": 0.5}, math.log(2.0)),
        ({"nq": 1.0}, 0.0),
    ],
)
def test_weights_by_hand_that_are_shares_have_an_entropy(by_hand: dict[str, float], entropy: float) -> None:
    assert weighting_steps(options(merging_weights=by_hand), {}).entropy == pytest.approx(entropy)


def test_weights_by_hand_that_scale_task_vectors_are_no_shares() -> None:
    weighing = weighting_steps(options(merging_weights={"nq": 0.25, "squad": 0.75}, method="ties"), {})
    assert weighing.merging_weights == {"base": 1.0, "nq": 0.25, "squad": 0.75}
    assert weighing.entropy is None


def test_shares_of_which_one_is_0_have_an_entropy() -> None:
    chosen = options(peers=("base", "nq"), weighting="uniform", target="squad", alpha=0.0)
    assert weighting_steps(chosen, LOSSES).merging_weights == {"base": 0.5, "nq": 0.5, "squad": 0.0}
    assert weighting_steps(chosen, LOSSES).entropy == pytest.approx(math.log(2.0))


def test_weights_that_follow_from_the_losses_are_the_one_candidate() -> None:
    weighing = weighting_steps(
        options(peers=("base", "nq"), weighting="paper", temperature=5.0, target="squad", alpha=0.5), LOSSES
    )
    assert weighing.candidates == (Candidate(weighing.merging_weights, temperature=5.0, alpha=0.5, chosen=True),)
    assert weighting_steps(options(merging_weights={"nq": 1.0}), {}).candidates == ()


def test_a_search_reports_means_and_what_it_chose() -> None:
    losses = {"base": [2.0, 3.0], "nq": [1.0, 2.0], "squad": [4.0, 6.0]}
    searched = weigh_in_steps(options(peers=("base", "nq"), weighting="search", target="squad", alpha=0.3), losses)
    step = advance(searched, None)
    while not isinstance(step, WeightingResult):
        step = advance(searched, [step.shares["base"] for _ in step.rows])
    assert step.losses == {"base": 2.5, "nq": 1.5, "squad": 5.0}
    assert step.chosen is not None
    assert (step.chosen.temperature, step.chosen.alpha) == (0.1, 0.3), "at 0.05 the weights are those of 0.1"
    assert step.merging_weights == step.chosen.merging_weights
