"""From the `model` (and inline `cocktail`) of a request to the parameters that answer it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from cocktail_serve.cocktails.cocktail import Served
from cocktail_serve.cocktails.serving import no_model
from cocktail_serve.errors import InvalidRequestError, NotFoundError, WrongModelKindError
from cocktail_serve.gateway.authentication import Caller
from cocktail_serve.gateway.direct_route import DirectRequest
from cocktail_serve.gateway.exchange import Exchange, exchange_of
from cocktail_serve.gateway.json_body import read_json
from cocktail_serve.gateway.metering import MeteredRequest
from cocktail_serve.gateway.state import Gateway, caller_of, gateway_of
from cocktail_serve.pool import Kind, Pool, with_article

_ROUTES: dict[Kind, str] = {
    "decoder": "/v1/chat/completions and /v1/completions",
    "encoder": "/v1/embeddings",
    "reranker": "/v1/rerank",
}


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request to a model, let in."""

    request: DirectRequest
    exchange: Exchange
    gateway: Gateway
    caller: Caller
    body: dict[str, Any]
    metered: MeteredRequest

    def observe_first_token(self, served: Served) -> None:
        """The first of the answer is there: the time that it took goes into the metrics."""
        self.gateway.metrics.observe_first_token(served.pool.id, time.perf_counter() - self.exchange.started_at)


async def admitted(request: DirectRequest) -> Admitted:
    """How every request to a model begins: who sends it, what it says, whether the tenant may ask now.

    Raises:
        AuthenticationError, PermissionDeniedError: as `caller_of`.
        InvalidRequestError, PayloadTooLargeError: as `read_json`.
        RateLimitError: over a limit of the tenant.
    """
    gateway = await gateway_of(request)
    caller = await caller_of(request)
    body, num_bytes = await read_json(request)
    exchange = exchange_of(request)
    metered = exchange.metered = gateway.meter.admit(caller, body, num_bytes=num_bytes)
    exchange.enter(metered.admission)
    return Admitted(request, exchange, gateway, caller, body, metered)


async def requested_pool(asked: Admitted, *, kind: Kind) -> Pool:
    """The pool of the model that a request names, which its figures are counted under from now on.

    Cheap: what is wrong with the rest is found before anything is mixed.

    Raises:
        InvalidRequestError: no model named.
        NotFoundError: unknown, another tenant's, or of a pool that is not there for the tenant.
        PermissionDeniedError: an inline cocktail, and the key may not create.
        WrongModelKindError: the pool is not of the kind that the route needs.
        ModelNotReadyError: it is still being made.
        StorageError: it is not known here, and the store cannot be asked.
    """
    gateway, caller = asked.gateway, asked.caller
    model = asked.body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequestError("model is required: name one of GET /v1/models", param="model")
    if asked.body.get("cocktail") is None:
        pool = (await gateway.service.find(caller.tenant, model)).pool
        if not caller.sees(pool.id):
            raise no_model(model)
    elif model in gateway.pools and caller.sees(model):
        caller.require("create")
        pool = gateway.pools[model]
    else:
        known = ", ".join(sorted(filter(caller.sees, gateway.pools)))
        raise NotFoundError(
            f"with an inline cocktail, model names the pool to mix from, and there is no pool {model!r}; "
            f"there are: {known}",
            param="model",
            code="model_not_found",
        )
    if pool.kind != kind:
        raise WrongModelKindError(
            f"model {model!r} is {with_article(pool.kind)}; it answers {_ROUTES[pool.kind]}", param="model"
        )
    asked.exchange.pool_id = pool.id
    return pool


async def served_model(asked: Admitted) -> Served:
    """The model of a request that passed `requested_pool`; an inline cocktail is mixed on first use.

    Raises:
        ModelNotReadyError: it is still being made.
        QuotaExceededError, RateLimitError: over a limit of the tenant.
        CocktailError: what is wrong with the inline cocktail.
    """
    gateway, tenant, model = asked.gateway, asked.caller.tenant, asked.body["model"]
    cocktail = asked.body.get("cocktail")
    if cocktail is None:
        return gateway.service.resolve(tenant, model)
    request = await gateway.parse_inline(cocktail, gateway.pools[model])
    return await gateway.service.inline(tenant, request)
