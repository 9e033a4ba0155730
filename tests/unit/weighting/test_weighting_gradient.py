"""Learned coefficients: where they should go, where they should not, and the same each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from cocktail_serve.weighting.candidates import Candidate, Trial, chosen_of, mean
from cocktail_serve.weighting.gradient import BOUND, DIFFERENCE, MEASURED_EVERY, STEPS, _corrected, at_bounds, gradient
from cocktail_serve.weighting.search import deal
from cocktail_serve.weighting.softmax import weights_from_losses

Score = Callable[[Mapping[str, float], int], float]
"""Loss of one example under a mixture."""

NAMES = ("base", "a", "b", "c")


class Planted:
    """A pool whose parameters are vectors: the loss of an example is the squared distance from where it would be best.

    Args:
        experts: by name, what each adds to the base, which is 0.
        task: what would have to be added for the least loss.
        spread: how far the examples' own optima lie about it.
    """

    def __init__(
        self,
        experts: Mapping[str, Sequence[float]],
        task: Sequence[float],
        *,
        spread: float = 0.1,
        num_examples: int = 5,
        seed: int = 0,
    ) -> None:
        self.experts = {name: np.array(added) for name, added in experts.items()}
        self.task = np.array(task)
        noise = np.random.default_rng(seed).normal(0.0, spread, (num_examples, len(task)))
        self._bests = self.task + noise - noise.mean(axis=0)
        self.losses = {
            name: [self.score({name: 1.0}, row) for row in range(num_examples)] for name in ("base", *experts)
        }

    def score(self, weights: Mapping[str, float], row: int) -> float:
        return 1.0 + float(np.sum((self._added(weights) - self._bests[row]) ** 2))

    def true_loss(self, weights: Mapping[str, float]) -> float:
        """On the task itself, of which the examples are a few."""
        return 1.0 + float(np.sum((self._added(weights) - self.task) ** 2))

    def _added(self, weights: Mapping[str, float]) -> np.ndarray:
        added: np.ndarray = sum(
            (weights.get(name, 0.0) * vector for name, vector in self.experts.items()), np.zeros_like(self.task)
        )
        return added


def run(
    losses: Mapping[str, Sequence[float]], score: Score, *, temperature: float = 0.2, seed: int = 0
) -> tuple[tuple[Candidate, ...], list[Trial]]:
    asked: list[Trial] = []
    trials = gradient(losses, temperature=temperature, seed=seed)
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


def noisy_task(seed: int) -> Planted:
    """Each expert is the task and something else beside it."""
    rng = np.random.default_rng(seed)
    task = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    return Planted({name: task + rng.normal(0.0, 0.5, 8) for name in NAMES[1:]}, task.tolist(), seed=seed)


@pytest.mark.parametrize("seed", range(5))
def test_an_expert_that_is_the_task_plus_noise_beats_the_softmax(seed: int) -> None:
    pool = noisy_task(seed)
    candidates, _ = run(pool.losses, pool.score)
    start = weights_from_losses(pool.losses, rows=None, temperature=0.2, target=None, alpha=None)
    assert candidates[2].merging_weights == start
    learned = chosen(candidates).merging_weights
    assert pool.true_loss(learned) < pool.true_loss(start)
    assert pool.true_loss(learned) < min(pool.true_loss({name: 1.0}) for name in NAMES)


def test_coefficients_leave_the_simplex_where_that_is_better() -> None:
    pool = Planted({"a": [0.5, 0.0], "b": [0.0, 0.5]}, [0.5, 0.5], spread=0.02)
    learned = chosen(run(pool.losses, pool.score)[0]).merging_weights
    assert learned["a"] + learned["b"] > 1.5
    assert learned["base"] == pytest.approx(1.0 - learned["a"] - learned["b"], abs=1e-12)
    opposed = Planted({"a": [1.0, 0.0], "b": [0.0, 1.0]}, [1.0, -0.4], spread=0.02)
    assert chosen(run(opposed.losses, opposed.score)[0]).merging_weights["b"] < -0.1


@pytest.mark.parametrize("seed", range(5))
def test_a_task_on_which_every_expert_hurts_gets_the_base(seed: int) -> None:
    """Each expert adds what no example wants, and taking it away is no better."""
    hurting = np.eye(6)[:3]
    pool = Planted(dict(zip(NAMES[1:], hurting.tolist(), strict=True)), [0.0] * 6, spread=0.05, seed=seed)
    candidates, _ = run(pool.losses, pool.score)
    assert chosen(candidates).merging_weights == {"base": 1.0, "a": 0.0, "b": 0.0, "c": 0.0}
    assert chosen(candidates) is candidates[0]
    assert candidates[0].loss == mean(pool.losses["base"])


def test_where_one_expert_is_the_task_it_is_taken_alone() -> None:
    pool = Planted({"a": [1.0, 0.0, 0.0], "b": [0.0, 1.0, 0.0], "c": [0.0, 0.0, 1.0]}, [1.0, 0.0, 0.0], spread=0.0)
    candidates, _ = run(pool.losses, pool.score)
    assert chosen(candidates) is candidates[1]
    assert candidates[1].merging_weights == {"base": 0.0, "a": 1.0, "b": 0.0, "c": 0.0}


def test_the_same_request_gives_the_same_weights_bit_for_bit_and_the_seed_deals() -> None:
    pool = noisy_task(1)
    assert run(pool.losses, pool.score) == run(pool.losses, pool.score)
    seven = Planted(
        {name: vector.tolist() for name, vector in pool.experts.items()}, [1.0] * 2 + [0.0] * 6, num_examples=7
    )
    held_out = {tuple(trial.rows for trial in run(seven.losses, seven.score, seed=seed)[1][:5]) for seed in range(3)}
    assert held_out == {deal(7, seed=seed) for seed in range(3)}


def test_rounding_of_losses_does_not_reach_the_recipe() -> None:
    """A batch of other rows rounds otherwise: the coefficients are multiples of a 1024th, and stay what they were."""
    pool = noisy_task(2)
    exact = chosen(run(pool.losses, pool.score)[0]).merging_weights
    rounded = chosen(run(pool.losses, lambda weights, row: float(np.float32(pool.score(weights, row))))[0])
    assert rounded.merging_weights == exact
    assert all((weight * 1024).is_integer() for weight in exact.values())
    assert sum(exact.values()) == 1.0


def test_every_candidate_is_judged_by_examples_that_it_did_not_see() -> None:
    """By hand: the folds' best experts and softmax weights, and of the steps the path without each fold."""
    pool = noisy_task(3)
    candidates, asked = run(pool.losses, pool.score)
    folds = deal(5, seed=0)
    of_best, of_start = {}, {}
    for (row,) in folds:
        rest = [other for other in range(5) if other != row]
        best = min(NAMES[1:], key=lambda name: mean([pool.losses[name][other] for other in rest]))
        of_best[row] = pool.losses[best][row]
        of_start[row] = pool.score(
            weights_from_losses(pool.losses, rows=rest, temperature=0.2, target=None, alpha=None), row
        )
    assert candidates[1].loss == pytest.approx(mean(list(of_best.values())))
    assert candidates[2].loss == pytest.approx(mean(list(of_start.values())))
    by_step = [trial for trial in asked if len(trial.rows) == 1]
    assert len(by_step) == 5 * (STEPS + 1)
    for step, candidate in enumerate(candidates[2:]):
        held_out = [pool.score(trial.shares, trial.rows[0]) for trial in by_step[5 * step : 5 * step + 5]]
        assert candidate.loss == pytest.approx(mean(held_out))
    taken = chosen(candidates)
    assert taken.loss == min(candidate.loss for candidate in candidates if candidate.loss is not None)
    assert mean(taken.held_out) == pytest.approx(taken.loss)
    assert all(candidate.held_out == () for candidate in candidates if candidate is not taken)


