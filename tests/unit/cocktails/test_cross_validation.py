"""Cross-validation: which mixtures it asks for, and on which examples."""

import math

import pytest

from cocktail_serve.cocktails.cross_validation import cross_validate
from cocktail_serve.cocktails.options import CocktailOptions
from cocktail_serve.cocktails.weighting_steps import advance
from cocktail_serve.weighting.candidates import Candidate, Trial

LOSSES = {"base": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "nq": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], "own": [1.0] * 6}


def options(**changes) -> CocktailOptions:
    values = {"weighting": "softmax", "temperature": 1.0, "peers": ("base", "nq"), "num_examples": 6} | changes
    return CocktailOptions(name="x", pool="p", pool_fingerprint="f", **values)


def asked(chosen: Candidate, losses=LOSSES, **changes):
    """All trials, each answered with 0.5, and the findings."""
    trials, generator, answer = [], cross_validate(options(**changes), losses, chosen, kind="decoder"), None
    while isinstance(step := advance(generator, answer), Trial):
        trials.append(step)
        answer = [0.5] * len(step.rows)
    return trials, step


def test_weights_come_from_the_other_folds():
    trials, findings = asked(Candidate({}, temperature=0.7))
    assert len(trials) == findings.num_folds == 5
    assert sorted(row for trial in trials for row in trial.rows) == list(range(6))
    for trial in trials:
        others = [row for row in range(6) if row not in trial.rows]
        means = {name: sum(LOSSES[name][row] for row in others) / len(others) for name in ("base", "nq")}
        share = 1 / (1 + math.exp((means["base"] - means["nq"]) / 0.7))
        assert trial.shares["base"] == pytest.approx(share)
    assert findings.held_out_loss == 0.5


def test_a_target_takes_the_share_that_was_chosen():
    trials, findings = asked(Candidate({}, temperature=1.0, alpha=0.3), target="own")
    assert [trial.shares["own"] for trial in trials] == pytest.approx([0.3] * 5)
    assert findings.best_expert == "own"


def test_equal_weights_need_no_temperature():
    trials, _ = asked(Candidate({}), weighting="uniform", temperature=None)
    assert [trial.shares for trial in trials] == [{"base": 0.5, "nq": 0.5}] * 5


def test_two_examples_are_two_folds_and_one_is_none():
    two = {name: losses[:2] for name, losses in LOSSES.items()}
    assert len(asked(Candidate({}, temperature=1.0), two)[0]) == 2
    one = {name: losses[:1] for name, losses in LOSSES.items()}
    trials, findings = asked(Candidate({}, temperature=1.0), one)
    assert (trials, findings.advice) == ([], None)
