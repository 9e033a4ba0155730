"""Measures of answers and rankings, row by row, each by a library that is known for it.

Exact match and token F1 are SQuAD's (case, punctuation and articles aside), as in transformers; ROUGE-L is Google's
`rouge-score` with stemming; NDCG, MRR and recall are `ir-measures`' (trec_eval). Of several references the best counts.

Documents of equal scores are ranked as trec_eval ranks them, for every measure alike: by id, the last in the order of
characters first. It takes no heed of what is relevant, and figures are those of published scripts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cocktail_serve.errors import ConfigError

Metric = Literal[
    "accuracy",
    "exact_match",
    "f1",
    "rouge_l",
    "loss",
    "brier",
    "ece",
    "ndcg@10",
    "mrr@10",
    "recall@10",
    "recall@100",
]

DECODER_METRICS: tuple[Metric, ...] = ("accuracy", "exact_match", "f1", "rouge_l", "loss", "brier", "ece")
OF_CHOICES: tuple[Metric, ...] = ("accuracy", "brier", "ece")
"""Of tasks whose rows have choices alone. Probabilities are those that `/v1/decisions` reads verbatim."""
ENCODER_METRICS: tuple[Metric, ...] = ("ndcg@10", "mrr@10", "recall@10", "recall@100")

NOT_OF_CHOICES = frozenset(DECODER_METRICS) - frozenset(OF_CHOICES)
"""Of other tasks."""

SMALLER_IS_BETTER = frozenset({"loss", "brier", "ece"})

TELLS_MORE: Mapping[Metric, tuple[Metric, ...]] = {"exact_match": ("f1", "loss")}
"""What is shown beside a metric that may be the same for all systems: of free text an exact match is often none."""

DEPTH = 100
"""Documents of a ranking that are looked at."""

TIES = "by document id, descending"
"""How documents of equal scores are ranked, as reports say it."""


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
        rankings: score by document id, by query id: the best `DEPTH` documents, and all that equal the last of them.
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
    ranked = {query: _without_ties(of_query) for query, of_query in rankings.items()}
    for result in ir_measures.iter_calc(list(measures), {query: dict(of) for query, of in qrels.items()}, ranked):
        found[measures[result.measure]][result.query_id] = float(result.value)
    return {name: list(of_query.values()) for name, of_query in found.items()}


def _without_ties(scores: Mapping[str, float]) -> dict[str, float]:
    """The same ranking by scores that all differ: the library hands measures to programs that order ties their own way.

    With ir-measures 0.4.3 NDCG and recall order them by id descending (pytrec_eval), reciprocal rank at a cut-off by id
    ascending (MS MARCO's script): terrierteam/ir_measures#18.
    """
    worst_first = sorted(scores, key=lambda document: (scores[document], document))
    return {document: float(place) for place, document in enumerate(worst_first)}


def _missing(package: str) -> ConfigError:
    return ConfigError(f"{package} is not installed: pip install 'cocktail-serve[eval]'")
