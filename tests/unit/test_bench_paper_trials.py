"""How often a verdict is right, and thresholds that are picked on other tasks than they are tried on."""

from __future__ import annotations

from bench.paper.trials import Judged, summary, thresholds


def trial(task: str, gain: float, test_gain: float, advice: str = "use", errors: float = 3.0) -> Judged:
    return Judged(task, 5, 0, False, advice, gain, errors, test_gain, test_gain)


def is_better(one: Judged) -> bool:
    return one.test_gain > 0.0


def test_trials_are_counted_by_what_was_advised() -> None:
    told = summary([trial("a", 0.3, 0.2), trial("a", 0.3, -0.1), trial("b", -0.1, 0.0, "no_gain")])["all"]
    assert told["advice"]["use"] == {"given": 2, "better": 1, "not_worse_by_score": 1}
    assert told["advice"]["use_expert"]["expert_better"] == 0
    assert told["advice"]["no_gain"] == {"given": 1, "better": 0, "not_worse_by_score": 1}
    assert told["better"] == 1


def test_thresholds_are_picked_on_the_other_tasks_and_may_fail_on_the_one_left_out() -> None:
    good = [trial(task, gain, 0.1) for task in ("a", "b") for gain in (0.03, 0.3)]
    bad = [trial("c", 0.03, -0.1) for _ in range(4)]
    found = thresholds(good + bad, is_better)
    assert found["shipped"] == {"given": 8, "right": 4}
    # without a or b the small gains are wrong too often; without c nothing says so
    assert found["picked"] == {"a": (0.05, 0.0), "b": (0.05, 0.0), "c": (0.0, 0.0)}
    assert found["picked on the other tasks"] == {"given": 2 + 4, "right": 2}


def test_nothing_is_let_through_where_no_threshold_reaches_the_aim() -> None:
    found = thresholds([trial(task, 0.5, -0.1) for task in ("a", "b")], is_better)
    assert found["picked on the other tasks"] == {"given": 0, "right": 0}
    assert found["picked"] == {"a": None, "b": None}
