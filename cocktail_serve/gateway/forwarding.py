"""One generation on its way through: waits for the recipe's turn, streams back, stops when its client goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import ClassVar, Protocol

from fastapi import Response
from starlette.types import Send

from cocktail_serve.cocktails.cocktail import ServedModel
from cocktail_serve.engines.base import RESPONSES_PATH, GenerationEngine
from cocktail_serve.errors import CocktailError, EngineError
from cocktail_serve.gateway.admission import AdmittedRequest
from cocktail_serve.gateway.answer_rewriter import AnswerRewriter
from cocktail_serve.gateway.disconnect import ended_with_client
from cocktail_serve.gateway.error_handlers import http_error, internal_error, stopping_error
from cocktail_serve.gateway.field_policy import Outgoing
from cocktail_serve.gateway.response_rewriter import ResponseRewriter

logger = logging.getLogger(__name__)

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Rewriter(Protocol):
    """Makes what the engine answers ours, and counts its tokens; what the engine has not said is counted by no one.

    Attributes:
        last_event: what the end of a stream is told by.
    """

    last_event: ClassVar[bytes]

    @property
    def is_counted(self) -> bool: ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_completion_tokens(self) -> int: ...

    def whole(self, body: bytes) -> bytes: ...

    def event(self, payload: bytes) -> bytes | None: ...

    def error_event(self, error: CocktailError) -> bytes: ...


async def forward_generation(
    admitted: AdmittedRequest, engine: GenerationEngine, served: ServedModel, path: str, outgoing: Outgoing
) -> None:
    """Forwards a request to its engine and its answer to the client, whatever becomes of it; the engine's turn is held
    exactly as long as the answer takes. What limits or books generations belongs here.

    An error before the first event is raised, and gets its own status; after it, it becomes the last event of the
    stream: `data: {"error": ...}`, without `[DONE]`; of responses, `event: error`.

    Args:
        path: of the engine's own API, as `/v1/completions`.

    Raises:
        CocktailError: as `GenerationEngine.forward`, before anything was sent; `DirectRouting` answers it.
        ClientDisconnect: the client has gone; `RequestBoundary` notes it.
    """
    rewriter = _rewriter(path, served, outgoing)
    async with ended_with_client(admitted.request.receive):
        async with engine.forward(
            served.recipe,
            path,
            outgoing.body,
            tenant=admitted.caller.tenant,
            generation=served.generation,
            background=admitted.background,
        ) as forwarded:
            try:
                if forwarded.events is not None:
                    await _send_events(admitted, served, rewriter, forwarded.events)
                    return
                body = rewriter.whole(forwarded.body or b"")
            finally:
                if rewriter.is_counted:
                    num_in, num_out = rewriter.num_prompt_tokens, rewriter.num_completion_tokens
                    forwarded.settle(num_in + num_out)
                    admitted.metered.used(served, num_in=num_in, num_out=num_out)
        # the turn is over: a client that reads slowly holds up nobody
        admitted.observe_first_token(served)
        await admitted.request.answer(Response(body, media_type="application/json"))


def _rewriter(path: str, served: ServedModel, outgoing: Outgoing) -> Rewriter:
    if path == RESPONSES_PATH:
        return ResponseRewriter(served.model_id, outgoing)
    return AnswerRewriter(served.model_id, outgoing, end_token_ids=served.generation.end_token_ids)


async def _send_events(
    admitted: AdmittedRequest, served: ServedModel, rewriter: Rewriter, events: AsyncIterator[bytes]
) -> None:
    send, is_started, is_observed = admitted.request.send, False, False
    last = rewriter.last_event
    try:
        async for payload in events:
            event = rewriter.event(payload)
            if event is None:
                continue
            if not is_observed and rewriter.is_counted:
                is_observed = True
                admitted.observe_first_token(served)
            if not is_started:
                is_started = True
                await send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if not is_started:
            raise EngineError("the engine ended the stream before its first event")
    except asyncio.CancelledError:
        if is_started:  # the server is stopping; or the client has gone, and nobody reads this
            await _send_last(send, _last_event(admitted, rewriter, stopping_error()))
        raise
    except CocktailError as error:
        if not is_started:
            raise
        last = _last_event(admitted, rewriter, error)
    except Exception:
        if not is_started:
            raise
        logger.exception("a stream of %s failed", served.model_id)
        last = _last_event(admitted, rewriter, internal_error())
    await _send_last(send, last)


async def _send_last(send: Send, event: bytes) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": False})


def _last_event(admitted: AdmittedRequest, rewriter: Rewriter, error: CocktailError) -> bytes:
    """The end of a stream that broke off, whose status says nothing of it."""
    admitted.exchange.error, admitted.exchange.broken_status = error.code, http_error(error).status
    return rewriter.error_event(error)
