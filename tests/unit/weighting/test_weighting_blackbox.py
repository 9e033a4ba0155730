"""The gradient-free search finds what it should, the same each time, and says what is missing."""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Mapping

import pytest

from cocktail_serve.errors import InvalidMixError
from cocktail_serve.weighting.blackbox import blackbox
from cocktail_serve.weighting.candidates import Candidate, Trial

BEST = {"a": 1.2, "b": -0.4}
LOSSES = {"base": [2.6, 2.6], "a": [1.2, 1.2], "b": [4.4, 4.4]}


def bowl(weights: Mapping[str, float]) -> float:
    """1 nat at the best weights, more by the squared distance: `LOSSES` at the models themselves."""
    return 1.0 + sum((weights[name] - value) ** 2 for name, value in BEST.items())


def run(
    seed: int, budget: int = 40, *, score: Callable[[Mapping[str, float]], float] = bowl
) -> tuple[tuple[Candidate, ...], list[Trial]]:
    asked: list[Trial] = []
    trials = blackbox(LOSSES, budget=budget, seed=seed)
    try:
        trial = next(trials)
        while True:
            asked.append(trial)
            trial = trials.send([score(trial.shares)] * 2)
    except StopIteration as ended:
        return ended.value, asked


def objective(weights: Mapping[str, float]) -> float:
    return bowl(weights) + 0.05 * (abs(weights["a"]) + abs(weights["b"])) / 2


def chosen(candidates: tuple[Candidate, ...]) -> Candidate:
    (only,) = [candidate for candidate in candidates if candidate.chosen]
    return only


def test_it_begins_at_the_base_and_ends_far_below_it() -> None:
    candidates, asked = run(seed=0)
    assert len(candidates) == 40
    assert candidates[0].merging_weights == {"base": 1.0, "a": 0.0, "b": 0.0}
    assert candidates[0].loss == 2.6
    best = chosen(candidates)
    assert objective(best.merging_weights) == min(objective(candidate.merging_weights) for candidate in candidates)
    # three quarters of the way from the base, whose objective is 2.6, to the optimum near 1.04
    assert objective(best.merging_weights) < 1.43
    assert len(asked) <= 39
    assert {trial.rows for trial in asked} == {(0, 1)}
    assert [trial.progress for trial in asked[:3]] == [2 / 40, 3 / 40, 4 / 40], "the base was tried twice before"


def test_coefficients_stay_in_bounds_and_the_base_takes_the_rest() -> None:
    for candidate in run(seed=1)[0]:
        assert all(abs(candidate.merging_weights[name]) <= 1.5 for name in ("a", "b"))
        assert sum(candidate.merging_weights.values()) == pytest.approx(1.0, abs=1e-12)
        assert candidate.loss == pytest.approx(bowl(candidate.merging_weights))


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_mixture_that_overflows_has_no_loss_and_is_not_chosen(loss: float) -> None:
    candidates, asked = run(seed=0, budget=5, score=lambda weights: loss)
    assert len(asked) == 3, "the optimizer begins with the base by itself too, whose loss is known"
    assert [candidate.loss for candidate in candidates] == [2.6, 2.6, None, None, None]
    assert [candidate.chosen for candidate in candidates] == [True, False, False, False, False]


def test_it_is_never_worse_than_its_start() -> None:
    for seed in range(5):
        candidates, _ = run(seed=seed, budget=3)
        assert objective(chosen(candidates).merging_weights) <= objective(candidates[0].merging_weights)


def test_a_pool_of_its_base_alone_has_nothing_to_search() -> None:
    with pytest.raises(StopIteration) as ended:
        next(blackbox({"base": [2.0, 4.0]}, budget=40, seed=0))
    assert ended.value.value == (Candidate({"base": 1.0}, loss=3.0, chosen=True),)


def test_the_seed_decides_the_candidates_and_counts_up_to_32_bits() -> None:
    """With a large budget: for a small one nevergrad takes an optimizer that draws nothing."""

    def first_asked(seed: int) -> list[Mapping[str, float]]:
        trials = blackbox(LOSSES, budget=400, seed=seed)
        asked = [next(trials).shares]
        while len(asked) < 6:
            asked.append(trials.send([bowl(asked[-1])] * 2).shares)
        return asked

    seeds = (0, 1, 2**32 - 1)
    drawn = [first_asked(seed) for seed in seeds]
    assert all(one != another for one, another in itertools.combinations(drawn, 2))
    assert [first_asked(seed + 2**32) for seed in seeds] == [first_asked(seed) for seed in seeds] == drawn


def test_of_warnings_only_what_nevergrad_sets_right_is_silenced() -> None:
    run(seed=0, budget=2)
    warnings.warn("COBYLA: Invalid option", UserWarning, stacklevel=1)
    for message, category in (("COBYLA: Invalid option", RuntimeWarning), ("something else", UserWarning)):
        with pytest.raises(category, match=message):
            warnings.warn(message, category, stacklevel=1)


def test_without_nevergrad_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidMixError) as caught:
        next(blackbox(LOSSES, budget=40, seed=0))
    assert str(caught.value) == (
        "weighting 'blackbox' needs the package nevergrad, which is not installed here; "
        "install it with: pip install 'cocktail-serve[blackbox]'"
    )
    assert caught.value.param == "weighting"