def test_an_example_that_is_held_out_does_not_move_its_own_path() -> None:
    """Whatever the slopes of one example are, the path that is judged by it goes the same way."""
    pool = noisy_task(4)
    (odd,) = deal(5, seed=0)[0]

    def steep(weights: Mapping[str, float], row: int) -> float:
        return pool.score(weights, row) + (-30.0 * weights["a"] if row == odd else 0.0)

    # the losses of the models are the same in both, so that the paths of all begin alike; one step is compared, since
    # from the second on slopes are measured where the path of all examples stands
    asked = [run(pool.losses, score)[1] for score in (pool.score, steep)]
    second = [[trial for trial in trials if trial.rows == (odd,)][1] for trials in asked]
    assert second[0].shares == second[1].shares
    others = [[trial for trial in trials if len(trial.rows) == 1 and trial.rows != (odd,)][4] for trials in asked]
    assert others[0].shares != others[1].shares


def test_what_can_be_asked_at_once_is_known_ahead() -> None:
    pool = noisy_task(0)
    _, asked = run(pool.losses, pool.score)
    # five held-out mixtures, the path itself, and at every second step one probe for each expert; at the last none
    assert len(asked) == STEPS * (5 + 1) + STEPS // MEASURED_EVERY * 3 + 5
    assert [len(trial.ahead) for trial in asked[:10]] == [8, 7, 6, 5, 4, 3, 2, 1, 0, 5]
    assert asked[0].ahead[0] == replace(asked[1], ahead=())
    progress = [trial.progress for trial in asked]
    assert progress == sorted(progress)
    assert 0.0 == progress[0] <= progress[-1] < 1.0


