"""What the engine answered, made ours: the version's id as `model`, usage as asked for, errors in the one shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from cocktail_serve.errors import (
    CocktailError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelNotReadyError,
)


class AnswerRewriter:
    """Rewrites the answer of one request.

    Attributes:
        num_prompt_tokens: tokens read, once the engine has said.
        num_completion_tokens: tokens generated, likewise.
    """

    __slots__ = ("_model_id", "_shows_usage", "num_completion_tokens", "num_prompt_tokens")

    def __init__(self, model_id: str, *, shows_usage: bool) -> None:
        self._model_id = model_id
        self._shows_usage = shows_usage
        self.num_prompt_tokens = 0
        self.num_completion_tokens = 0

    def whole(self, status: int, body: bytes) -> bytes:
        """A plain answer.

        Raises:
            CocktailError: the answer is an error; see `upstream_error`.
        """
        answer = _object(body)
        if status >= 400 or "error" in answer:
            raise upstream_error(status, answer)
        answer["model"] = self._model_id
        self._count(answer.get("usage"))
        return orjson.dumps(answer)

    def chunk(self, payload: bytes) -> bytes | None:
        """The data of one event; None for the usage chunk that the client did not ask for.

        With `include_usage`, OpenAI sends `usage: null` in every chunk but the last and usage without choices in the
        last; without, no chunk has the field.

        Raises:
            CocktailError: the event is an error.
        """
        chunk = _object(payload)
        if "error" in chunk:
            raise upstream_error(500, chunk)
        chunk["model"] = self._model_id
        usage = chunk.get("usage")
        if usage is not None:
            self._count(usage)
        if self._shows_usage:
            chunk.setdefault("usage", None)
        elif "usage" in chunk:
            if not chunk.get("choices"):
                return None
            del chunk["usage"]
        return orjson.dumps(chunk)

    def _count(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self.num_prompt_tokens = usage.get("prompt_tokens") or 0
            self.num_completion_tokens = usage.get("completion_tokens") or 0


def upstream_error(status: int, answer: Mapping[str, Any]) -> CocktailError:
    """The error that an engine's error answer stands for: the request's fault (400) or the engine's (502).

    vLLM's `code` is the status as a number, here it is a name; inside a stream the status comes only that way. It says
    501 for what it was not built to do, which is the request's fault too.
    """
    detail = answer.get("error")
    if not isinstance(detail, Mapping):
        return EngineError(f"the engine answered with status {status}")
    message = str(detail.get("message") or f"the engine answered with status {status}")
    param = detail.get("param")
    param = param if isinstance(param, str) else None
    code = detail.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        status = code
    if status in (400, 413, 422, 501):
        if code == ContextLengthError.code or "maximum context length" in message:
            return ContextLengthError(message, param=param)
        return InvalidRequestError(message, param=param)
    if status in (429, 503):
        return ModelNotReadyError(message)
    # 401, 403, 404 and 409 are between the gateway and its engine: no fault of the request's
    return EngineError(f"the engine answered with status {status}: {message}")


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise EngineError(f"the engine's answer is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise EngineError(f"the engine's answer is no JSON object but {type(value).__name__}")
    return value
