"""What an engine's server says when it fails or refuses: each status stands for one error, whoever reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import pytest

from cocktail_serve.engines.vllm.errors import KINDS, engine_error, error_message, is_error
from cocktail_serve.errors import (
    CheckpointError,
    ClientError,
    CocktailError,
    ContextLengthError,
    EngineError,
    IncompatibleModelsError,
    InvalidMixError,
    InvalidRequestError,
    ModelChangedError,
    ModelNotReadyError,
    NotFiniteError,
)
from cocktail_serve.gateway.error_handlers import http_error

NOT_THE_ENGINES = {
    **dict.fromkeys((400, 413, 422, 501), (InvalidRequestError, 400, "invalid_request")),
    **dict.fromkeys((429, 503), (ModelNotReadyError, 503, "model_not_ready")),
}
"""Error, and status and code of its answer; of all other statuses the engine is at fault."""


def error_body(message: str, code: Any, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": param, "code": code}}


def test_no_status_is_left_out() -> None:
    assert set(KINDS) == {status.value for status in HTTPStatus if status >= 400}


@pytest.mark.parametrize("status", [*(status.value for status in HTTPStatus if status >= 400), 499, 599])
def test_a_status_stands_for_one_error_in_whole_answers_and_in_streams(status: int) -> None:
    kind, answered, code = NOT_THE_ENGINES.get(status, (EngineError, 502, "engine_error"))
    body = error_body("something is wrong", status)
    seen = [engine_error(status, json.dumps(body).encode()), engine_error(status, body)]
    if status in KINDS:  # inside a stream it comes only as a code, and the stream's own status says nothing
        seen.append(engine_error(500, body))
    for error in seen:
        assert (type(error), http_error(error).status, error.code) == (kind, answered, code)
        assert "something is wrong" in error.message


@pytest.mark.parametrize(
    ("status", "code", "message", "expected"),
    [
        (400, 400, "bad top_p", InvalidRequestError),
        (400, 400, "This model's maximum context length is 8 tokens", ContextLengthError),
        (400, 400, "Input length (9) exceeds model's maximum context length (8).", ContextLengthError),
        (400, 400, "The decoder prompt (length 9) is longer than the maximum model length of 8.", ContextLengthError),
        (500, 400, "This model's maximum context length is 8 tokens", ContextLengthError),
        (400, "context_length_exceeded", "at most 8 tokens", ContextLengthError),
        (501, 501, "beam search is not built in", InvalidRequestError),
        (500, 500, "EngineCore died", EngineError),
        (500, 500, "EngineCore died at its maximum context length", EngineError),
        (404, 404, "the model does not exist", EngineError),
        (503, 503, "overloaded", ModelNotReadyError),
        (500, 400, "found late, inside a stream", InvalidRequestError),
        (500, True, "a code that is no status", EngineError),
        (200, 503, "overloaded", ModelNotReadyError),
        (200, None, "an error without a status", EngineError),
    ],
)
def test_engine_errors(status: int, code: int | str | None, message: str, expected: type[CocktailError]) -> None:
    error = engine_error(status, error_body(message, code, "p"))
    assert type(error) is expected
    assert message in error.message
    assert isinstance(error.code, str)
    assert error.param == ("p" if isinstance(error, InvalidRequestError) and isinstance(code, int) else None)


@pytest.mark.parametrize("kind", [ModelChangedError, CheckpointError, IncompatibleModelsError, NotFiniteError])
def test_models_that_cannot_be_mixed_keep_their_error(kind: type[ClientError]) -> None:
    error = engine_error(400, error_body("tensor x", kind.code, "recipe"), what="mixing", unfit=InvalidMixError)
    assert (type(error), error.message, error.param) == (kind, "tensor x", None)


def test_an_argument_that_vllm_names_is_said_with_its_setting() -> None:
    says = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    error = engine_error(400, error_body(says, 400))
    assert error.message == (
        f"{says}; the operator sets enable-auto-tool-choice, tool-call-parser in the pool's engine.args"
    )
    assert engine_error(400, error_body("a -- b --1 x--y", 400)).message == "a -- b --1 x--y"


def test_who_asks_names_what_failed_and_what_a_fault_of_the_request_is_called() -> None:
    refused = engine_error(400, error_body("no such model", "invalid_recipe", "recipe"), unfit=InvalidMixError)
    assert (type(refused), refused.message, refused.param) == (InvalidMixError, "no such model", None)
    failed = engine_error(500, error_body("no memory", "mix_failed"), what="mixing", unfit=InvalidMixError)
    assert (type(failed), failed.message) == (EngineError, "mixing failed with status 500: no memory")


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'"x"', b'{"detail": "x"}', [], "x", None, 7])
def test_answers_that_hold_no_error_have_their_status(content: Any) -> None:
    assert type(engine_error(400, content)) is InvalidRequestError
    assert type(engine_error(502, content)) is EngineError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"error": {"message": "no such model"}}', "no such model"),
        ({"error": {"message": "no such model"}}, "no such model"),
        (b'{"error": "poisoned"}', "poisoned"),
        (b'{"error": {"code": 5}}', '{"error": {"code": 5}}'),
        (b'{"detail": "x"}', '{"detail": "x"}'),
        ({"detail": "x"}, '{"detail":"x"}'),
        (b'["x"]', '["x"]'),
        (b"Internal Server Error\xff", "Internal Server Error\ufffd"),
        (b"x" * 1000, "x" * 200),
    ],
)
def test_the_message_is_found_in_whatever_was_answered(content: Any, message: str) -> None:
    assert error_message(content) == message


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ((b'{"error":{"message":"x"}}', b'{"error": {"message": "x"}}', b'{"error":"x"}'), True),
        ((b'{"id":"c","choices":[{"text":"{\\"error\\""}]}', b"", b"[DONE]"), False),
    ],
)
def test_errors_are_told_from_answers(contents: Sequence[bytes], expected: bool) -> None:
    assert [is_error(content) for content in contents] == [expected] * len(contents)
