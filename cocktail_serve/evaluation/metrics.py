"""Measures of answers and rankings, row by row, each by a library that is known for it.

Exact match and token F1 are SQuAD's (case, punctuation and articles aside), as in transformers; ROUGE-L is Google's
`rouge-score` with stemming; NDCG, MRR and recall are `ir-measures`' (trec_eval). Of several references the best counts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cocktail_serve.errors import ConfigError

Metric = Literal["accuracy", "exact_match", "f1", "rouge_l", "loss", "ndcg@10", "mrr@10", "recall@10", "recall@100"]

DECODER_METRICS: tuple[Metric, ...] = ("accuracy", "exact_match", "f1", "rouge_l", "loss")
ENCODER_METRICS: tuple[Metric, ...] = ("ndcg@10", "mrr@10", "recall@10", "recall@100")

SMALLER_IS_BETTER = frozenset({"loss"})

TELLS_MORE: Mapping[Metric, tuple[Metric, ...]] = {"exact_match": ("f1", "loss")}
"""What is shown beside a metric that may be the same for all systems: of free text an exact match is often none."""

DEPTH = 100
"""Documents of a ranking that are looked at."""


def answer_metrics(answer: str, references: Sequence[str]) -> dict[Metric, float]:
    """Exact match, token F1 and ROUGE-L of an answer, each 0 to 1, the best over the references."""
    from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

    scorer = _rouge()
    return {
        "exact_match": float(max(compute_exact(reference, answer) for reference in references)),
        "f1": float(max(compute_f1(reference, answer) for reference in references)),
        "rouge_l": max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references),
    }


@functools.cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge-score") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def ranking_metrics(
    rankings: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]]
) -> dict[Metric, list[float]]:
    """Measures of each query's ranking, in the order of `rankings`.

    Args:
        rankings: score by document id, by query id: the best `DEPTH` documents at least.
        qrels: grade by document id, by query id; grades of 1 and above are relevant.
    """
    try:
        import ir_measures
        from ir_measures import RR, R, nDCG
    except ImportError as error:
        raise _missing("ir-measures") from error
    measures = {nDCG @ 10: "ndcg@10", RR @ 10: "mrr@10", R @ 10: "recall@10", R @ 100: "recall@100"}
    # a query whose ranking is empty is not reported: it found nothing
    found: dict[Any, dict[str, float]] = {name: dict.fromkeys(rankings, 0.0) for name in measures.values()}
    for result in ir_measures.iter_calc(list(measures), _plain(qrels), _plain(rankings)):
        found[measures[result.measure]][result.query_id] = float(result.value)
    return {name: list(of_query.values()) for name, of_query in found.items()}


def _plain(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {query: dict(of_query) for query, of_query in values.items()}


def _missing(package: str) -> ConfigError:
    return ConfigError(f"{package} is not installed: pip install 'cocktail-serve[eval]'")
