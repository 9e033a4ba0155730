"""One generation on its way through: waits for the recipe's turn, streams back, stops when its client goes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

from cocktail_serve.cocktails.cocktail import Served
from cocktail_serve.engines.base import GenerationEngine
from cocktail_serve.errors import CocktailError, EngineError, ModelNotReadyError, ServerError
from cocktail_serve.gateway.answers import AnswerRewriter
from cocktail_serve.gateway.disconnect import ended_with_client
from cocktail_serve.gateway.error_handlers import error_body
from cocktail_serve.gateway.field_policy import Outgoing
from cocktail_serve.gateway.metering import Ticket
from cocktail_serve.gateway.metrics import GatewayMetrics

logger = logging.getLogger(__name__)

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class GenerationResponse(Response):
    """Forwards a request when it is sent, so that the engine's turn is held exactly as long as the answer takes.

    An error before the first event is raised and gets its own status; after it, it becomes the last event of the
    stream: `data: {"error": ...}`, without `[DONE]`.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        served: Served,
        path: str,
        outgoing: Outgoing,
        *,
        tenant: str,
        ticket: Ticket,
        metrics: GatewayMetrics,
    ) -> None:
        super().__init__()
        self._engine = engine
        self._served = served
        self._path = path
        self._outgoing = outgoing
        self._tenant = tenant
        self._ticket = ticket
        self._metrics = metrics
        self._rewriter = AnswerRewriter(served.model_id, outgoing, end_token_ids=served.generation.end_token_ids)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start and end of every generation, whatever becomes of it: what limits or books generations belongs here."""
        started_at: float = scope["state"]["started_at"]
        settle: Callable[[int], object] | None = None
        try:
            async with ended_with_client(receive):
                async with self._engine.forward(
                    self._served.recipe,
                    self._path,
                    self._outgoing.body,
                    tenant=self._tenant,
                    settings=self._served.generation,
                ) as forwarded:
                    settle = forwarded.settle
                    if forwarded.events is not None:
                        await self._send_events(forwarded.events, send, started_at)
                        return
                    body = self._rewriter.whole(forwarded.body or b"")
                # the turn is over: a client that reads slowly holds up nobody
                self._observe_first_token(started_at)
                await Response(body, media_type="application/json")(scope, receive, send)
        finally:
            if self._rewriter.is_counted:
                num_in, num_out = self._rewriter.num_prompt_tokens, self._rewriter.num_completion_tokens
                if settle is not None:
                    settle(num_in + num_out)
                self._ticket.used(self._served, num_in=num_in, num_out=num_out)

    async def _send_events(self, events: AsyncIterator[bytes], send: Send, started_at: float) -> None:
        is_started = False
        last = b"data: [DONE]\n\n"
        try:
            async for payload in events:
                chunk = self._rewriter.chunk(payload)
                if chunk is None:
                    continue
                if not is_started:
                    is_started = True
                    self._observe_first_token(started_at)
                    await send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
                await send({"type": "http.response.body", "body": b"data: %b\n\n" % chunk, "more_body": True})
            if not is_started:
                raise EngineError("the engine ended the stream before its first event")
        except asyncio.CancelledError:
            if is_started:  # the server is stopping; or the client has gone, and nobody reads this
                await _send_last(send, _error_event(ModelNotReadyError("the server is stopping; ask again")))
            raise
        except CocktailError as error:
            if not is_started:
                raise
            last = _error_event(error)
        except Exception:
            if not is_started:
                raise
            logger.exception("a stream of %s failed", self._served.model_id)
            last = _error_event(ServerError("the server hit an internal error; its log has the details"))
        await _send_last(send, last)

    def _observe_first_token(self, started_at: float) -> None:
        self._metrics.observe_first_token(self._served.pool.id, time.perf_counter() - started_at)


async def _send_last(send: Send, event: bytes) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": False})


def _error_event(error: CocktailError) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(error_body(error))
