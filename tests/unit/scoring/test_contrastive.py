import math

import numpy as np
import pytest

from cocktail_serve.errors import InvalidExamplesError
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.scoring.contrastive import TEMPERATURE, contrastive_losses, texts_of

ROWS = [
    {"query": "q0", "pos": ["p0"], "neg": ["n0", "n1"]},
    {"query": "q1", "pos": ["p1", "p2"], "neg": ["n2"]},
    {"query": "q2", "pos": ["p3"], "neg": []},
]


def encoder_examples(rows: list[dict[str, object]]) -> ExampleSet:
    return parse_examples(rows, "encoder")


def unit_vectors(texts: list[str], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(len(texts), 8)).astype(np.float32)
    return dict(zip(texts, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), strict=True))


def naive_loss(query: str, positives: list[str], negatives: list[str], embed: dict[str, np.ndarray]) -> float:
    """The definition, written out: one softmax per positive, its cross-entropy, their mean."""

    def exp_score(text: str) -> float:
        return math.exp(float(embed[query].astype(np.float64) @ embed[text].astype(np.float64)) / TEMPERATURE)

    denominator = sum(map(exp_score, negatives))
    losses = [-math.log(exp_score(positive) / (exp_score(positive) + denominator)) for positive in positives]
    return sum(losses) / len(losses)


def test_texts_of_are_unique_and_in_order() -> None:
    rows = [{"query": "a", "pos": ["b", "c"], "neg": ["a"]}, {"query": "c", "pos": ["b"], "neg": ["d"]}]
    assert texts_of(encoder_examples(rows)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_definition(seed: int) -> None:
    examples = encoder_examples(ROWS)
    embed = unit_vectors(texts_of(examples), seed)
    expected = [
        naive_loss("q0", ["p0"], ["n0", "n1", "p1", "p2", "n2", "p3"], embed),
        naive_loss("q1", ["p1", "p2"], ["n2", "p0", "n0", "n1", "p3"], embed),
        naive_loss("q2", ["p3"], ["p0", "n0", "n1", "p1", "p2", "n2"], embed),
    ]
    np.testing.assert_allclose(contrastive_losses(examples, embed), expected, rtol=1e-12)


def test_own_positives_elsewhere_are_not_negatives() -> None:
    """The trap of in-batch negatives: the same passage answers two queries."""
    rows = [
        {"query": "q0", "pos": ["shared"], "neg": ["n0"]},
        {"query": "q1", "pos": ["p1"], "neg": ["shared", "n0"]},
    ]
    examples = encoder_examples(rows)
    embed = unit_vectors(texts_of(examples))
    expected = [
        naive_loss("q0", ["shared"], ["n0", "p1"], embed),
        naive_loss("q1", ["p1"], ["shared", "n0"], embed),
    ]
    np.testing.assert_allclose(contrastive_losses(examples, embed), expected, rtol=1e-12)


def test_a_better_model_has_a_lower_loss() -> None:
    examples = encoder_examples([{"query": "q", "pos": ["p"], "neg": ["n"]}])
    right, wrong = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    good = contrastive_losses(examples, {"q": right, "p": right, "n": wrong})[0]
    bad = contrastive_losses(examples, {"q": right, "p": wrong, "n": right})[0]
    assert good < 1e-8
    assert bad == pytest.approx(1 / TEMPERATURE)


def test_large_scores_of_an_unnormalised_model_do_not_overflow() -> None:
    examples = encoder_examples([{"query": "q", "pos": ["p"], "neg": ["n"]}])
    embed = {"q": np.array([1e3]), "p": np.array([-1e3]), "n": np.array([1e3])}
    assert contrastive_losses(examples, embed) == [pytest.approx(2e6 / TEMPERATURE)]


def test_refuses_examples_of_a_decoder() -> None:
    examples = parse_examples([{"input": "a", "output": "b"}], "decoder")
    with pytest.raises(InvalidExamplesError, match="query"):
        texts_of(examples)
