"""Learns the coefficients by gradient descent that begins at the softmax weights and goes as far as folds allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from cocktail_serve.pool import BASE
from cocktail_serve.weighting.candidates import Candidate, Trial, Trials, foreseen, mean
from cocktail_serve.weighting.search import deal
from cocktail_serve.weighting.softmax import weights_from_losses

STEPS = 12
"""Steps at most; each is a candidate."""

LEARNING_RATE = 0.06
"""How far a coefficient goes in a step, about: Adam's steps are of like size whatever the slope."""

BOUND = 1.5
"""No coefficient is larger, nor below its negative, as of `blackbox`."""

L2 = 0.05
"""Nats that a squared distance of 1 from the start costs."""

DIFFERENCE = 0.1
"""How far a coefficient is moved to see what the losses do. Engines compute in bfloat16, whose rounding moves a loss by
some thousandths of a nat, so it is no smaller."""

MEASURED_EVERY = 2
"""Steps from one measurement of the slopes to the next. In between they follow from the losses at each step (Broyden):
hardly a higher loss for half of the rows (docs/adr/0022-learned-coefficients.md)."""

GRID = 1024
"""Coefficients are multiples of a 1024th: what rounding does to losses seldom reaches the recipe, sums are exact."""

_DECAYS = (0.9, 0.999)
_TINY = 1e-8


def gradient(losses: Mapping[str, Sequence[float]], *, temperature: float, seed: int) -> Trials[tuple[Candidate, ...]]:
    """Learns `c` of `theta = theta_base + sum_i c_i (theta_i - theta_base)` over experts and target.

    The coefficients begin at the softmax weights (Eq. 2 of LM-Cocktail, arXiv 2311.13534) and follow Adam (arXiv
    1412.6980) on the mean loss of the examples plus `L2 * sum_i (c_i - start_i)^2`, each within +-`BOUND`. So they need
    not sum to 1, and may be negative; the base takes the rest.

    How many steps are taken is chosen by what mixtures lose on examples they were not learned from. The examples are
    dealt into at most five folds, and for each fold a path of its own is followed from the softmax weights of the
    others, by the slopes of the others. Slopes are measured once for all paths, where the path of all examples stands:
    the paths are near each other, and so a step costs as much as one of a single path. They are measured at one step of
    `MEASURED_EVERY`, and in between corrected along the step by the losses that it led to (Broyden 1965, of each
    example). The base, the expert that is best alone and the start are candidates as well, judged by the same folds; of
    equals the first is chosen.

    An expert that loses exactly what the base loses on every example has no slope, and keeps out of the steps. A step
    whose losses are not finite is the last. One example leaves nothing to hold out: no step is taken, and the start is
    chosen.

    Args:
        losses: loss (nats) of each example by model, the base among them.
        temperature: tau of the softmax that it begins at.
        seed: of the dealing.

    Returns:
        Generator that returns the candidates, judged by mean held-out loss: base, best expert, start, and the path of
        all examples step by step.
    """
    names = [name for name in losses if name != BASE]
    rows = range(len(losses[BASE]))
    if not names:
        return (Candidate({BASE: 1.0}, loss=mean(losses[BASE]), chosen=True),)

    def softmax(of: Sequence[int]) -> dict[str, float]:
        return weights_from_losses(losses, rows=of, temperature=temperature, target=None, alpha=None)

    def best_expert(of: Sequence[int]) -> str:
        return min(names, key=lambda name: mean([losses[name][row] for row in of]))

    folds = deal(len(rows), seed=seed)
    base = Candidate(_one_hot(names, BASE))
    best = Candidate(_one_hot(names, best_expert(rows)))
    start = Candidate(softmax(rows), temperature)
    if not folds:
        return (base, best, replace(start, chosen=True))
    others = [[row for row in rows if row not in fold] for fold in folds]
    of_best = {row: losses[best_expert(rest)][row] for fold, rest in zip(folds, others, strict=True) for row in fold}
    candidates = [_judged(base, losses[BASE]), _judged(best, [of_best[row] for row in rows])]

    moving = [name for name in names if list(losses[name]) != list(losses[BASE])]
    path = Descent.beginning_at(softmax(rows), moving)
    fold_paths = [Descent.beginning_at(softmax(rest), moving) for rest in others]
    reached, held_out_by = start, [softmax(rest) for rest in others]
    slopes: list[dict[str, float]] = []
    before: tuple[dict[str, float], Sequence[float]] = ({}, ())
    for step in range(STEPS + 1):
        held_out = [Trial(weights, fold, 0.0) for weights, fold in zip(held_out_by, folds, strict=True)]
        # forwards and backwards in turn: what either is off by, the descent's memory evens out
        difference = DIFFERENCE if step // MEASURED_EVERY % 2 == 0 else -DIFFERENCE
        probes = _probes(names, path, rows, difference)[: None if step % MEASURED_EVERY == 0 else 1]
        if not moving or step == STEPS:
            probes = []
        answers = yield from _ask([*held_out, *probes], begun=step / (STEPS + 1), share=1 / (STEPS + 1))
        by_row = dict(zip(chain(*folds), chain(*answers[: len(folds)]), strict=True))
        candidates.append(_judged(reached, [by_row[row] for row in rows]))
        if not probes:
            break
        here, *moved = answers[len(folds) :]
        slopes = (
            _slopes(path, here, moved, difference) if moved else _corrected(slopes, *before, path.coefficients, here)
        )
        before = dict(path.coefficients), here
        if not all(math.isfinite(slope) for of_row in slopes for slope in of_row.values()):
            break
        path.descend(slopes)
        for fold_path, rest in zip(fold_paths, others, strict=True):
            fold_path.descend([slopes[row] for row in rest])
        reached = Candidate(path.weights(names), temperature)
        held_out_by = [fold_path.weights(names) for fold_path in fold_paths]
    chosen = min(range(len(candidates)), key=lambda index: _loss_of(candidates[index]))
    return tuple(
        replace(candidate, chosen=True) if index == chosen else replace(candidate, held_out=())
        for index, candidate in enumerate(candidates)
    )


