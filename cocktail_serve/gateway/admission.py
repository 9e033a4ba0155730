"""How every request to a model begins: its caller, its body, the tenant's limits."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from cocktail_serve.cocktails.cocktail import ServedModel
from cocktail_serve.engines.base import Background
from cocktail_serve.engines.token_estimates import reserved_tokens
from cocktail_serve.gateway.authentication import Caller
from cocktail_serve.gateway.dependencies import caller_of, gateway_of
from cocktail_serve.gateway.direct_route import DirectRequest
from cocktail_serve.gateway.exchange import Exchange, exchange_of
from cocktail_serve.gateway.gateway import Gateway
from cocktail_serve.gateway.inside_request import inside_request_of
from cocktail_serve.gateway.json_body import read_json_object
from cocktail_serve.gateway.metering import MeteredRequest
from cocktail_serve.gateway.rate_limits import enforce_limits


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request to a model, let in.

    Attributes:
        background: how it gives way; None: somebody waits for it.
    """

    request: DirectRequest
    exchange: Exchange
    gateway: Gateway
    caller: Caller
    body: dict[str, Any]
    metered: MeteredRequest
    background: Background | None = None

    def observe_first_token(self, served: ServedModel) -> None:
        """The first of the answer is there: the time that it took goes into the metrics."""
        self.gateway.metrics.observe_first_token(served.pool.id, time.perf_counter() - self.exchange.started_at)


@asynccontextmanager
async def admit(request: DirectRequest) -> AsyncIterator[AdmittedRequest]:
    """How every request to a model begins: who sends it, what it says, whether the tenant may ask now. The block is
    all that is done for it: it counts as open, and its tokens are reserved, until the block ends.

    Raises:
        AuthenticationError, PermissionDeniedError: as `caller_of`.
        InvalidRequestError, PayloadTooLargeError: as `read_json_object`.
        RateLimitError: over a limit of the tenant.
    """
    gateway = await gateway_of(request)
    caller = await caller_of(request, gateway)
    body, num_bytes = await read_json_object(request)
    exchange = exchange_of(request)
    # before any work is done for it
    num_tokens = reserved_tokens(body, num_bytes=num_bytes)
    inside = inside_request_of(request.scope)
    admission = gateway.limiter.admit_model_request(caller.tenant, num_tokens=num_tokens, is_batch=inside is not None)
    with MeteredRequest(caller, exchange, admission, gateway.ledger, gateway.metrics) as metered:
        enforce_limits(exchange, admission)
        background = None if inside is None else inside.background
        yield AdmittedRequest(request, exchange, gateway, caller, body, metered, background)
