"""What the losses on retrieval examples have in common."""

from __future__ import annotations

import numpy as np

from cocktail_serve.errors import InvalidExamplesError
from cocktail_serve.examples import Example, RetrievalExample


def retrieval_example(example: Example) -> RetrievalExample:
    """The example as the one form that encoders and rerankers are scored on; InvalidExamplesError for another."""
    if not isinstance(example, RetrievalExample):
        raise InvalidExamplesError('encoders and rerankers are scored on {"query", "pos", "neg"} examples')
    return example


def cross_entropy(positive: np.floating, negatives: np.ndarray) -> float:
    """`-log softmax` (nats) of a positive's score among its negatives' `[N]`; float64 in, no overflow.

    Of scores that are not finite neither is the loss.
    """
    largest = max(positive, negatives.max(initial=positive))
    with np.errstate(invalid="ignore"):  # which is told by what comes out
        return float(largest - positive + np.log(np.exp(positive - largest) + np.exp(negatives - largest).sum()))
