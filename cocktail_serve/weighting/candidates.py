"""Mixtures that a weighting tries before it settles on one, and how it asks for their losses.

A weighting that searches is a generator: it yields the mixture whose losses it wants and is sent them, and returns the
candidates it tried. So the same search runs on an engine's event loop and offline, and neither is seen from here.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Merging weights that were tried.

    Attributes:
        merging_weights: over base, experts and target, from all examples.
        temperature: tau they come from, or began at; None where they come from no softmax.
        alpha: share of the target; None where there is none, or where it was searched as a weight.
        loss: what the candidate was judged by (nats), smaller is better; None where it was not measured or not finite.
        chosen: whether the cocktail is this one. One of all candidates is.
        held_out: loss (nats) of each example under weights that it had no part in, where the search itself measured
            those of what it chose; else empty.
    """

    merging_weights: Mapping[str, float]
    temperature: float | None = None
    alpha: float | None = None
    loss: float | None = None
    chosen: bool = False
    held_out: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Trial:
    """A question: what does this mixture lose on these examples?

    Attributes:
        shares: of base, experts and target, whatever the method makes of them (`Method.coefficients`).
        rows: indices of the examples asked about, at least one.
        progress: share of the trials that are done, 0 to 1.
        ahead: the trials that follow, in order, whatever the answer is: who can answer several at once may begin them.
    """

    shares: Mapping[str, float]
    rows: tuple[int, ...]
    progress: float
    ahead: tuple[Trial, ...] = field(default=(), repr=False, compare=False)


Trials = Generator[Trial, Sequence[float], _T]
"""Yields a trial, is sent the loss (nats) of each of its rows in order, returns what came out of it."""


def foreseen(trials: Sequence[Trial]) -> Iterator[Trial]:
    """Trials that are known from the start, each with those that follow."""
    for index, trial in enumerate(trials, start=1):
        yield replace(trial, ahead=tuple(trials[index:]))


def chosen_of(candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate that the cocktail is; None where nothing was weighed, or not yet."""
    return next((candidate for candidate in candidates if candidate.chosen), None)


def mean(losses: Sequence[float]) -> float:
    """Arithmetic mean of at least one loss, summed exactly; infinite where a loss is not finite."""
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf
