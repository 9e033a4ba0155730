"""tau and alpha are those of a search written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from cocktail_serve.weighting.candidates import Candidate, Trial, Trials, chosen_of
from cocktail_serve.weighting.search import deal, search

Score = Callable[[Mapping[str, float], int], float]
"""Loss of one example under a mixture."""


def run(trials: Trials[tuple[Candidate, ...]], score: Score) -> tuple[tuple[Candidate, ...], list[Trial]]:
    asked: list[Trial] = []
    try:
        trial = next(trials)
        while True:
            asked.append(trial)
            trial = trials.send([score(trial.shares, row) for row in trial.rows])
    except StopIteration as ended:
        return ended.value, asked


def chosen(candidates: Sequence[Candidate]) -> Candidate:
    (only,) = [candidate for candidate in candidates if candidate.chosen]
    return only


def bowl(best: Mapping[str, float]) -> Score:
    """Loss grows with the squared distance from the best weights."""
    return lambda weights, row: 1.0 + sum((weights.get(name, 0.0) - value) ** 2 for name, value in best.items())


LOSSES = {
    "base": [2.0, 2.2, 1.9, 2.4, 2.1, 2.0],
    "a": [1.5, 1.9, 1.2, 1.8, 1.6, 1.1],
    "b": [2.5, 2.1, 2.9, 2.2, 2.6, 2.0],
}


def softmax(losses: Mapping[str, Sequence[float]], rows: Sequence[int], tau: float) -> dict[str, float]:
    means = np.array([[of_model[row] for row in rows] for of_model in losses.values()], dtype=np.float64).mean(axis=1)
    powers = np.exp(-(means - means.min()) / tau)
    return dict(zip(losses, powers / powers.sum(), strict=True))


@pytest.mark.parametrize(
    ("best", "tau"), [({"a": 1.0, "base": 0.0, "b": 0.0}, 0.05), ({"a": 0.45, "base": 0.29, "b": 0.26}, 2.0)]
)
def test_it_finds_the_temperature_that_a_search_by_hand_finds(best: dict[str, float], tau: float) -> None:
    score = bowl(best)
    candidates, asked = run(search(LOSSES, target=None, alpha=None, seed=3), score)
    folds = deal(6, seed=3)
    by_hand = {}
    for candidate in candidates:
        held_out = []
        for fold in folds:
            rest = [row for row in range(6) if row not in fold]
            weights = softmax(LOSSES, rest, candidate.temperature)
            held_out += [score(weights, row) for row in fold]
        by_hand[candidate.temperature] = float(np.mean(held_out))
        assert candidate.loss == pytest.approx(by_hand[candidate.temperature])
        assert candidate.merging_weights == pytest.approx(softmax(LOSSES, range(6), candidate.temperature))
    winner = chosen(candidates)
    assert winner.temperature == min(by_hand, key=by_hand.__getitem__) == tau
    assert len(asked) == len(candidates) * 5 == 35
    assert {candidate.alpha for candidate in candidates} == {None}, "there is no target to have a share"
    assert [trial.progress for trial in asked] == pytest.approx([number / 35 for number in range(35)])


def test_no_example_is_judged_by_a_mixture_that_it_was_weighed_into() -> None:
    losses = {"base": [1.0] * 4, "a": [1.0] * 4}
    for odd in range(4):
        # the one example that tells the models apart moves the weights of every fold but its own
        told = {**losses, "a": [0.0 if row == odd else 1.0 for row in range(4)]}
        _, asked = run(search(told, target=None, alpha=None, seed=0), lambda weights, row: weights["a"])
        for trial in asked:
            assert (trial.shares["a"] == 0.5) == (odd in trial.rows)


def test_of_equals_the_nearest_to_the_mean_wins() -> None:
    candidates, _ = run(search(LOSSES, target=None, alpha=None, seed=0), lambda weights, row: 1.0)
    assert (chosen(candidates).temperature, chosen(candidates).loss) == (5.0, 1.0)


def test_the_chosen_candidate_is_found() -> None:
    one, other = Candidate({"base": 1.0}), Candidate({"a": 1.0}, chosen=True)
    assert chosen_of([one, other]) is other
    assert chosen_of([one]) is chosen_of([]) is None


def test_a_target_brings_alpha_into_the_grid() -> None:
    best = {"t": 0.7, "a": 0.3, "base": 0.0, "b": 0.0}
    candidates, asked = run(search(LOSSES, target="t", alpha=None, seed=0), bowl(best))
    winner = chosen(candidates)
    assert (winner.temperature, winner.alpha) == (0.05, 0.7)
    assert winner.merging_weights["t"] == 0.7
    assert {(c.temperature, c.alpha) for c in candidates} == {
        (tau, alpha) for tau in (5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05) for alpha in (0.5, 0.3, 0.7)
    }
    assert len(asked) == 105


def test_an_alpha_that_is_given_stays() -> None:
    candidates, asked = run(search(LOSSES, target="t", alpha=0.25, seed=0), bowl({"t": 1.0}))
    assert {candidate.alpha for candidate in candidates} == {0.25}
    assert {trial.shares["t"] for trial in asked} == {0.25}
    _, asked = run(search(LOSSES, target="t", alpha=0.0, seed=0), bowl({"t": 1.0}))
    assert {trial.shares["t"] for trial in asked} == {0.0}


def test_settings_of_the_same_weights_are_tried_once() -> None:
    far = {"base": [0.0, 0.0], "a": [1000.0, 1000.0]}
    candidates, asked = run(search(far, target=None, alpha=None, seed=0), lambda weights, row: 1.0)
    assert [candidate.temperature for candidate in candidates] == [5.0]
    assert len(asked) == 2, "leave one out"


def test_one_example_leaves_nothing_to_hold_out() -> None:
    candidates, asked = run(
        search({"base": [2.0], "a": [1.0]}, target="t", alpha=None, seed=0), lambda weights, row: 0.0
    )
    winner = chosen(candidates)
    assert (winner.temperature, winner.alpha, winner.loss) == (5.0, 0.5, None)
    assert winner.merging_weights == pytest.approx(
        {"base": 0.5 / (1 + math.exp(0.2)), "a": 0.5 / (1 + math.exp(-0.2)), "t": 0.5}
    )
    assert asked == []


def test_a_mixture_that_overflows_is_not_chosen() -> None:
    candidates, _ = run(
        search(LOSSES, target=None, alpha=None, seed=0), lambda weights, row: math.inf if weights["a"] < 0.9 else 7.0
    )
    assert chosen(candidates).merging_weights["a"] > 0.9
    assert candidates[0].loss is None


@pytest.mark.parametrize("num_examples", [2, 3, 5, 7, 100])
def test_every_example_is_in_one_fold(num_examples: int) -> None:
    folds = deal(num_examples, seed=11)
    assert len(folds) == min(5, num_examples)
    assert sorted(row for fold in folds for row in fold) == list(range(num_examples))
    assert max(map(len, folds)) - min(map(len, folds)) <= 1
    assert deal(num_examples, seed=11) == folds
    assert num_examples < 7 or deal(num_examples, seed=12) != folds
