"""The loss of an encoder on retrieval examples, from the embeddings of their texts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from cocktail_serve.examples import ExampleSet
from cocktail_serve.scoring.retrieval import cross_entropy, retrieval_example

LOSS_VERSION = "contrastive-1"
"""Part of every key a loss is kept under: raised when the same embeddings come to mean another loss."""

TEMPERATURE = 0.05
"""What scores are divided by before the softmax: LM-Cocktail's, for weighing (its fine-tuning uses 0.02)."""


def texts_of(examples: ExampleSet, rows: Collection[int] | None = None) -> list[str]:
    """Queries (of `rows`, if given) and all passages, each text once, in the order they first appear."""
    return list(
        dict.fromkeys(
            text
            for index, row in enumerate(map(retrieval_example, examples))
            for text in ((row.query,) if rows is None or index in rows else ()) + row.pos + row.neg
        )
    )


def contrastive_losses(
    examples: ExampleSet, embed: Mapping[str, np.ndarray], rows: Sequence[int] | None = None
) -> list[float]:
    """Contrastive cross-entropy (nats) of each example, LM-Cocktail's loss of an encoder (arXiv 2311.13534).

    For a query q and one of its positives p, `-log(exp(s(q,p)/T) / (exp(s(q,p)/T) + sum_n exp(s(q,n)/T)))` with
    s the inner product and T = 0.05, the mean over the example's positives. The negatives n are the example's own and
    all passages of the other examples, each text once; a text that is one of the example's positives is never its
    negative, wherever else it appears: FAQ data repeats passages, and the query would be punished for finding them.

    Args:
        embed: `[D]` vector of every text of `texts_of(examples, rows)`, pooled and normalised by the model's own
            modules.
        rows: indices of the examples to score, against the passages of all; None: every one.

    Returns:
        One loss per example scored, in order; computed in float64.
    """
    retrieval = [retrieval_example(example) for example in examples]
    scored = retrieval if rows is None else [retrieval[index] for index in rows]
    passages = list(dict.fromkeys(text for row in retrieval for text in (*row.pos, *row.neg)))
    queries = np.stack([np.asarray(embed[row.query], dtype=np.float64) for row in scored])
    scores = queries @ np.stack([np.asarray(embed[text], dtype=np.float64) for text in passages]).T / TEMPERATURE
    column = {text: index for index, text in enumerate(passages)}
    losses = []
    for row, row_scores in zip(scored, scores, strict=True):
        positives = [column[text] for text in row.pos]
        is_negative = np.ones(len(passages), dtype=bool)
        is_negative[positives] = False
        negatives = row_scores[is_negative]
        losses.append(float(np.mean([cross_entropy(row_scores[index], negatives) for index in positives])))
    return losses
