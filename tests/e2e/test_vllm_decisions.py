"""`/v1/decisions` on real vLLM, recipes merged: probabilities of transformers, whatever model is asked."""

from __future__ import annotations

import copy
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from bench.invariant import COCKTAILS
from cocktail_serve.decisions import Form, Reading
from cocktail_serve.examples import parse_examples
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.scoring.options import losses_with_transformers, tokenize_scored
from tests.conftest import Stack
from tests.e2e.decisions import PROBABILITY_TOLERANCE, expected, probabilities, question
from tests.e2e.reference import load_reference
from tests.merging import linear
from tests.models import CHAT_TEMPLATE

pytestmark = pytest.mark.vllm

TEXT = "the quick brown fox film card bank paris capital joy bore answer input " * 3
QUESTIONS = [question(number) for number in range(4)]
ROWS = [{"input": "the capital of france is", "output": "paris"}, {"input": "my card was", "output": "stolen"}]


@pytest.fixture
def http(stack: Stack) -> Any:
    with httpx.Client(base_url=stack.server.url, timeout=120) as client:
        yield client


def decide(http: httpx.Client, model: str, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/decisions", json={"model": model, "input": TEXT, "questions": QUESTIONS, **fields})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def reference(stack: Stack, pool: str, weights: dict[str, float]) -> LlamaForCausalLM:
    models = {name: load_reference(stack.decoders[pool][name]).state_dict() for name in weights}
    mixed = copy.deepcopy(load_reference(stack.decoders[pool]["base"]))
    mixed.load_state_dict(linear(models, weights))
    return mixed


@pytest.mark.parametrize("reading", ["verbatim", "labels"])
@pytest.mark.parametrize("mixture", ["base", "north", "half-north", "everything"])
def test_probabilities_are_those_of_transformers(
    stack: Stack, http: httpx.Client, mixture: str, reading: Reading
) -> None:
    weights = COCKTAILS.get(mixture, {mixture: 1.0})
    told = decide(http, stack.model_ids["tied", mixture], reading=reading)
    wanted = expected(
        reference(stack, "tied", weights),
        stack.decoders["tied"]["base"],
        TEXT,
        QUESTIONS,
        reading=reading,
        form="chat",
    )
    np.testing.assert_allclose(probabilities(told), wanted, rtol=0, atol=PROBABILITY_TOLERANCE)
    assert np.sum(probabilities(told), axis=1) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("inline", [False, True])
def test_a_cocktail_is_asked_as_its_examples_ask(stack: Stack, http: httpx.Client, inline: bool) -> None:
    """Rows of text, in a pool that has a chat template."""
    form: Form = "text"
    cocktail = {"examples": ROWS, "temperature": 0.5}
    if inline:
        told = decide(http, "untied", cocktail=cocktail)
    else:
        made = http.post("/v1/cocktails?wait=60", json={"name": "asked", "pool": "untied", **cocktail}).json()
        assert made["status"] == "ready"
        told = decide(http, "asked")
        assert told["model"] == made["id"]
    weights = http.get(f"/v1/cocktails/{told['model']}").json()["merging_weights"]
    wanted = expected(
        reference(stack, "untied", weights),
        stack.decoders["untied"]["base"],
        TEXT,
        QUESTIONS,
        reading="verbatim",
        form=form,
    )
    np.testing.assert_allclose(probabilities(told), wanted, rtol=0, atol=PROBABILITY_TOLERANCE)


@pytest.mark.parametrize("pool", ["tied", "untied"])
def test_a_cocktail_of_decisions_is_weighed_by_their_options(stack: Stack, http: httpx.Client, pool: str) -> None:
    rows = [
        {
            "input": "the capital of france is",
            "choices": ["paris", "bank", "paris and the lazy dog"],
            "answer": "paris",
        },
        {"input": "my card", "question": {"type": "predicate", "instructions": "it was stolen"}, "answer": True},
    ]
    made = http.post("/v1/cocktails?wait=60", json={"name": f"by-{pool}", "pool": pool, "examples": rows}).json()
    assert made["status"] == "ready"
    examples, folder = parse_examples(rows, "decoder"), stack.decoders[pool]["base"]
    scored = tokenize_scored(
        AutoTokenizer.from_pretrained(folder), examples, max_tokens=255, chat_template=ChatTemplate(CHAT_TEMPLATE)
    )
    weights = {**{name: {name: 1.0} for name in made["losses"]}, "mixed": made["merging_weights"]}
    losses = {**made["losses"], "mixed": made["mixed_loss"]}
    for name, mixture in weights.items():
        of_examples = losses_with_transformers(reference(stack, pool, mixture), scored)
        assert losses[name] == pytest.approx(np.mean(of_examples), abs=2e-3)
    assert http.get(f"/v1/cocktails/{made['id']}/examples").json()["data"] == examples.to_json()
