"""One request and its answer: what the boundary, the middleware and the routes tell each other of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.types import Scope

_KEY = "exchange"


@dataclass(slots=True)
class Exchange:
    """Made by `RequestBoundary`, which reads at the end what those inside have filled in.

    Attributes:
        started_at: seconds, `time.perf_counter`.
        tenant: whose request it is, once that is known; empty: nobody's who is known.
        pool_id, model_id: of the model asked for, once that is known: counters and the log line have it.
        num_tokens: read and generated, once a model has; None: none has.
        error: code of the error that the answer is, or that a stream with status 200 ended in; empty: none.
        broken_status: what counters have in place of the status that was sent, where the answer did not come to its
            end; None: it did.
        headers: that the answer gets, whatever it is.
    """

    request_id: str
    started_at: float
    tenant: str = ""
    pool_id: str = ""
    model_id: str = ""
    num_tokens: tuple[int, int] | None = None
    error: str = ""
    broken_status: int | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()


def begin_exchange(scope: Scope, exchange: Exchange) -> None:
    """Puts it where those inside find it; uvicorn hands on what the app's lifespan left in `state`."""
    state: dict[str, Any] = scope.setdefault("state", {})
    state[_KEY] = exchange


def exchange_of(request: Request) -> Exchange:
    """Of a request that came through `RequestBoundary`."""
    exchange = request.scope["state"][_KEY]
    assert isinstance(exchange, Exchange)
    return exchange


def note_error(scope: Scope, code: str) -> None:
    """The answer is an error, or ends in one; nobody is told where no `RequestBoundary` is around."""
    exchange = scope.get("state", {}).get(_KEY)
    if exchange is not None:
        exchange.error = code
