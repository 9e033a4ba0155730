"""What every request passes through, as plain ASGI: its id, its limit on bytes, its counters, its last resort."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import zlib

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cocktail_serve import logs
from cocktail_serve.errors import CocktailError, InvalidRequestError, PayloadTooLargeError
from cocktail_serve.gateway.error_handlers import error_response, internal_error, stopping_error
from cocktail_serve.gateway.exchange import Exchange, begin_exchange
from cocktail_serve.gateway.inside_request import inside_request_of
from cocktail_serve.gateway.lifecycle import PROBE_PATHS, Lifecycle
from cocktail_serve.gateway.metrics import GatewayMetrics

logger = logging.getLogger(__name__)

CLIENT_DISCONNECTED = "client_disconnected"
"""What the log calls an answer that its client did not wait for the end of."""

CLIENT_GONE = 499
"""Status that metrics show for a request whose client left before its answer's end; never sent (nginx's convention)."""

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestBoundary:
    """Names each request, counts it, and turns what nobody caught into a 500.

    Outermost (but for CORS), so that every answer carries `x-request-id`: the client's own where it sent a printable
    one.
    Makes the `Exchange`, and reads from it at the end what those inside have filled in.
    """

    def __init__(self, app: ASGIApp, *, metrics: GatewayMetrics, lifecycle: Lifecycle) -> None:
        self._app = app
        self._metrics = metrics
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        request_id = given if _REQUEST_ID.fullmatch(given) else b"req_%b" % secrets.token_hex(16).encode()
        exchange = Exchange(request_id.decode(), started_at=time.perf_counter())
        begin_exchange(scope, exchange)
        logs.request_id.set(exchange.request_id)
        is_work = scope["path"] not in PROBE_PATHS
        status: int | None = None  # nothing was sent yet

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id),
                    *exchange.headers,
                ]
            await send(message)

        # a line of a batch goes on in the next process: the end of this one does not wait for it
        counts = is_work and inside_request_of(scope) is None
        self._lifecycle.num_open += counts
        try:
            if is_work and self._lifecycle.is_stopping:
                await self._refuse(stopping_error(), exchange)(scope, receive, send_named)
            elif is_work and _holds_nul(scope):
                await self._refuse(_no_text(), exchange)(scope, receive, send_named)
            else:
                await self._app(scope, receive, send_named)
        except ClientDisconnect:
            exchange.error, exchange.broken_status = CLIENT_DISCONNECTED, CLIENT_GONE
            logger.debug("request %s: the client left before its answer was complete", exchange.request_id)
        except Exception:
            logger.exception("request %s: %s %s failed", exchange.request_id, scope["method"], _route(scope))
            response = self._refuse(internal_error(), exchange)
            exchange.broken_status = response.status_code
            if status is None:
                await response(scope, receive, send_named)
        finally:
            self._lifecycle.num_open -= counts
            self._tell(scope, exchange, CLIENT_GONE if status is None else status)

    @staticmethod
    def _refuse(error: CocktailError, exchange: Exchange) -> Response:
        exchange.error = error.code
        return error_response(error)

    def _tell(self, scope: Scope, exchange: Exchange, status: int) -> None:
        """The counters and the log line of a request at its end."""
        route, pool, seconds = _route(scope), exchange.pool_id, time.perf_counter() - exchange.started_at
        self._metrics.count_request(route=route, status=exchange.broken_status or status, pool=pool, seconds=seconds)
        num_in, num_out = exchange.num_tokens or (None, None)
        logs.log_request(
            route=route,
            status=status,
            seconds=seconds,
            error=exchange.error,
            tenant=exchange.tenant,
            pool=pool,
            model=exchange.model_id,
            tokens_in=num_in,
            tokens_out=num_out,
            is_probe=scope["path"] in PROBE_PATHS,
        )


def _route(scope: Scope) -> str:
    """The template that a request matched, of which there are only so many; its own path may hold anything."""
    return getattr(scope.get("route"), "path", "unknown")


def _holds_nul(scope: Scope) -> bool:
    """Whether its path or its query does: no name does, and PostgreSQL would refuse to look for one."""
    return "\0" in scope["path"] or b"%00" in scope["query_string"]


def _no_text() -> InvalidRequestError:
    return InvalidRequestError("the URL holds a NUL character (%00), which no name and no value does; leave it out")


class BodyLimit:
    """Refuses a body over `max_bytes`: by its declared length before reading, and by what arrives while reading.

    The error comes out of `receive`, so it is raised where the body is read (`json_body`, the form of `routes.files`),
    and mapped like any other.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = _header(scope, b"content-length")
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            if declared.isdigit() and int(declared) > self._max_bytes:
                raise self._too_large()
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, receive_limited, send)

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"the body is larger than {self._max_bytes} bytes; send less, or raise server.max_request_bytes"
        )


