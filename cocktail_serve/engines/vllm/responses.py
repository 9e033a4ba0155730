"""Answers of an OpenAI server on their way through: read only as far as tells how they ended."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.vllm.connections import EngineResponse
from cocktail_serve.engines.vllm.errors import engine_error, is_error
from cocktail_serve.errors import EngineError

_FINISHED = b'"finish_reason":"'
_ABORTED = b'"finish_reason":"abort"'

_LAST_EVENTS = (b"event: response.completed", b"event: response.incomplete", b"event: response.failed")
"""How streams of `/v1/responses` end, which have no `[DONE]`."""


async def read_whole(answer: EngineResponse) -> bytes:
    """The body of a plain answer.

    Raises:
        EngineError: it broke off.
    """
    try:
        return await answer.read()
    except OSError as error:
        raise EngineError(f"the engine's answer broke off: {error!r}") from error


async def iter_events(answer: EngineResponse, lease: Lease) -> AsyncIterator[bytes]:
    """Payloads of a stream of server-sent events, without `[DONE]`; the lease is released at their end.

    `[DONE]` alone is no success: vLLM sends it after an error too.

    Raises:
        CocktailError: an error event; see `engine_error`.
        EngineError: an end before the answer was finished.
        DrainedError: the lease was ended.
    """
    is_finished = False
    rest = b""
    try:
        async for block in answer:
            *events, rest = (rest + block).split(b"\n\n")
            lease.emitted(len(events))  # about one token each
            for event in events:
                payload = _payload(event)
                if payload is None:
                    continue
                if payload == b"[DONE]":
                    if not is_finished:
                        raise EngineError("the engine ended the stream before its answer was finished")
                    await _finish(answer, lease)
                    return
                if event.startswith(_LAST_EVENTS):
                    await _finish(answer, lease)
                    yield payload
                    return
                if is_error(payload):
                    raise engine_error(500, payload)  # the stream's own status says nothing
                if _ABORTED in payload:
                    raise lease.error or EngineError("the engine aborted the request")
                is_finished = is_finished or _FINISHED in payload
                yield payload
    except OSError as error:
        raise lease.error or EngineError(f"the engine's stream broke off: {error!r}") from error
    raise lease.error or EngineError("the engine's stream ended before its answer was finished")


def _payload(event: bytes) -> bytes | None:
    """The data of an event, with a type or without; None of a comment, which keeps the connection alive."""
    if event.startswith(b"event:"):
        event = event.partition(b"\n")[2]
    return event[5:].strip() if event.startswith(b"data:") else None


async def _finish(answer: EngineResponse, lease: Lease) -> None:
    """Reads the end of the body, so that the connection can be used again, and gives the lease back."""
    with contextlib.suppress(OSError):
        await answer.read()
    lease.release()
