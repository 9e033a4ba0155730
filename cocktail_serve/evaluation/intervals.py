"""Paired bootstrap intervals: how sure a mean, or a difference of two systems on the same rows, is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its percentile bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is told from chance."""
        return self.low > 0.0 or self.high < 0.0


def mean_interval(values: Sequence[float], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Interval:
    """The mean of a task's rows; see `macro_interval`."""
    return macro_interval([values], seed=seed, num_resamples=num_resamples)


def macro_interval(
    of_tasks: Sequence[Sequence[float]], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """The mean over tasks of each task's mean, with a 95 % percentile interval.

    Rows are drawn with replacement within each task (`scipy.stats.bootstrap`, percentile method), so the interval is
    about other rows of the same tasks, not about other tasks. For two systems, give the differences row by row: paired.

    Args:
        of_tasks: values of each task's rows, at least one a task.
        seed: of the draws: the same values give the same interval.
    """
    from scipy.stats import bootstrap

    samples = [np.asarray(values, dtype=np.float64) for values in of_tasks]
    center = float(np.mean([sample.mean() for sample in samples]))
    if all(sample.size < 2 or np.ptp(sample) == 0.0 for sample in samples):
        return Interval(center, center, center)

    def statistic(*drawn: np.ndarray, axis: int = -1) -> Any:
        return np.mean([values.mean(axis=axis) for values in drawn], axis=0)

    # scipy wants two values at least; a task of one row is drawn as itself
    result = bootstrap(
        [np.repeat(sample, 2) if sample.size == 1 else sample for sample in samples],
        statistic,
        n_resamples=num_resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        batch=100,
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Interval(center, float(interval.low), float(interval.high))


def paired_difference(
    of_tasks: Sequence[Sequence[float]],
    others: Sequence[Sequence[float]],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """The mean over tasks of `first - second`, row by row.

    Raises:
        ValueError: the two were not measured on the same rows.
    """
    pairs = list(zip(of_tasks, others, strict=True))
    differences = [np.subtract(ours, theirs) for ours, theirs in pairs if len(ours) == len(theirs)]
    if len(differences) < len(pairs):
        raise ValueError("the systems were not measured on the same rows")
    return macro_interval([difference.tolist() for difference in differences], seed=seed, num_resamples=num_resamples)
