"""Requests for decisions and what is made of log-probabilities, without a server."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from cocktail_serve.engines.base import Decided
from cocktail_serve.engines.token_estimates import reserved_tokens
from cocktail_serve.errors import InvalidRequestError, NotFiniteError
from cocktail_serve.gateway.decision_answers import encode_decision
from cocktail_serve.gateway.decision_fields import check_questions, check_turns, parse_decisions
from cocktail_serve.gateway.schemas.decisions import MAX_OPTIONS_IN_ALL, MAX_QUESTIONS
from cocktail_serve.questions import MAX_OPTIONS, PREDICATE_CUE, Option, Question

PREDICATE = {"type": "predicate", "instructions": "it is good"}
CHOICE = {"type": "choice", "instructions": "which?", "choices": [{"value": "a"}, {"value": "b"}]}
SCORE = {"type": "score", "instructions": "how?", "levels": [{"label": "low"}, {"label": "high", "description": "h"}]}


def body(*questions: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "flan", "input": "a text", "questions": list(questions), **fields}


def checked(*questions: Any) -> list[Question]:
    return check(body(*questions))


def check(body: dict[str, Any]) -> list[Question]:
    wanted = parse_decisions(body)
    return check_questions(wanted.questions, check_turns(wanted.input), reading=wanted.reading)


def choices(*values: Any) -> dict[str, Any]:
    return {**CHOICE, "choices": [{"value": value} for value in values]}


def test_the_options_of_each_kind() -> None:
    assert checked(PREDICATE, CHOICE, SCORE) == [
        Question("it is good", (Option("true"), Option("false")), PREDICATE_CUE),
        Question("which?", (Option("a"), Option("b"))),
        Question("how?", (Option("low"), Option("high", "h"))),
    ]


def levels(*labels: str) -> dict[str, Any]:
    return {**SCORE, "levels": [{"label": label} for label in labels]}


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (("yes", "no"), ["yes", "no"]),
        ((True, False), ["true", "false"]),
        ((True, "false"), ["true", "false"]),
        ((True, "true", "no"), ["true", '"true"', '"no"']),
    ],
)
def test_booleans_are_no_texts(values: tuple[Any, ...], texts: list[str]) -> None:
    (question,) = checked(choices(*values))
    assert [option.text for option in question.options] == texts


def test_instructions_in_parts() -> None:
    parts = [{"type": "input_text", "text": "which of"}, {"type": "input_json", "data": {"a": ["é", None]}}]
    (question,) = checked({**CHOICE, "instructions": parts})
    assert question.instructions == 'which of\n{"a": ["é", null]}'


def test_the_input_in_turns() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "system", "content": [{"type": "input_text", "text": "be kind"}]},
        {"role": "user", "type": "message", "content": [{"type": "input_json", "data": [{"a": 1}]}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "phase": "final_answer"},
    ]
    assert check_turns(messages) == (
        ("system", "be brief"),
        ("system", "be kind"),
        ("user", '[{"a": 1}]'),
        ("assistant", "no"),
    )
    assert check_turns("text") == (("user", "text"),)


@pytest.mark.parametrize(
    ("value", "param", "message"),
    [
        ([], "input", "at least one message"),
        (None, "input", "must be a text"),
        (["text"], "input.0", "must be a message"),
        ([{"role": "tool", "content": "x"}], "input.0", "role"),
        ([{"role": "user"}], "input.0.content", "a text or a list of parts"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input.0.content.0", "images"),
        ([{"role": "user", "content": [{"type": "output_text", "text": "x"}]}], "input.0.content.0", "input_text or"),
        ([{"role": "system", "content": [{"type": "input_json", "data": {}}]}], "input.0.content.0", "input_text"),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": 1}]}],
            "input.0.content.0.text",
            "must be a text",
        ),
        ([{"role": "user", "content": [{"type": "input_json", "data": 1}]}], "input.0.content.0.data", "an object"),
        ([{"role": "user", "content": ["x"]}], "input.0.content.0", "an object whose type"),
        ([{"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}], "input.0", "calls of tools"),
        ([{"type": ["message"], "role": "user", "content": "x"}], "input.0", "must be a message"),
    ],
)
def test_what_is_no_input(value: Any, param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        check_turns(value)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"questions": []}, "questions", "at least 1"),
        ({"questions": [PREDICATE] * (MAX_QUESTIONS + 1)}, "questions", f"at most {MAX_QUESTIONS}"),
        ({"questions": "x"}, "questions", "list"),
        ({"questions": ["x"]}, "questions.0", "must be an object"),
        ({"questions": [PREDICATE, {"type": "rank", "instructions": "x"}]}, "questions.1.type", "'rank'"),
        ({"questions": [{"instructions": "x"}]}, "questions.0.type", "predicate, choice, score"),
        ({"questions": [{"type": "predicate"}]}, "questions.0.instructions", "required"),
        ({"questions": [{**PREDICATE, "instructions": 1}]}, "questions.0.instructions", "a text or a list"),
        ({"questions": [{**PREDICATE, "choices": []}]}, "questions.0.choices", "unknown field"),
        ({"questions": [{**PREDICATE, "name": 1}]}, "questions.0.name", "string"),
        ({"questions": [choices("a")]}, "questions.0.choices", "at least 2"),
        ({"questions": [choices(*map(str, range(MAX_OPTIONS + 1)))]}, "questions.0.choices", f"at most {MAX_OPTIONS}"),
        ({"questions": [choices("a", "b", "a")]}, "questions.0.choices.2", "came before"),
        ({"questions": [choices(True, True)]}, "questions.0.choices.1", "came before"),
        ({"questions": [choices("a", " ")]}, "questions.0.choices.1", "empty"),
        ({"questions": [choices("a", 1)]}, "questions.0.choices.1.value", "a text, true or false"),
        ({"questions": [levels("a", "")]}, "questions.0.levels.1.label", "at least 1"),
        ({"questions": [levels("a", "a")]}, "questions.0.levels.1", "came before"),
        ({"questions": [{**PREDICATE, "instructions": ""}], "input": " "}, "questions.0.instructions", "nothing"),
        ({"questions": [choices(*map(str, range(27)))], "reading": "labels"}, "questions.0", "26 letters"),
        ({"reading": "guess"}, "reading", "labels"),
        ({"stream": True}, "stream", "unknown field"),
        ({"input": None}, "input", "must be a text"),
    ],
)  # fmt: skip
def test_what_is_no_request(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        check({**body(PREDICATE), **fields})
    assert caught.value.param == param


def test_the_options_of_all_questions_are_bounded() -> None:
    most = MAX_OPTIONS_IN_ALL // MAX_OPTIONS
    question = choices(*map(str, range(MAX_OPTIONS)))
    checked(*[question] * most)
    with pytest.raises(InvalidRequestError, match="send several requests"):
        parse_decisions(body(*[question] * (most + 1)))
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_OPTIONS}") as caught:
        parse_decisions(body(choices(*map(str, range(MAX_OPTIONS_IN_ALL + 1)))))
    assert caught.value.param == "questions.0.choices"


def test_answers() -> None:
    wanted = parse_decisions(body({**PREDICATE, "name": "p"}, choices("no", True), SCORE))
    log_probs = [[math.log(0.3), math.log(0.1)], [math.log(0.1), math.log(0.4)], [math.log(0.02), math.log(0.06)]]
    answer = json.loads(encode_decision(Decided(log_probs, 70, 16), wanted.questions, model_id="flan"))
    assert answer["model"] == "flan"
    predicate, choice, score = answer["answers"]
    assert predicate == {"type": "predicate", "name": "p", "probability": pytest.approx(0.75)}
    assert (choice["choice"], choice["name"]) == (True, None)
    assert choice["confidence"] == pytest.approx(0.4), "the winner's share times the mass of all"
    assert choice["probabilities"] == [
        {"value": "no", "probability": pytest.approx(0.2)},
        {"value": True, "probability": pytest.approx(0.8)},
    ]
    assert (score["score"], score["confidence"]) == (pytest.approx(0.75), pytest.approx(0.06))
    assert [(each["value"], each["label"]) for each in score["probabilities"]] == [(0, "low"), (1, "high")]
    assert answer["usage"] == {
        "input_tokens": 70,
        "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 70,
    }


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_is_no_probability(value: float) -> None:
    wanted = parse_decisions(body(PREDICATE))
    with pytest.raises(NotFiniteError, match="bfloat16"):
        encode_decision(Decided([[-1.0, value]], 1, 0), wanted.questions, model_id="flan")


def test_each_question_is_reserved_with_the_input() -> None:
    one = body(PREDICATE, input="x" * 4000)
    several = body(*[PREDICATE] * 10, input="x" * 4000)
    assert reserved_tokens(one, num_bytes=len(json.dumps(one))) == pytest.approx(1030, abs=20)
    assert reserved_tokens(several, num_bytes=len(json.dumps(several))) == pytest.approx(10 * 1020, rel=0.03)
    inline = {**several, "cocktail": {"examples": [{"input": "y" * 40_000, "output": "z"}]}}
    more = reserved_tokens(inline, num_bytes=len(json.dumps(inline))) - reserved_tokens(
        several, num_bytes=len(json.dumps(several))
    )
    assert more == pytest.approx(10_000, abs=50), "its examples are not asked about"
