"""Lines of batches, asked of this server as their tenant would ask them, when it has nothing else to do."""

from __future__ import annotations

from fastapi import FastAPI

from cocktail_serve.batches.runner import LineReply, LineRequest
from cocktail_serve.engines.base import Background
from cocktail_serve.errors import DrainedError
from cocktail_serve.gateway.authentication import Caller
from cocktail_serve.gateway.gateway import Gateway
from cocktail_serve.gateway.inside_request import InsideRequest, ask_inside
from cocktail_serve.tenants.keys import Scope

RETRY_S = 2.0
"""After which a line is asked again where the answer does not say."""

_RETRIED = frozenset({429, 500, 502, 503, 504})


async def ask_line(app: FastAPI, request: LineRequest) -> LineReply:
    """The answer to a line: under the tenant's limits, in its usage, by the models that are there for it now."""
    gateway: Gateway = app.state.gateway
    batch = request.batch
    # the one who made the batch may have models made
    caller = Caller(
        batch.tenant, frozenset[Scope]({"create"}), batch.key_id, gateway.tenants_cache.pools_of(batch.tenant)
    )
    inside = InsideRequest(caller, Background(is_broken_off=request.gives_way))
    answer = await ask_inside(app, batch.endpoint, request.body, inside)
    is_retried = answer.status in _RETRIED and answer.headers.get("x-should-retry") != "false"
    return LineReply(
        status=answer.status,
        request_id=answer.headers.get("x-request-id", ""),
        body=answer.body or b"null",
        retry_after_s=float(answer.headers.get("retry-after", RETRY_S)) if is_retried else None,
        gave_way=f'"code":"{DrainedError.code}"'.encode() in answer.body,
    )
