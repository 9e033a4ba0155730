"""The loss of a reranker on retrieval examples, from the logits of its pairs of query and passage.

It is what rerankers of this kind are trained with: FlagEmbedding (`FlagEmbedding/abc/finetune/reranker`, `AbsModeling`)
reshapes the logits to one row per query, the positive first and its negatives behind, and takes the cross-entropy with
the positive as the class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cocktail_serve.examples import Example, ExampleSet
from cocktail_serve.scoring.retrieval import cross_entropy, retrieval_example

LOSS_VERSION = "ranking-1"
"""Part of every key a loss is kept under: raised when the same example comes to mean another loss."""


def pairs_of(example: Example) -> list[tuple[str, str]]:
    """Query and passage of each pair that an example asks for, the positives first, each text once.

    Raises:
        InvalidExamplesError: not a retrieval example.
    """
    row = retrieval_example(example)
    return [(row.query, text) for text in dict.fromkeys((*row.pos, *row.neg))]


def ranking_losses(examples: ExampleSet, logits: Sequence[float] | np.ndarray) -> list[float]:
    """Softmax cross-entropy (nats) of each example.

    For a query's positive p, `-log(exp(s(p)) / (exp(s(p)) + sum_n exp(s(n))))` with s the raw logit, before any
    activation, and n the example's negatives; the mean over its positives. Unlike an encoder's, it does not depend on
    the other examples.

    Args:
        logits: one for each pair of `pairs_of`, example by example.

    Returns:
        One loss per example, in order; computed in float64.
    """
    values = np.asarray(logits, dtype=np.float64)
    losses, start = [], 0
    for example in examples:
        end, num_positives = start + len(pairs_of(example)), len(set(retrieval_example(example).pos))
        positives, negatives = values[start : start + num_positives], values[start + num_positives : end]
        losses.append(float(np.mean([cross_entropy(positive, negatives) for positive in positives])))
        start = end
    return losses
