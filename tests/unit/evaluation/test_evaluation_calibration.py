"""Brier score and calibration error, on what can be told by hand."""

from __future__ import annotations

import pytest

from cocktail_serve.evaluation.calibration import brier_score, expected_calibration_error


def test_the_brier_score_of_sure_and_unsure_answers() -> None:
    assert brier_score([1.0, 0.0, 0.0], 0) == 0.0
    assert brier_score([1.0, 0.0, 0.0], 1) == pytest.approx(2.0)
    assert brier_score([0.7, 0.3], 0) == pytest.approx(0.18)


def test_what_is_as_often_right_as_it_says_is_calibrated() -> None:
    answers = [0, 0, 0, 1]
    assert expected_calibration_error([[0.75, 0.25]] * 4, answers) == pytest.approx(0.0)
    assert expected_calibration_error([[1.0, 0.0]] * 4, answers) == pytest.approx(0.25)


def test_bins_are_weighed_by_their_rows() -> None:
    """Three rows that say 0.9 and are right, one that says 0.5 and is wrong."""
    rows = [[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.5, 0.5]]
    assert expected_calibration_error(rows, [0, 0, 1, 1]) == pytest.approx(0.75 * 0.1 + 0.25 * 0.5)


def test_a_bin_is_closed_above() -> None:
    assert expected_calibration_error([[1.0, 0.0], [0.95, 0.05]], [0, 0], num_bins=10) == pytest.approx(0.025)
