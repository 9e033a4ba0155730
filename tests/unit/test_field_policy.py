"""What the gateway decides about a generation request, and what it makes of the answer."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from cocktail_serve.errors import EngineError, InvalidRequestError
from cocktail_serve.gateway.answer_rewriter import AnswerRewriter
from cocktail_serve.gateway.field_policy import FIELD_POLICY, Outgoing, apply_field_policy
from cocktail_serve.generation_settings import NEUTRAL_SAMPLING

CHAT: dict[str, Any] = {"model": "flan", "messages": [{"role": "user", "content": "hi"}]}


def nested(field: str, value: object) -> dict[str, Any]:
    """A body that holds `value` under a dotted name."""
    for key in reversed(field.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


REFUSED = [rule for rule in FIELD_POLICY if rule.action == "refuse"]


@pytest.mark.parametrize("rule", REFUSED, ids=lambda rule: rule.field)
def test_refused(rule: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        apply_field_policy(CHAT | nested(rule.field, "x"), allow_chat_template=False)
    assert caught.value.param == rule.field
    assert rule.why in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", "END"),
        ("logit_bias", {"5": 10}),
        ("min_tokens", 4),
        ("allowed_token_ids", [5]),
        ("bad_words", ["no"]),
        ("structured_outputs", {"regex": "a+"}),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_what_beam_search_would_not_heed_is_refused_beside_it(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"does not heed '{field}'") as caught:
        apply_field_policy(CHAT | {"use_beam_search": True, field: value}, allow_chat_template=False)
    assert caught.value.param == field
    assert apply_field_policy(CHAT | {field: value}, allow_chat_template=False).body[field] == value
    alone = CHAT | {"use_beam_search": True, field: None, "response_format": {"type": "text"}, "top_p": 0.9}
    assert apply_field_policy(alone, allow_chat_template=False).body["use_beam_search"]


@pytest.mark.parametrize("rule", REFUSED, ids=lambda rule: rule.field)
def test_refused_but_null_is_as_good_as_absent(rule: Any) -> None:
    outgoing = apply_field_policy(CHAT | nested(rule.field, None), allow_chat_template=False)
    assert rule.field not in outgoing.body


def test_falsy_values_are_refused_too() -> None:
    with pytest.raises(InvalidRequestError, match="priority"):
        apply_field_policy(CHAT | {"priority": 0}, allow_chat_template=False)


def test_chat_templates_where_the_operator_allows_them() -> None:
    body = CHAT | {"chat_template": "{{ x }}", "chat_template_kwargs": {"chat_template": "y"}}
    assert apply_field_policy(body, allow_chat_template=True).body["chat_template"] == "{{ x }}"
    with pytest.raises(InvalidRequestError, match=r"engine\.allow_chat_template"):
        apply_field_policy(body, allow_chat_template=False)


def test_all_else_passes_and_the_request_stays_as_it_was() -> None:
    body = CHAT | {"tools": [{"type": "function"}], "logprobs": True, "min_p": 0.1, "seed": 2**40, "stop": None}
    before = orjson.dumps(body)
    outgoing = apply_field_policy(body | {"cocktail": {"examples": []}}, allow_chat_template=False)
    assert outgoing.body == {key: value for key, value in body.items() if key != "model"}
    assert orjson.dumps(body) == before


@pytest.mark.parametrize(
    ("options", "shows"),
    [
        (None, (False, False)),
        ({}, (False, False)),
        ({"include_usage": None}, (False, False)),
        ({"include_usage": True}, (True, False)),
        ({"include_usage": True, "continuous_usage_stats": True}, (True, True)),
        ({"include_usage": False, "continuous_usage_stats": True}, (False, False)),
        ({"continuous_usage_stats": False}, (False, False)),
    ],
)
def test_usage_is_always_asked_of_the_engine(options: Any, shows: tuple[bool, bool]) -> None:
    outgoing = apply_field_policy(CHAT | {"stream": True, "stream_options": options}, allow_chat_template=False)
    assert outgoing.body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert (outgoing.shows_usage, outgoing.shows_usage_in_chunks) == shows


def test_other_stream_options_pass() -> None:
    body = CHAT | {"stream": True, "stream_options": {"new": 1}}
    assert apply_field_policy(body, allow_chat_template=False).body["stream_options"]["new"] == 1


def test_without_a_stream_its_options_are_the_engines_to_judge() -> None:
    assert "stream_options" not in apply_field_policy(CHAT, allow_chat_template=False).body
    body = CHAT | {"stream_options": {"include_usage": True}}
    assert apply_field_policy(body, allow_chat_template=False).body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream": True, "stream_options": [1]}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        (
            {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": 1}},
            "stream_options.continuous_usage_stats",
        ),
        ({"cache_salt": 7}, "cache_salt"),
        ({"cache_salt": ""}, "cache_salt"),
    ],
)
def test_fields_of_ours_have_their_types(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        apply_field_policy(CHAT | fields, allow_chat_template=False)
    assert caught.value.param == param


def make_rewriter(*, shows_usage: bool = False, shows_each: bool = False, n: int = 1) -> AnswerRewriter:
    return AnswerRewriter("flan@1a2b3c4d", Outgoing({"n": n}, shows_usage, shows_each))


def rewritten(chunk: dict[str, Any], *, shows_usage: bool, shows_each: bool = False) -> dict[str, Any] | None:
    payload = make_rewriter(shows_usage=shows_usage, shows_each=shows_each).chunk(orjson.dumps(chunk))
    return None if payload is None else orjson.loads(payload)


CHUNK = {"id": "c", "model": "engine", "choices": [{"index": 0, "delta": {"content": "x"}}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


def test_chunks_name_the_version() -> None:
    for shows_usage in (True, False):
        chunk = rewritten(CHUNK, shows_usage=shows_usage)
        assert chunk is not None
        assert chunk["model"] == "flan@1a2b3c4d"
        assert chunk["choices"] == CHUNK["choices"]


def test_usage_hidden() -> None:
    assert rewritten(CHUNK, shows_usage=False) == CHUNK | {"model": "flan@1a2b3c4d"}
    assert rewritten(CHUNK | {"usage": None}, shows_usage=False) == CHUNK | {"model": "flan@1a2b3c4d"}
    assert rewritten(CHUNK | {"usage": USAGE}, shows_usage=False) == CHUNK | {"model": "flan@1a2b3c4d"}
    assert rewritten(CHUNK | {"choices": [], "usage": USAGE}, shows_usage=False) is None


def test_usage_shown() -> None:
    for chunk in (CHUNK, CHUNK | {"usage": USAGE}):
        plain = rewritten(chunk, shows_usage=True)
        assert plain is not None
        assert plain["usage"] is None
    continuous = rewritten(CHUNK | {"usage": USAGE}, shows_usage=True, shows_each=True)
    assert continuous is not None
    assert continuous["usage"] == USAGE
    last = rewritten(CHUNK | {"choices": [], "usage": USAGE}, shows_usage=True)
    assert last is not None
    assert last["usage"] == USAGE


def test_tokens_are_counted_though_hidden() -> None:
    rewriter = make_rewriter()
    assert not rewriter.is_counted
    rewriter.chunk(orjson.dumps(CHUNK | {"choices": [], "usage": USAGE}))
    assert rewriter.is_counted
    assert (rewriter.num_prompt_tokens, rewriter.num_completion_tokens) == (3, 5)


def test_a_stream_that_broke_off_is_counted_by_what_its_choices_said_last() -> None:
    rewriter = make_rewriter(n=2)
    # two prompts of 3 and 4 tokens, two choices each: vLLM numbers the choices through
    for index, num_in, num_out in ((0, 3, 1), (1, 3, 1), (2, 4, 1), (0, 3, 2), (3, 4, 6)):
        usage = {"prompt_tokens": num_in, "completion_tokens": num_out}
        rewriter.chunk(orjson.dumps({"choices": [{"index": index}], "usage": usage}))
    assert (rewriter.num_prompt_tokens, rewriter.num_completion_tokens) == (7, 10)
    rewriter.chunk(orjson.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 11}}))
    assert (rewriter.num_prompt_tokens, rewriter.num_completion_tokens) == (7, 11), "the engine's total, once there"


def test_whole_answers() -> None:
    rewriter = make_rewriter()
    answer = {"id": "c", "model": "engine", "choices": [], "usage": USAGE, "kept": [1.5, None]}
    assert orjson.loads(rewriter.whole(orjson.dumps(answer))) == answer | {"model": "flan@1a2b3c4d"}
    assert rewriter.num_completion_tokens == 5


@pytest.mark.parametrize("raw", [b"", b"<html>", b"[]", b'"x"'])
def test_answers_that_are_no_json_objects(raw: bytes) -> None:
    with pytest.raises(EngineError):
        make_rewriter().whole(raw)
    with pytest.raises(EngineError):
        make_rewriter().chunk(raw)


@pytest.mark.parametrize(
    ("said", "body", "told"),
    [(7, {}, None), (8, {}, 8), (None, {}, None), ("7", {}, "7"), ("stop", {}, "stop"), (7, {"ignore_eos": True}, 7)],
    ids=str,
)
def test_a_models_own_end_is_no_reason_to_stop(said: Any, body: dict[str, Any], told: Any) -> None:
    choice = {"index": 0, "finish_reason": "stop", "stop_reason": said}
    answer = orjson.dumps({"choices": [choice, {"index": 1}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    def rewriter() -> AnswerRewriter:
        return AnswerRewriter("flan/nq", Outgoing(body, shows_usage=False), end_token_ids=(7,))

    assert orjson.loads(rewriter().whole(answer))["choices"] == [{**choice, "stop_reason": told}, {"index": 1}]
    streamed = rewriter().chunk(answer)
    assert streamed is not None
    assert orjson.loads(streamed)["choices"] == [{**choice, "stop_reason": told}, {"index": 1}]


def test_what_models_have_defaults_for_is_in_the_policy() -> None:
    completed = {rule.field for rule in FIELD_POLICY if rule.action == "complete"}
    assert completed == {"stop_token_ids", "max_tokens", *NEUTRAL_SAMPLING}
    body = CHAT | {"stop_token_ids": [1], "temperature": 0.1}
    assert apply_field_policy(body, allow_chat_template=False).body.items() >= {"temperature": 0.1}.items()
