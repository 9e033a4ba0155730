"""What a request for decisions asks, checked: its input as turns, its questions as options to be read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cocktail_serve.chat_rows import Message
from cocktail_serve.decisions import LABELS, Reading
from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.gateway.schemas.decisions import (
    MAX_OPTIONS_IN_ALL,
    MAX_QUESTIONS,
    AnyQuestion,
    ChoiceQuestion,
    DecisionRequest,
    PredicateQuestion,
    ScoreQuestion,
)
from cocktail_serve.questions import MAX_OPTIONS, TRUTH, Question, fault_of_values, make_question
from cocktail_serve.request_schema import parse_as

_KINDS: Mapping[str, type[AnyQuestion]] = {
    "predicate": PredicateQuestion,
    "choice": ChoiceQuestion,
    "score": ScoreQuestion,
}

_PARTS: Mapping[str, Mapping[str, str]] = {
    "user": {"input_text": "text", "input_json": "data"},
    "developer": {"input_text": "text"},
    "system": {"input_text": "text"},
    "assistant": {"output_text": "text", "refusal": "refusal"},
}
"""By role, the parts that a message may have, and where each has what it says."""

_NOT_SERVED = {
    "input_image": "images are not read here: describe it in a text",
    **dict.fromkeys(
        ("function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output"),
        "calls of tools are not read here: write the call, or what came of it, into a message",
    ),
}


def parse_decisions(body: Mapping[str, Any]) -> DecisionRequest:
    """The body of a request for decisions.

    Raises:
        InvalidRequestError: a field that is unknown, missing or of another type, or more options than can be read; of
            a question, `param` begins with `questions.{index}`.
    """
    questions = body.get("questions")
    if isinstance(questions, list) and 0 < len(questions) <= MAX_QUESTIONS:
        _check_num_options(questions)
        # one by one, so that errors name fields as the request does
        body = {**body, "questions": [_parse_question(each, index) for index, each in enumerate(questions)]}
    return parse_as(DecisionRequest, body)


def check_turns(value: Any) -> tuple[Message, ...]:
    """The `input` of a request as turns; instructions of a `developer` are the system's.

    Raises:
        InvalidRequestError: neither a text nor messages, or what is not read here; `param` is `input.{index}`.
    """
    if isinstance(value, str):
        return (("user", value),)
    if not isinstance(value, list) or not value:
        raise InvalidRequestError("input must be a text, or a list with at least one message", param="input")
    return tuple(_turn(item, f"input[{index}]", f"input.{index}") for index, item in enumerate(value))


def check_questions(
    questions: Sequence[AnyQuestion], turns: Sequence[Message], *, reading: Reading | None
) -> list[Question]:
    """The questions of a request, each with the texts of its options.

    Args:
        turns: the input.
        reading: the one that was asked for.

    Raises:
        InvalidRequestError: an option that is empty or comes twice, more than there are letters, or nothing to ask
            about; `param` names it.
    """
    checked = [_question(question, index) for index, question in enumerate(questions)]
    is_blank = not any(content.strip() for _, content in turns)
    for index, question in enumerate(checked):
        param = f"questions.{index}"
        if is_blank and not question.instructions.strip():
            raise InvalidRequestError(
                f"the input is empty, and so are the instructions of questions[{index}]: there is nothing to ask",
                param=f"{param}.instructions",
            )
        if reading == "labels" and len(question.options) > len(LABELS):
            raise InvalidRequestError(
                f"questions[{index}] has {len(question.options)} options, and there are {len(LABELS)} letters to read "
                "them by: ask for reading 'verbatim', which takes more",
                param=param,
            )
    return checked


def _check_num_options(questions: Sequence[Any]) -> None:
    """Before any of them is parsed: 160,000 options would hold up everybody else's requests for a second."""
    total = sum(map(_num_options, questions))
    if total > MAX_OPTIONS_IN_ALL:
        raise InvalidRequestError(
            f"the questions have {total} options in all, and {MAX_OPTIONS_IN_ALL} are read at once: send several "
            "requests",
            param="questions",
        )


