"""From the `model` (and inline `cocktail`) of a request to the parameters that answer it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cocktail_serve.cocktails.cocktail import ServedModel
from cocktail_serve.config import PoolConfig
from cocktail_serve.engines.base import CHAT_PATH, COMPLETIONS_PATH, DECISIONS_PATH, RESPONSES_PATH, Engine
from cocktail_serve.errors import InvalidRequestError, NotFoundError, WrongModelKindError
from cocktail_serve.gateway.admission import AdmittedRequest
from cocktail_serve.pool import Kind, Pool, with_article
from cocktail_serve.suggestions import did_you_mean

_ROUTES: dict[Kind, str] = {
    "decoder": f"{CHAT_PATH}, {COMPLETIONS_PATH}, {RESPONSES_PATH} and {DECISIONS_PATH}",
    "encoder": "/v1/embeddings",
    "reranker": "/v1/rerank",
}


_E = TypeVar("_E", bound=Engine)


@dataclass(frozen=True, slots=True)
class Target(Generic[_E]):
    """What a request names.

    Attributes:
        engine: the pool's, of the kind that the route needs.
        config: the pool's.
        served: what it is answered by; None where the request brings a cocktail of its own, which `served_model` mixes.
    """

    pool: Pool
    engine: _E
    config: PoolConfig
    served: ServedModel | None


async def find_target(admitted: AdmittedRequest, engines: Mapping[str, _E]) -> Target[_E]:
    """The model that a request names; its figures are counted under its pool from now on.

    Cheap: what is wrong with the rest is found before anything is mixed.

    Args:
        engines: those of the kind that the route needs, by pool.

    Raises:
        InvalidRequestError: no model named.
        NotFoundError: unknown, another tenant's, or of a pool that is not there for the tenant.
        PermissionDeniedError: an inline cocktail, and the key may not create.
        WrongModelKindError: the pool is not of the kind that the route needs.
        ModelNotReadyError: it is still being made.
        StorageError: it is not known here, and the store cannot be asked.
    """
    gateway, caller = admitted.gateway, admitted.caller
    served: ServedModel | None
    model = admitted.body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequestError("model is required: name one of GET /v1/models", param="model")
    if admitted.body.get("cocktail") is None:
        served = await gateway.service.find_served_model(caller.tenant, model, visible=caller.pools)
        pool = served.pool
    elif model in gateway.pools and caller.sees(model):
        caller.require("create")
        pool, served = gateway.pools[model], None
    else:
        known = sorted(filter(caller.sees, gateway.pools))
        raise NotFoundError(
            f"with an inline cocktail, model names the pool to mix from, and there is no pool {model!r}; "
            f"there are: {', '.join(known)}{did_you_mean(model, known)}",
            param="model",
            code="model_not_found",
        )
    engine = engines.get(pool.id)
    if engine is None:
        raise WrongModelKindError(
            f"model {model!r} is {with_article(pool.kind)}; it answers {_ROUTES[pool.kind]}", param="model"
        )
    admitted.exchange.pool_id = pool.id
    return Target(pool, engine, gateway.settings.pool(pool.id), served)


async def served_model(admitted: AdmittedRequest, target: Target[Any]) -> ServedModel:
    """What answers a request: the model that it names, or its own cocktail, which is mixed on first use.

    Raises:
        ModelNotReadyError: the inline cocktail is still being made.
        QuotaExceededError, RateLimitError: over a limit of the tenant.
        CocktailError: what is wrong with the inline cocktail.
    """
    served = target.served
    if served is None:
        request = await admitted.gateway.parse_inline(admitted.body["cocktail"], target.pool)
        served = await admitted.gateway.service.inline(admitted.caller.tenant, request, actor=admitted.caller.actor)
    admitted.exchange.model_id = served.model_id
    return served
