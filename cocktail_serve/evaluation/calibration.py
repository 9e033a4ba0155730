"""Whether probabilities are what they say: Brier score, and expected calibration error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_BINS = 15
"""Of equal width, as Guo et al. (2017, arXiv 1706.04599) take."""


def brier_score(probabilities: Sequence[float], answer: int) -> float:
    """Sum of the squared distances to what is right, 0 to 2, as Brier (1950) has it for several classes.

    Args:
        probabilities: `[K]`, of the options.
        answer: index of the one that is right.
    """
    distances = np.asarray(probabilities, dtype=np.float64).copy()
    distances[answer] -= 1.0
    return float(distances @ distances)


def calibration_terms(
    probabilities: Sequence[Sequence[float]], answers: Sequence[int], *, num_bins: int = NUM_BINS
) -> list[float]:
    """What each row adds to the calibration error, which is their mean; a row against its bin's gap takes from it.

    Args:
        As `expected_calibration_error`.
    """
    confidences = np.array([max(of_row) for of_row in probabilities])
    winners = [int(np.argmax(of_row)) for of_row in probabilities]
    gaps = np.equal(winners, answers) - confidences
    bins = np.minimum((confidences * num_bins).astype(int), num_bins - 1)
    signs = np.sign(np.bincount(bins, weights=gaps, minlength=num_bins))
    terms: list[float] = (gaps * signs[bins]).tolist()
    return terms


def expected_calibration_error(
    probabilities: Sequence[Sequence[float]], answers: Sequence[int], *, num_bins: int = NUM_BINS
) -> float:
    """How far the winners' probabilities are from how often they are right, 0 to 1: the mean gap of the bins of equal
    width that they fall into, each weighed by the rows in it.

    Args:
        probabilities: of the options of each row.
        answers: index of the one that is right, of each row.
    """
    return float(np.mean(calibration_terms(probabilities, answers, num_bins=num_bins)))