@pytest.mark.parametrize("seed", range(5))
def test_slopes_that_are_corrected_lead_nearly_as_far_as_slopes_that_are_measured(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = noisy_task(seed)

    def reached() -> tuple[float, float]:
        start, *_, end = run(pool.losses, pool.score)[0][2:]
        return tuple(mean([pool.score(of.merging_weights, row) for row in range(5)]) for of in (start, end))

    start, corrected = reached()
    monkeypatch.setattr("cocktail_serve.weighting.gradient.MEASURED_EVERY", 1)
    _, measured = reached()
    monkeypatch.setattr("cocktail_serve.weighting.gradient.MEASURED_EVERY", STEPS)
    _, measured_once = reached()
    assert start - corrected > 0.7 * (start - measured) > 0.0
    assert measured_once > corrected or start - measured < 0.1


def test_differences_point_forwards_and_backwards_in_turn() -> None:
    _, asked = run(noisy_task(0).losses, noisy_task(0).score)
    of_all = [trial.shares for trial in asked if len(trial.rows) == 5]
    # the path, three probes, the path alone; then the same the other way
    for difference, (here, *moved) in ((DIFFERENCE, of_all[:4]), (-DIFFERENCE, of_all[5:9])):
        probed = [there[name] - here[name] for name, there in zip(NAMES[1:], moved, strict=True)]
        assert probed == pytest.approx([difference] * 3)


def test_a_correction_explains_the_step_and_leaves_what_is_beside_it() -> None:
    (corrected,) = _corrected([{"a": 1.0, "b": 2.0}], {"a": 0.0, "b": 0.0}, [5.0], {"a": 0.5, "b": 0.0}, [5.25])
    assert corrected == {"a": 0.5, "b": 2.0}
    stood = _corrected([{"a": 1.0}], {"a": 0.5}, [5.0], {"a": 0.5}, [5.0])
    assert stood == [{"a": 1.0}]


def test_coefficients_stay_in_bounds_and_those_at_them_are_named() -> None:
    pool = Planted({"a": [0.1, 0.0], "b": [0.0, 0.1]}, [1.0, -1.0], spread=0.01)
    candidates, asked = run(pool.losses, pool.score)
    assert all(abs(trial.shares[name]) <= BOUND for trial in asked for name in ("a", "b"))
    far = {"base": 1.0, "a": BOUND, "b": -BOUND, "c": 1.4}
    assert at_bounds(far) == ["a", "b"]
    assert at_bounds({"base": 2.0, "a": 0.5}) == []
    assert chosen(candidates).merging_weights["a"] > 0.9


def test_an_expert_that_is_the_base_keeps_out_of_the_steps() -> None:
    pool = Planted({"a": [0.5, 0.0], "same": [0.0, 0.0]}, [1.0, 0.0])
    candidates, asked = run(pool.losses, pool.score)
    assert {candidate.merging_weights["same"] for candidate in candidates[3:]} == {0.0}
    assert len(asked) == STEPS * (5 + 1) + STEPS // MEASURED_EVERY + 5
    alone = Planted({"same": [0.0, 0.0]}, [1.0, 0.0])
    candidates, asked = run(alone.losses, alone.score)
    assert len(candidates) == 3, "there is nowhere to go"
    assert len(asked) == 5
    assert chosen(candidates) is candidates[0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_whose_losses_are_not_finite_is_the_last(bad: float) -> None:
    pool = noisy_task(0)
    limit = 0.45

    def overflowing(weights: Mapping[str, float], row: int) -> float:
        return bad if max(weights[name] for name in NAMES[1:]) > limit else pool.score(weights, row)

    candidates, _ = run(pool.losses, overflowing, temperature=5.0)
    taken = chosen(candidates)
    assert len(candidates) < STEPS + 3
    assert taken.loss is not None
    assert math.isfinite(taken.loss)
    hopeless, _ = run(pool.losses, lambda weights, row: bad)
    assert [candidate.loss for candidate in hopeless[2:]] == [None]
    assert chosen(hopeless).loss == min(candidate.loss for candidate in hopeless[:2] if candidate.loss is not None)


def test_one_example_cannot_be_held_out_so_the_start_is_taken() -> None:
    losses = {name: of_model[:1] for name, of_model in noisy_task(0).losses.items()}
    with pytest.raises(StopIteration) as ended:
        next(gradient(losses, temperature=0.2, seed=0))
    candidates = ended.value.value
    taken = chosen_of(candidates)
    assert taken is not None
    assert taken.merging_weights == weights_from_losses(losses, rows=None, temperature=0.2, target=None, alpha=None)
    assert [candidate.loss for candidate in candidates] == [None, None, None]


@pytest.mark.parametrize("num_examples", [2, 3, 4])
def test_fewer_examples_than_five_are_each_a_fold(num_examples: int) -> None:
    pool = Planted({"a": [0.5, 0.1], "b": [0.1, 0.5]}, [0.5, 0.5], num_examples=num_examples)
    candidates, asked = run(pool.losses, pool.score)
    assert len([trial for trial in asked if len(trial.rows) == 1]) == num_examples * (STEPS + 1)
    assert pool.true_loss(chosen(candidates).merging_weights) < pool.true_loss(candidates[2].merging_weights)


def test_a_pool_of_its_base_alone_has_nothing_to_learn() -> None:
    with pytest.raises(StopIteration) as ended:
        next(gradient({"base": [2.0, 4.0]}, temperature=0.2, seed=0))
    assert ended.value.value == (Candidate({"base": 1.0}, loss=3.0, chosen=True),)
