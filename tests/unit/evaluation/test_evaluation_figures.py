"""Metrics and intervals: known values, pairing, seeds."""

import numpy as np
import pytest

from cocktail_serve.evaluation.intervals import macro_interval, mean_interval, paired_difference
from cocktail_serve.evaluation.metrics import answer_metrics, ranking_metrics


def test_answers_are_compared_as_squad_does_and_the_best_reference_counts():
    found = answer_metrics("The cat, sat!", ["a dog", "cat sat"])
    assert found == pytest.approx({"exact_match": 1.0, "f1": 1.0, "rouge_l": 0.8})


def test_part_of_an_answer_has_a_part_of_f1():
    assert answer_metrics("blue fish", ["red fish"])["f1"] == pytest.approx(0.5)


def test_rankings_are_measured_query_by_query_with_grades():
    rankings = {"q1": {"a": 3.0, "b": 2.0, "c": 1.0}, "q2": {"a": 1.0, "b": 2.0}, "q3": {"a": 1.0}}
    qrels = {"q1": {"c": 2, "b": 1}, "q2": {"b": 1}, "q3": {"z": 1}}
    found = ranking_metrics(rankings, qrels)
    assert found["mrr@10"] == pytest.approx([0.5, 1.0, 0.0])
    assert found["recall@10"] == pytest.approx([1.0, 1.0, 0.0])
    ideal = 2 / np.log2(2) + 1 / np.log2(3)
    assert found["ndcg@10"] == pytest.approx([(1 / np.log2(3) + 2 / np.log2(4)) / ideal, 1.0, 0.0])


TIED = [
    ({"z": 1}, 0),  # trec_eval: by id, descending
    ({"m": 1}, 1),
    ({"a": 1}, 2),
]


@pytest.mark.parametrize(("judged", "place"), TIED)
def test_documents_of_equal_scores_are_ranked_alike_by_every_metric(judged, place):
    found = ranking_metrics({"q": dict.fromkeys("zam", 0.5)}, {"q": judged})
    assert found["mrr@10"] == [1 / (1 + place)]
    assert found["ndcg@10"] == pytest.approx([1 / np.log2(2 + place)])


def test_ties_at_the_cut_off_are_ranked_alike():
    tied = dict.fromkeys([f"d{number:02}" for number in range(12)], 0.5)
    last_ten = dict.fromkeys(list(tied)[2:], 1)
    first_two = dict.fromkeys(list(tied)[:2], 1)
    found = ranking_metrics({"in": tied, "out": tied}, {"in": last_ten, "out": first_two})
    assert found["recall@10"] == [1.0, 0.0]
    assert found["mrr@10"] == [1.0, 0.0]
    assert found["ndcg@10"] == pytest.approx([1.0, 0.0])


def test_scores_come_before_ids():
    # as near as they are, and as a float32 holds them equal
    scores = {"z": 0.5, "a": 0.5 + 1e-12}
    found = ranking_metrics({"q": scores}, {"q": {"a": 1}})
    assert (found["mrr@10"], found["ndcg@10"]) == ([1.0], [1.0])


def test_an_interval_holds_the_mean_and_is_the_seeds():
    values = np.random.default_rng(0).normal(1.0, 1.0, 200).tolist()
    interval = mean_interval(values, seed=1)
    assert interval.low < interval.mean < interval.high
    assert interval == mean_interval(values, seed=1) != mean_interval(values, seed=2)
    # the normal interval is what a bootstrap of 200 values comes near to
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.std(values) / 200**0.5, rel=0.15)


def test_pairing_sees_what_the_rows_noise_hides():
    noise = np.random.default_rng(0).normal(0.0, 10.0, 100)
    ours, theirs = (noise + 0.5).tolist(), noise.tolist()
    assert mean_interval(ours).low < mean_interval(theirs).high
    difference = paired_difference([ours], [theirs])
    assert (difference.low, difference.high) == pytest.approx((0.5, 0.5))
    assert difference.excludes_zero


def test_tasks_count_alike_whatever_their_size():
    interval = macro_interval([[1.0] * 5 + [0.0] * 5, [0.0] * 500])
    assert interval.mean == pytest.approx(0.25)
    assert 0.0 < interval.low < 0.25 < interval.high


def test_rows_that_are_not_the_same_are_not_paired():
    with pytest.raises(ValueError, match="same rows"):
        paired_difference([[1.0, 2.0]], [[1.0]])


def test_one_row_has_no_width():
    interval = mean_interval([0.5])
    assert (interval.low, interval.high) == (0.5, 0.5)
