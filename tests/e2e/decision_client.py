"""Asks for decisions by OpenAI's own client, strict, sync and async; run by `test_clients` under another release.

    python tests/e2e/decision_client.py BASE_URL MODEL...

Prints the answers of each model as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai
import pytest

ASKED: dict[str, Any] = {
    "input": [
        {"role": "developer", "content": "be kind"},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "the film was", "prompt_cache_breakpoint": {"mode": "explicit"}},
                {"type": "input_json", "data": {"stars": 5}},
            ],
        },
    ],
    "questions": [
        {"type": "predicate", "name": "liked", "instructions": "They liked it."},
        {
            "type": "choice",
            "instructions": [{"type": "input_text", "text": "What was it?"}],
            "choices": [{"value": "a joy"}, {"value": True}, {"value": "true", "description": "as a word"}],
        },
        {"type": "score", "instructions": "How good?", "levels": [{"label": "bad"}, {"label": "good"}]},
    ],
    "prompt_cache_key": "films",
    "prompt_cache_options": {"mode": "explicit"},
    "safety_identifier": "somebody",
}


def check(decision: Any) -> dict[str, Any]:
    predicate, choice, score = decision.answers
    assert (predicate.type, predicate.name) == ("predicate", "liked")
    assert 0.0 <= predicate.probability <= 1.0
    assert choice.type == "choice"
    assert [each.value for each in choice.probabilities] == ["a joy", True, "true"]
    assert choice.choice in ("a joy", True, "true")
    assert score.type == "score"
    assert [(each.value, each.label) for each in score.probabilities] == [(0, "bad"), (1, "good")]
    for answer in (choice, score):
        assert abs(sum(each.probability for each in answer.probabilities) - 1.0) < 1e-9
        assert 0.0 <= answer.confidence <= 1.0
    usage = decision.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens > 0
    assert usage.input_tokens_details.cached_tokens <= usage.input_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0
    answers: dict[str, Any] = decision.model_dump(mode="json")["answers"]
    return {"model": decision.model, "answers": answers}


def main(base_url: str, *models: str) -> None:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, _strict_response_validation=True) as client:
        told = [check(client.decisions.create(model=model, **ASKED)) for model in models]
        with pytest.raises(openai.BadRequestError) as refused:
            client.decisions.create(model=models[0], input="x", questions=[])
        assert refused.value.param == "questions"
    asyncio.run(ask_again(base_url, models, told))
    print(json.dumps(told))


async def ask_again(base_url: str, models: tuple[str, ...], told: list[dict[str, Any]]) -> None:
    async with openai.AsyncOpenAI(
        base_url=base_url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        again = await asyncio.gather(*(client.decisions.create(model=model, **ASKED) for model in models))
    for decision, before in zip(again, told, strict=True):
        assert check(decision)["model"] == before["model"]


if __name__ == "__main__":
    main(*sys.argv[1:])
