"""Answers of an OpenAI server on their way through: read only as far as tells how they ended."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import orjson

from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.vllm.connections import Answer
from cocktail_serve.errors import CocktailError, EngineError, InvalidRequestError

_FINISHED = b'"finish_reason":"'
_ABORTED = b'"finish_reason":"abort"'


async def read_whole(answer: Answer) -> bytes:
    """The body of a plain answer.

    Raises:
        EngineError: it broke off.
    """
    try:
        return await answer.read()
    except OSError as error:
        raise EngineError(f"the engine's answer broke off: {error!r}") from error


async def iter_events(answer: Answer, lease: Lease) -> AsyncIterator[bytes]:
    """Payloads of a stream of server-sent events, without `[DONE]`; the lease is released at their end.

    `[DONE]` alone is no success: vLLM sends it after an error too.

    Raises:
        EngineError: an error event, or an end before the answer was finished.
        InvalidRequestError: the engine found a fault in the request after it had begun to answer.
        DrainedError: the lease was ended.
    """
    is_finished = False
    rest = b""
    try:
        async for block in answer:
            *events, rest = (rest + block).split(b"\n\n")
            lease.emitted(len(events))  # about one token each
            for event in events:
                if not event.startswith(b"data:"):
                    continue  # a comment that keeps the connection alive
                payload = event[5:].strip()
                if payload == b"[DONE]":
                    if not is_finished:
                        raise EngineError("the engine ended the stream before its answer was finished")
                    with contextlib.suppress(OSError):
                        await answer.read()  # the end of the body, so that the connection can be used again
                    lease.release()
                    return
                if payload.startswith(b'{"error"'):
                    raise _stream_error(payload)
                if _ABORTED in payload:
                    raise lease.error or EngineError("the engine aborted the request")
                is_finished = is_finished or _FINISHED in payload
                yield payload
    except OSError as error:
        raise lease.error or EngineError(f"the engine's stream broke off: {error!r}") from error
    raise lease.error or EngineError("the engine's stream ended before its answer was finished")


def error_message(content: bytes) -> str:
    """The message of an OpenAI-shaped error, or what there is of it."""
    try:
        error = orjson.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return content[:200].decode(errors="replace")


def _stream_error(payload: bytes) -> CocktailError:
    message = error_message(payload)
    try:
        code = orjson.loads(payload)["error"]["code"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        code = None
    if isinstance(code, int) and 400 <= code < 500:
        return InvalidRequestError(message)
    return EngineError(f"the engine failed: {message}")