def at_bounds(merging_weights: Mapping[str, float]) -> list[str]:
    """Names of the models whose coefficient lies at its bound, and would have gone further."""
    return [name for name, weight in merging_weights.items() if name != BASE and abs(weight) >= BOUND]


@dataclass(slots=True)
class Descent:
    """Adam on the coefficients of some experts.

    Attributes:
        start: what they are pulled towards.
        coefficients: where they stand, by name.
    """

    start: Mapping[str, float]
    coefficients: dict[str, float]
    _first: dict[str, float] = field(default_factory=dict)
    _second: dict[str, float] = field(default_factory=dict)
    _num_steps: int = 0

    @classmethod
    def beginning_at(cls, shares: Mapping[str, float], names: Sequence[str]) -> Descent:
        start = {name: shares[name] for name in names}
        return cls(start, dict(start))

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """Merging weights over the base and all experts; those that do not take part weigh 0."""
        of_experts = {name: self.coefficients.get(name, 0.0) for name in names}
        return {BASE: 1.0 - math.fsum(of_experts.values())} | of_experts

    def descend(self, slopes: Sequence[Mapping[str, float]]) -> None:
        """One step.

        Args:
            slopes: of the loss of each example, nats by unit of each coefficient.
        """
        self._num_steps += 1
        for name, value in self.coefficients.items():
            slope = mean([of_row[name] for of_row in slopes]) + 2.0 * L2 * (value - self.start[name])
            first = self._first[name] = _blended(self._first.get(name, 0.0), slope, _DECAYS[0])
            second = self._second[name] = _blended(self._second.get(name, 0.0), slope**2, _DECAYS[1])
            unbiased = [1.0 - decay**self._num_steps for decay in _DECAYS]
            moved = value - LEARNING_RATE * (first / unbiased[0]) / (math.sqrt(second / unbiased[1]) + _TINY)
            self.coefficients[name] = round(min(max(moved, -BOUND), BOUND) * GRID) / GRID


def _probes(names: Sequence[str], path: Descent, rows: Sequence[int], difference: float) -> list[Trial]:
    """Where the path stands, and a little further along each coefficient in turn."""
    here = path.coefficients
    points = [here, *({**here, name: value + _inwards(value, difference)} for name, value in here.items())]
    return [Trial(replace(path, coefficients=point).weights(names), tuple(rows), 0.0) for point in points]


def _slopes(
    path: Descent, here: Sequence[float], moved: Sequence[Sequence[float]], difference: float
) -> list[dict[str, float]]:
    """The slopes of each example's loss, from the losses of `_probes`."""
    along = list(zip(path.coefficients.items(), moved, strict=True))
    return [
        {name: (there[row] - loss) / _inwards(value, difference) for (name, value), there in along}
        for row, loss in enumerate(here)
    ]


def _corrected(
    slopes: Sequence[Mapping[str, float]],
    start: Mapping[str, float],
    losses_before: Sequence[float],
    end: Mapping[str, float],
    losses: Sequence[float],
) -> list[dict[str, float]]:
    """Slopes that are true along a step: the least change to each example's that explains its loss after the step.

    Args:
        slopes: as they were taken to be at the start of the step.
        start: coefficients there, with the losses of each example; `end` and `losses` behind the step.
    """
    step = {name: end[name] - start[name] for name in end}
    length = math.fsum(moved**2 for moved in step.values())
    if length == 0.0:
        return [dict(of_row) for of_row in slopes]
    corrected = []
    for of_row, loss_before, loss in zip(slopes, losses_before, losses, strict=True):
        foreseen_change = math.fsum(of_row[name] * moved for name, moved in step.items())
        missed = (loss - loss_before - foreseen_change) / length
        corrected.append({name: slope + missed * step[name] for name, slope in of_row.items()})
    return corrected


def _inwards(value: float, difference: float) -> float:
    """Turned round where the bound is near."""
    return difference if abs(value + difference) <= BOUND else -difference


def _ask(trials: Sequence[Trial], *, begun: float, share: float) -> Trials[list[Sequence[float]]]:
    """The losses of trials that do not depend on each other.

    Args:
        begun: progress before them.
        share: of all that is to be done.
    """
    timed = [replace(trial, progress=begun + share * index / len(trials)) for index, trial in enumerate(trials)]
    answers: list[Sequence[float]] = []
    for trial in foreseen(timed):
        answers += [(yield trial)]
    return answers


def _judged(candidate: Candidate, held_out: Sequence[float]) -> Candidate:
    is_finite = all(map(math.isfinite, held_out))
    return replace(candidate, loss=mean(held_out) if is_finite else None, held_out=tuple(held_out))


def _loss_of(candidate: Candidate) -> float:
    return math.inf if candidate.loss is None else candidate.loss


def _one_hot(names: Sequence[str], only: str) -> dict[str, float]:
    return {name: float(name == only) for name in (BASE, *names)}


def _blended(before: float, new: float, decay: float) -> float:
    return decay * before + (1.0 - decay) * new
