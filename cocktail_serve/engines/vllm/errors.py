"""What an engine's server says when it fails or refuses, made ours: the one place where its errors are translated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson

from cocktail_serve.errors import (
    CocktailError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelNotReadyError,
    error_of_code,
)

KINDS: Mapping[int, type[CocktailError]] = {
    # 401, 403, 404 and 409 are between the gateway and its engine: no fault of the request's
    **dict.fromkeys((status for status in HTTPStatus if status >= 400), EngineError),
    # 501: what vLLM was not built to do, which is the request's fault too
    **dict.fromkeys((400, 413, 422, 501), InvalidRequestError),
    **dict.fromkeys((429, 503), ModelNotReadyError),
}
"""What each status of the server stands for."""

_TOO_LONG = ("maximum context length", "maximum model length")
"""How vLLM says that a prompt does not fit; its `code` is only the status."""

_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]+)")
"""How vLLM names an argument of its command line, to who asks what it was not started for: tools, say."""

_ERROR = b'{"error"'
"""How every body and every event begins that holds an error."""


def is_error(content: bytes) -> bool:
    """Whether a body, or the payload of an event, is an error."""
    return content.startswith(_ERROR)


def engine_error(
    status: int, content: Any, *, what: str = "the engine", unfit: type[InvalidRequestError] = InvalidRequestError
) -> CocktailError:
    """The error that an answer or an event of an engine's server stands for.

    vLLM's `code` is the status as a number, and inside a stream, whose own status is 200, it comes only that way; the
    plugin's is a name, which decides where it is one of ours for models that cannot be mixed.

    Args:
        status: of the whole answer.
        content: the answer as it came, or the JSON in it.
        what: names what failed, in errors that are not the request's.
        unfit: what a fault of the request is called.
    """
    detail = _detail(content)
    message, code, param = error_message(content), detail.get("code"), detail.get("param")
    if isinstance(code, int) and code in KINDS:
        status = code
    kind = KINDS.get(status, EngineError)
    if not issubclass(kind, InvalidRequestError):
        return kind(f"{what} failed with status {status}: {message}")
    if isinstance(code, str) and (refused := error_of_code(code, message)) is not None:
        return refused
    if isinstance(code, str) or not isinstance(param, str):
        param = None  # the plugin's names a field of its own routes
    is_too_long = code == ContextLengthError.code or any(words in message for words in _TOO_LONG)
    return (ContextLengthError if is_too_long else unfit)(_with_setting(message), param=param)


def error_message(content: Any) -> str:
    """The message of an OpenAI-shaped error, or what there is of it.

    Args:
        content: as of `engine_error`.
    """
    error = _json(content)
    if isinstance(error, dict) and "error" in error:
        error = error["error"]
        if not isinstance(error, dict):
            return str(error)
        if "message" in error:
            return str(error["message"])
    raw = content if isinstance(content, bytes) else orjson.dumps(content)
    return raw[:200].decode(errors="replace")


def _with_setting(message: str) -> str:
    """With what sets the arguments that a message names: nobody here types vLLM's command line."""
    options = ", ".join(dict.fromkeys(_OPTION.findall(message)))
    return f"{message}; the operator sets {options} in the pool's engine.args" if options else message


def _detail(content: Any) -> Mapping[str, Any]:
    answer = _json(content)
    error = answer.get("error") if isinstance(answer, dict) else None
    return error if isinstance(error, dict) else {}


def _json(content: Any) -> Any:
    if not isinstance(content, bytes):
        return content
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return None
