"""Tokens as vLLM counts them: whole streams to the token, broken ones at least what was delivered."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from tests.conftest import Stack

pytestmark = pytest.mark.vllm

DEADLINE_S = 30.0


@pytest.fixture
def http(stack: Stack) -> Any:
    with httpx.Client(base_url=stack.server.url, timeout=60) as client:
        yield client


def usage(http: httpx.Client, model: str) -> tuple[int, int, int]:
    rows = http.get("/v1/usage", params={"group_by": "model"}).json()["data"]
    row = next((row for row in rows if row["model"] == model), None)
    return (0, 0, 0) if row is None else (row["requests"], row["tokens_in"], row["tokens_out"])


def used_since(http: httpx.Client, model: str, before: tuple[int, int, int]) -> tuple[int, int]:
    """Tokens in and out of one more request, once it is counted."""
    deadline = time.monotonic() + DEADLINE_S
    while (now := usage(http, model))[0] == before[0]:
        assert time.monotonic() < deadline, "the request was not counted in time"
        time.sleep(0.05)
    assert now[0] == before[0] + 1
    return now[1] - before[1], now[2] - before[2]


def num_token_ids(line: str) -> int:
    chunk = json.loads(line.removeprefix("data: "))
    return sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"])


@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "what is the capital of france"}]}),
        ("/v1/completions", {"prompt": ["what is the capital of france", "the film was"]}),
    ],
)
def test_streams(stack: Stack, http: httpx.Client, path: str, prompt: dict[str, Any], num_choices: int) -> None:
    model = stack.model_ids["tied", "half-north"]
    body = {
        "model": model,
        "max_tokens": 40,
        "ignore_eos": True,
        "n": num_choices,
        "temperature": 1.0,
        "stream": True,
        "return_token_ids": True,
        **prompt,
    }
    before = usage(http, model)
    with http.stream("POST", path, json=body) as answer:
        lines = [line for line in answer.iter_lines() if line and "[DONE]" not in line]
    whole = used_since(http, model, before)
    num_choices_in_all = num_choices * (2 if "prompt" in prompt else 1)
    assert sum(map(num_token_ids, lines)) == whole[1] == 40 * num_choices_in_all
    before = usage(http, model)
    delivered = 0
    with http.stream("POST", path, json=body) as answer:
        for line in answer.iter_lines():
            if line:
                delivered += num_token_ids(line)
            if delivered >= 5:
                break
    broken = used_since(http, model, before)
    assert 5 <= delivered <= broken[1] <= whole[1]
    assert 0 < broken[0] <= whole[0], "prompts whose choices had not begun are not known yet"
    if "messages" in prompt:
        assert broken[0] == whole[0]