MAX_PIECE = 1024**2
"""Bytes that are unpacked at once: the event loop is held for some milliseconds, however well they were packed."""


class ContentDecoding:
    """Unpacks bodies with `Content-Encoding: gzip`, of `max_bytes` at most, piece by piece as they are read.

    A few kilobytes can hold gigabytes, so nothing is unpacked beyond the limit, and no more than `MAX_PIECE` at once.
    Errors come out of `receive`, as `BodyLimit`'s.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        coding = _header(scope, b"content-encoding").strip().lower() if scope["type"] == "http" else b""
        if coding not in (b"", b"identity"):
            receive = _Unpacked(receive, coding, self._max_bytes).receive
        await self._app(scope, receive, send)


class _Unpacked:
    """The messages of one request, its body unpacked."""

    def __init__(self, receive: Receive, coding: bytes, max_bytes: int) -> None:
        self._receive = receive
        self._coding = coding
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._packed = b""
        self._has_more = True
        self._is_read = False
        self._gzip = zlib.decompressobj(zlib.MAX_WBITS | 16)

    async def receive(self) -> Message:
        if self._is_read:  # what comes behind the body is that the client leaves
            return await self._receive()
        if self._coding not in (b"gzip", b"x-gzip"):
            raise InvalidRequestError(
                f"the body has the header 'Content-Encoding: {self._coding.decode('latin-1')}'; send it as gzip, or as "
                "it is",
                code="unsupported_content_encoding",
            )
        while not self._packed and self._has_more:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._packed = message.get("body", b"")
            self._has_more = message.get("more_body", False)
        if not self._packed:
            if not self._gzip.eof:
                raise _not_gzip("it ends too early")
            self._is_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        piece = self._next_piece()
        self._num_bytes += len(piece)
        if self._num_bytes > self._max_bytes:
            raise PayloadTooLargeError(
                f"the body is larger than {self._max_bytes} bytes when unpacked; send less, or raise "
                "server.max_request_bytes"
            )
        await asyncio.sleep(0)  # other requests have their turn between two pieces
        return {"type": "http.request", "body": piece, "more_body": True}

    def _next_piece(self) -> bytes:
        try:
            piece = self._gzip.decompress(self._packed, MAX_PIECE)
        except zlib.error as error:
            raise _not_gzip(str(error)) from error
        # a file may hold several streams; no client sends them, and thousands of empty ones would be a lot of work
        if self._gzip.unused_data:
            raise _not_gzip("something follows its end")
        self._packed = self._gzip.unconsumed_tail
        return piece


def _not_gzip(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the body is not the gzip that its header 'Content-Encoding' says: {why}", code="invalid_content_encoding"
    )


class HeadAsGet:
    """Answers HEAD as GET is answered, without the body: probes and load balancers ask so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        # a scope of its own: servers look at theirs to know that no body follows
        as_get = {**scope, "method": "GET"}
        try:
            await self._app(as_get, receive, send_without_body)
        finally:
            if "route" in as_get:
                scope["route"] = as_get["route"]


def _header(scope: Scope, name: bytes) -> bytes:
    """The first of a header's values; empty without it."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""
