"""Requests to `/v1/responses` and what is made of their answers, without a server."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from cocktail_serve.errors import EngineError, InvalidRequestError, NotServedError
from cocktail_serve.gateway.field_policy import Outgoing
from cocktail_serve.gateway.response_fields import NOT_SERVED, apply_response_policy
from cocktail_serve.gateway.response_rewriter import ResponseRewriter

ASKED: dict[str, Any] = {"model": "flan", "input": "hi"}


def rewriter(**body: Any) -> ResponseRewriter:
    return ResponseRewriter("films@1", Outgoing({"input": "x" * 386, **body}, shows_usage=True))


def event_of(rewriter: ResponseRewriter, **event: Any) -> tuple[str, dict[str, Any]]:
    name, data = rewriter.event(orjson.dumps(event)).decode().removesuffix("\n\n").split("\n")
    return name.removeprefix("event: "), orjson.loads(data.removeprefix("data: "))


def test_all_else_passes_but_what_streams_of_chats_are_asked() -> None:
    body = ASKED | {"stream": True, "stream_options": {"include_obfuscation": False}, "reasoning": {"effort": "low"}}
    outgoing = apply_response_policy(body | {"cocktail": {}}, allow_chat_template=False)
    assert outgoing.body == {"input": "hi", "stream": True, "reasoning": {"effort": "low"}}
    assert "stream_options" in body, "the request stays as it was"


@pytest.mark.parametrize("field", NOT_SERVED)
def test_state_is_not_served(field: str) -> None:
    with pytest.raises(NotServedError, match=field) as caught:
        apply_response_policy(ASKED | {field: "x"}, allow_chat_template=False)
    assert caught.value.param == field
    for absent in (None, False):
        apply_response_policy(ASKED | {field: absent}, allow_chat_template=False)


@pytest.mark.parametrize("tools", [[{"type": "function"}, {"type": "custom"}, {"type": "namespace"}], [], None, "x"])
def test_tools_of_the_client_pass(tools: Any) -> None:
    for choice in ("auto", {"type": "function", "name": "f"}, {"type": "allowed_tools"}, None):
        body = ASKED | {"tools": tools, "tool_choice": choice}
        assert apply_response_policy(body, allow_chat_template=False).body["tools"] == tools


def test_an_answer_in_parts_is_refused_where_it_would_be_cut() -> None:
    parts = [{"type": "output_text", "text": text} for text in ("one", "two")]
    for role, is_refused in (("assistant", True), ("user", False)):
        body = ASKED | {"input": [{"role": "user", "content": "a"}, {"role": role, "content": parts}]}
        if is_refused:
            with pytest.raises(InvalidRequestError, match=r"input\[1\] is an answer in 2 parts") as caught:
                apply_response_policy(body, allow_chat_template=False)
            assert caught.value.param == "input.1.content"
        else:
            apply_response_policy(body, allow_chat_template=False)


def test_a_whole_response_is_ours_and_counted() -> None:
    ours = rewriter()
    assert not ours.is_counted
    answer = {"id": "resp_1", "model": "flan", "output": [], "usage": {"input_tokens": 7, "output_tokens": 3}}
    assert orjson.loads(ours.whole(orjson.dumps(answer))) == answer | {"model": "films@1", "store": False}
    assert (ours.is_counted, ours.num_prompt_tokens, ours.num_completion_tokens) == (True, 7, 3)
    with pytest.raises(EngineError):
        ours.whole(b"[]")


def test_events_are_ours_and_the_last_one_counts() -> None:
    ours = rewriter()
    name, event = event_of(ours, type="response.created", response={"model": "flan", "usage": None})
    assert (name, event["response"]) == ("response.created", {"model": "films@1", "usage": None, "store": False})
    assert not ours.is_counted, "nothing was generated yet"
    for text in ("a", "b"):
        name, event = event_of(ours, type="response.output_text.delta", delta=text)
        assert (name, event["delta"]) == ("response.output_text.delta", text)
    assert (ours.is_counted, ours.num_completion_tokens) == (True, 2), "until it ends: a token each"
    assert ours.num_prompt_tokens == 99, "a quarter of 398 bytes"
    used = {"input_tokens": 5, "output_tokens": 4}
    event_of(ours, type="response.completed", response={"model": "flan", "usage": used})
    assert (ours.num_prompt_tokens, ours.num_completion_tokens) == (5, 4)


def test_what_breaks_off_is_told_as_an_event_that_clients_raise() -> None:
    ours = rewriter()
    event_of(ours, type="response.created")
    name, data = ours.error_event(EngineError("gone")).decode().strip().split("\n")
    event = orjson.loads(data.removeprefix("data: "))
    assert name == "event: error"
    assert (event["type"], event["sequence_number"], event["code"], event["message"]) == (
        "error",
        1,
        "engine_error",
        "gone",
    )
    assert event["error"]["code"] == "engine_error"
