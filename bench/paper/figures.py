"""Figures over tasks: means and differences with paired bootstrap intervals, and ratios of differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cocktail_serve.evaluation.intervals import CONFIDENCE, NUM_RESAMPLES, Interval, macro_interval, paired_difference

Rows = Mapping[str, Sequence[float]]
"""Values of each row by task (or by any other group that rows are drawn within)."""


def mean_of(rows: Rows, *, scale: float = 100.0) -> dict[str, float]:
    """Mean over tasks of each task's mean, with its interval."""
    return _as_json(macro_interval(list(rows.values())), scale)


def difference_of(ours: Rows, theirs: Rows, *, scale: float = 100.0) -> dict[str, float]:
    """Mean over tasks of ours less theirs, row by row, with its interval."""
    return _as_json(paired_difference([ours[name] for name in ours], [theirs[name] for name in ours]), scale)


def ratio_of(numerator: tuple[Rows, Rows], denominator: tuple[Rows, Rows], *, seed: int = 0) -> dict[str, float]:
    """`(mean a - mean b) / (mean c - mean d)` over the same rows, with a percentile interval of paired draws.

    Rows are drawn with replacement within each task, the same rows for all four.
    """
    rng = np.random.default_rng(seed)
    parts = (*numerator, *denominator)
    centers, drawn = np.zeros(4), np.zeros((4, NUM_RESAMPLES))
    for name in numerator[0]:
        rows = np.asarray([part[name] for part in parts], dtype=np.float64)  # [4, N]
        chosen = rng.integers(rows.shape[1], size=(NUM_RESAMPLES, rows.shape[1]))
        centers += rows.mean(axis=1)
        drawn += rows[:, chosen].mean(axis=2)
    # the sums over tasks stand for means: their number cancels out
    center = (centers[0] - centers[1]) / (centers[2] - centers[3])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (drawn[0] - drawn[1]) / (drawn[2] - drawn[3])
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(ratios, [tail, 100 - tail])
    return {"mean": round(float(center), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def averaged(draws: Sequence[Sequence[float]]) -> list[float]:
    """The mean over draws of examples, row by row."""
    return np.mean(np.asarray(draws, dtype=np.float64), axis=0).tolist()


def _as_json(interval: Interval, scale: float) -> dict[str, float]:
    return {
        "mean": round(scale * interval.mean, 3),
        "low": round(scale * interval.low, 3),
        "high": round(scale * interval.high, 3),
    }


def told(value: Mapping[str, Any], digits: int = 1) -> str:
    """A figure with its interval, as tables show it."""
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
