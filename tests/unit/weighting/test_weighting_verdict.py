"""The verdict: plain advice from held-out losses, and nothing claimed that chance explains."""

import pytest

from cocktail_serve.weighting.verdict import is_better
from cocktail_serve.weighting.verdict import verdict as judged


def verdict(mixed, losses, folds=None, kind="decoder"):
    """Each example a fold of its own, unless others are given."""
    return judged(mixed, losses, folds or [[row] for row in range(len(mixed))], kind=kind)


@pytest.mark.parametrize(
    ("mixed", "losses", "advice"),
    [
        ([1.0, 1.04], {"base": [2.3, 2.32], "ag-news": [1.1, 1.12]}, "use"),
        ([1.2, 1.22], {"base": [2.3, 2.32], "ag-news": [1.0, 1.02]}, "use"),
        ([2.4, 2.42], {"base": [2.3, 2.32], "ag-news": [1.0, 1.02]}, "use_expert"),
        ([2.0, 2.4], {"base": [2.3, 2.32], "ag-news": [1.0, 1.02]}, "use_expert"),
        ([2.4, 2.42], {"base": [2.3, 2.32], "ag-news": [3.0, 3.02]}, "no_gain"),
        ([1.0, 3.5], {"base": [2.3, 2.32], "ag-news": [3.0, 3.02]}, "unsure"),
        ([1.0], {"base": [2.3]}, "use"),
    ],
)
def test_the_advice_follows_from_the_losses(mixed, losses, advice):
    assert verdict(mixed, losses).advice == advice


def test_the_text_says_the_figures():
    told = verdict([1.02, 1.02], {"base": [2.31, 2.31], "ag-news": [1.1, 1.1], "nq": [4.0, 4.0]})
    assert told.text == "held-out losses: mixed 1.02, best expert 1.10 (ag-news), base 2.31: use it"
    assert (told.mixed, told.best_expert, told.best_expert_loss, told.base) == (1.02, "ag-news", 1.1, 2.31)
    told = verdict([3.0, 3.0], {"base": [2.0, 2.0], "ag-news": [4.0, 4.0], "nq": [3.5, 3.5]})
    assert (
        told.text == "held-out losses: mixed 3.00, best expert 3.50 (nq), base 2.00: no expert is close: expect little"
    )
    told = verdict([1.0, 3.5], {"base": [2.3, 2.32]})
    assert told.text == "held-out losses: mixed 2.25, base 2.31: the gain is within chance; give more examples"


def test_an_expert_that_is_no_better_than_the_mixture_beyond_chance_is_not_advised():
    assert verdict([0.5, 2.9], {"base": [2.3, 2.32], "ag-news": [1.0, 1.02]}).advice == "unsure"


def test_what_loses_as_much_as_the_base_gains_nothing():
    assert verdict([2.0, 2.0], {"base": [2.0, 2.0]}).advice == "no_gain"


def test_an_experts_lead_over_a_good_mixture_is_told():
    told = verdict([1.2, 1.22], {"base": [2.3, 2.32], "ag-news": [1.0, 1.02]})
    assert told.text.endswith("use it; ag-news alone loses less here, which says little if it knows the examples")


def test_a_gain_below_the_least_is_none():
    assert not is_better([0.99, 0.99], [1.0, 1.0])
    assert is_better([0.97, 0.97], [1.0, 1.0])
    assert is_better([49.0], [50.0]), "just the least"
    assert not is_better([3.95], [4.0]), "it is a share of the loss"
    assert not is_better([0.0], [0.0])


def test_a_gain_within_a_standard_error_is_none():
    # differences of 0.1, 0.2 and 0.9: their mean is 0.4, its standard error 0.25
    assert is_better([1.9, 1.8, 1.1], [2.0, 2.0, 2.0])
    # of -0.2, 0.0 and 0.8: 0.2 and 0.31
    assert not is_better([2.2, 2.0, 1.2], [2.0, 2.0, 2.0])
    # of 0 and 2: 1 and 1
    assert is_better([2.0, 0.0], [2.0, 2.0]), "just one"


def test_losses_that_are_not_finite_are_not_better():
    assert not is_better([1.0, 1.0], [float("inf"), 1.0])
    assert not is_better([1.0], [float("inf")])


def test_the_best_expert_is_held_out_as_the_mixture_is():
    """Each of two experts knows one example by heart: chosen by both it looks good, chosen by the other it is not."""
    losses = {"base": [2.0, 2.0], "one": [0.1, 3.0], "two": [3.1, 0.0]}
    told = verdict([1.0, 1.0], losses)
    assert told.text == "held-out losses: mixed 1.00, best expert 3.05 (one or two), base 2.00: use it"
    assert (told.best_expert, told.best_expert_loss) == ("one", 1.55)
    assert told.best_expert_held_out == 3.05
    assert verdict([2.1, 2.1], losses).advice == "no_gain", "no expert is better where it was not chosen"
    # two that are held out together choose nothing for each other
    losses = {"base": [2.0] * 4, "one": [0.0, 0.0, 2.5, 2.5], "two": [1.0] * 4}
    told = verdict([1.2] * 4, losses, folds=[[0, 1], [2, 3]])
    assert told.best_expert_held_out == pytest.approx((1.0 + 1.0 + 2.5 + 2.5) / 4)


def test_without_other_folds_the_best_expert_is_that_of_all():
    told = verdict([1.0], {"base": [2.0], "one": [1.5]})
    assert (told.best_expert, told.best_expert_held_out) == ("one", 1.5)


@pytest.mark.parametrize(
    ("mixed", "advice"),
    [
        ([1.8, 1.81], "use"),
        ([1.85, 1.86], "unsure"),  # a gain that would do for a decoder
        ([2.4, 2.42], "unsure"),  # neither the expert that leads nor the base is advised
    ],
)
def test_an_encoders_few_passages_tell_large_gains_alone(mixed, advice):
    losses = {"base": [2.0, 2.02], "quora": [1.2, 1.21]}
    assert verdict(mixed, losses).advice != "unsure"
    told = verdict(mixed, losses, kind="encoder")
    assert told.advice == advice
    assert ("measure it on a test set" in told.text) == (advice == "unsure")
