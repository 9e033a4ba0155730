"""Rankings of a corpus: which documents are looked at where scores are equal."""

from types import SimpleNamespace

import numpy as np
import pytest

from cocktail_serve.evaluation.cells import CellStore
from cocktail_serve.evaluation.measure import Measurer, Measuring
from cocktail_serve.evaluation.metrics import DEPTH
from cocktail_serve.evaluation.systems import Contender
from cocktail_serve.evaluation.tasks import EncoderTask


class AllAlike:
    """Embeds every text as the same vector."""

    pool = SimpleNamespace(text_digest="of the test")

    def embed(self, _recipe, texts):
        return np.ones((len(texts), 4), np.float32)


@pytest.mark.parametrize("order", [1, -1])
def test_ties_beyond_the_depth_are_ranked_by_id(order):
    corpus = {f"d{number:03}": "text" for number in range(2 * DEPTH)}
    qrels = {"last": {"d199": 1}, "within": {"d100": 1}, "beyond": {"d099": 1}}
    task = EncoderTask("t", dict(list(corpus.items())[::order]), dict.fromkeys(qrels, "text"), qrels, num_given=3)
    only = Contender((SimpleNamespace(recipe=SimpleNamespace(digest="r"), share=1.0),), None)
    found, _ = Measurer(AllAlike(), CellStore(None), Measuring()).measure(only, task)
    assert found["recall@100"] == [1.0, 1.0, 0.0]
    assert found["mrr@10"] == [1.0, 0.0, 0.0]
    assert found["ndcg@10"] == pytest.approx([1.0, 0.0, 0.0])
