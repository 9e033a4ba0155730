"""One generation on its way through: waits for the recipe's turn, streams back, stops when its client goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import orjson
from fastapi import Response
from starlette.types import Send

from cocktail_serve.cocktails.cocktail import ServedModel
from cocktail_serve.engines.base import GenerationEngine
from cocktail_serve.errors import CocktailError, EngineError
from cocktail_serve.gateway.admission import AdmittedRequest
from cocktail_serve.gateway.answer_rewriter import AnswerRewriter
from cocktail_serve.gateway.disconnect import ended_with_client
from cocktail_serve.gateway.error_handlers import error_body, internal_error, stopping_error
from cocktail_serve.gateway.field_policy import Outgoing

logger = logging.getLogger(__name__)

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def forward_generation(
    admitted: AdmittedRequest, engine: GenerationEngine, served: ServedModel, path: str, outgoing: Outgoing
) -> None:
    """Forwards a request to its engine and its answer to the client, whatever becomes of it; the engine's turn is held
    exactly as long as the answer takes. What limits or books generations belongs here.

    An error before the first event is raised, and gets its own status; after it, it becomes the last event of the
    stream: `data: {"error": ...}`, without `[DONE]`.

    Args:
        path: of the engine's own API, as `/v1/completions`.

    Raises:
        CocktailError: as `GenerationEngine.forward`, before anything was sent; `DirectRouting` answers it.
        ClientDisconnect: the client has gone; `RequestBoundary` notes it.
    """
    rewriter = AnswerRewriter(served.model_id, outgoing, end_token_ids=served.generation.end_token_ids)
    async with ended_with_client(admitted.request.receive):
        async with engine.forward(
            served.recipe, path, outgoing.body, tenant=admitted.caller.tenant, generation=served.generation
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


async def _send_events(
    admitted: AdmittedRequest, served: ServedModel, rewriter: AnswerRewriter, events: AsyncIterator[bytes]
) -> None:
    send, is_started = admitted.request.send, False
    last = b"data: [DONE]\n\n"
    try:
        async for payload in events:
            chunk = rewriter.chunk(payload)
            if chunk is None:
                continue
            if not is_started:
                is_started = True
                admitted.observe_first_token(served)
                await send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
            await send({"type": "http.response.body", "body": b"data: %b\n\n" % chunk, "more_body": True})
        if not is_started:
            raise EngineError("the engine ended the stream before its first event")
    except asyncio.CancelledError:
        if is_started:  # the server is stopping; or the client has gone, and nobody reads this
            await _send_last(send, _error_event(stopping_error()))
        raise
    except CocktailError as error:
        if not is_started:
            raise
        last = _error_event(error)
    except Exception:
        if not is_started:
            raise
        logger.exception("a stream of %s failed", served.model_id)
        last = _error_event(internal_error())
    await _send_last(send, last)


async def _send_last(send: Send, event: bytes) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": False})


def _error_event(error: CocktailError) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(error_body(error))