def _num_options(question: Any) -> int:
    """Of a question that is not checked yet; where it has too many itself, that is said of it later."""
    given = [question.get(key) for key in ("choices", "levels")] if isinstance(question, Mapping) else []
    return next((min(len(each), MAX_OPTIONS) for each in given if isinstance(each, list)), len(TRUTH))


def _parse_question(value: Any, index: int) -> AnyQuestion:
    param = f"questions.{index}"
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InvalidRequestError(
            f"questions[{index}] must be an object whose type is {', '.join(_KINDS)}; got {kind!r:.40}",
            param=f"{param}.type" if isinstance(value, Mapping) else param,
        )
    return parse_as(_KINDS[kind], value, param=param)


def _question(question: AnyQuestion, index: int) -> Question:
    name, param = f"questions[{index}].instructions", f"questions.{index}.instructions"
    instructions = _content(question.instructions, _PARTS["user"], name, param)
    values: list[str | bool]
    if isinstance(question, PredicateQuestion):
        return make_question("predicate", instructions, TRUTH, ("", ""))
    if isinstance(question, ChoiceQuestion):
        key, values = "choices", [choice.value for choice in question.choices]
        descriptions = [choice.description or "" for choice in question.choices]
    else:
        key, values = "levels", [level.label for level in question.levels]
        descriptions = [level.description or "" for level in question.levels]
    fault = fault_of_values(values)
    if fault is not None:
        place, what = fault
        raise InvalidRequestError(f"questions[{index}].{key}[{place}] {what}", param=f"questions.{index}.{key}.{place}")
    return make_question(question.type, instructions, values, descriptions)


def _turn(item: Any, name: str, param: str) -> Message:
    if not isinstance(item, Mapping):
        raise InvalidRequestError(f"{name} must be a message, got {type(item).__name__}", param=param)
    kind, role = item.get("type", "message"), item.get("role")
    if isinstance(kind, str) and kind in _NOT_SERVED:
        raise InvalidRequestError(f"{name} is of type {kind!r}: {_NOT_SERVED[kind]}", param=param)
    if kind != "message" or not isinstance(role, str) or role not in _PARTS:
        raise InvalidRequestError(
            f"{name} must be a message whose role is {', '.join(_PARTS)}; got type {kind!r:.40} and role {role!r:.40}",
            param=param,
        )
    content = _content(item.get("content"), _PARTS[role], f"{name}.content", f"{param}.content")
    return ("system" if role == "developer" else role, content)


def _content(value: Any, parts: Mapping[str, str], name: str, param: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequestError(f"{name} must be a text or a list of parts, got {type(value).__name__}", param=param)
    return "\n".join(_part(part, parts, f"{name}[{i}]", f"{param}.{i}") for i, part in enumerate(value))


def _part(part: Any, parts: Mapping[str, str], name: str, param: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind in _NOT_SERVED:
        raise InvalidRequestError(f"{name} is of type {kind!r}: {_NOT_SERVED[kind]}", param=param)
    if not isinstance(kind, str) or kind not in parts:
        raise InvalidRequestError(
            f"{name} must be an object whose type is {' or '.join(parts)}; got {kind!r:.40}", param=param
        )
    said = part.get(parts[kind])
    if kind == "input_json":
        is_list = isinstance(said, list) and all(isinstance(each, dict) for each in said)
        if not isinstance(said, dict) and not is_list:
            raise InvalidRequestError(f"{name}.data must be an object, or a list of objects", param=f"{param}.data")
        return json.dumps(said, ensure_ascii=False)
    if not isinstance(said, str):
        raise InvalidRequestError(f"{name}.{parts[kind]} must be a text", param=f"{param}.{parts[kind]}")
    return said
