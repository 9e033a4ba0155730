"""The reranker's loss against the definition, written out on logits of transformers."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cocktail_serve.errors import InvalidExamplesError
from cocktail_serve.examples import parse_examples
from cocktail_serve.scoring.ranking import pairs_of, ranking_losses
from tests.models import make_reranker

ROWS = [
    {"query": "my card was stolen", "pos": ["lost card"], "neg": ["red fish", "good dog"]},
    {"query": "capital of france", "pos": ["paris", "paris is a city"], "neg": ["berlin"]},
]


def by_definition(positives: list[float], negatives: list[float]) -> float:
    denominator = sum(map(math.exp, negatives))
    return sum(-math.log(math.exp(p) / (math.exp(p) + denominator)) for p in positives) / len(positives)


def test_losses_are_the_definition_on_logits_of_transformers(tmp_path):
    folder = make_reranker(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def logit(query: str, text: str) -> float:
        with torch.inference_mode():
            return model(**tokenizer(query, text, return_tensors="pt")).logits.item()

    want = [
        by_definition(*([logit(row["query"], text) for text in row[side]] for side in ("pos", "neg"))) for row in ROWS
    ]
    examples = parse_examples(ROWS, "reranker")
    logits = [logit(*pair) for example in examples for pair in pairs_of(example)]
    assert ranking_losses(examples, logits) == pytest.approx(want, rel=1e-9)
    assert len(set(want)) == 2


def test_equal_logits_are_a_guess_among_all():
    examples = parse_examples([{"query": "q", "pos": ["p"], "neg": ["a", "b", "c"]}], "reranker")
    assert ranking_losses(examples, np.zeros(4)) == pytest.approx([math.log(4)])


def test_large_logits_do_not_overflow():
    examples = parse_examples([{"query": "q", "pos": ["p"], "neg": ["n"]}], "reranker")
    assert ranking_losses(examples, [-2000.0, 2000.0]) == pytest.approx([4000.0])
    assert ranking_losses(examples, [2000.0, -2000.0]) == [0.0]


def test_a_text_is_one_pair_and_a_positive_is_never_a_negative():
    row = {"query": "q", "pos": ["p", "p"], "neg": ["n", "p", "n"]}
    (example,) = examples = parse_examples([row], "reranker")
    assert pairs_of(example) == [("q", "p"), ("q", "n")]
    assert ranking_losses(examples, [1.0, 0.5]) == pytest.approx([by_definition([1.0], [0.5])])


@pytest.mark.parametrize("neg", [None, [], ["p"]])
def test_without_a_negative_every_model_has_the_same_loss(neg):
    rows = [ROWS[0], {"query": "q", "pos": ["p"], "neg": neg}]
    with pytest.raises(InvalidExamplesError, match=r"row 2: .*negatives"):
        parse_examples(rows, "reranker")


def test_other_examples_are_refused():
    with pytest.raises(InvalidExamplesError, match="query"):
        pairs_of(next(iter(parse_examples([{"input": "a", "output": "b"}], "decoder"))))
