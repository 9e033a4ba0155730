"""`/v1/batches`: files of requests, answered when the engines have time for them. Each tenant its own."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from cocktail_serve.batches.request import BatchBody
from cocktail_serve.gateway.dependencies import CreatorDep, GatewayDep, TenantDep
from cocktail_serve.gateway.json_body import JSONObject
from cocktail_serve.gateway.openapi import error_responses, json_request
from cocktail_serve.gateway.schemas.batches import BatchList, BatchView
from cocktail_serve.gateway.schemas.pages import AfterQuery
from cocktail_serve.request_schema import parse_as

router = APIRouter(tags=["batches"])

DEFAULT_LIMIT = 20
MAX_LIMIT = 100
"""As OpenAI's."""


@router.post("/v1/batches", responses=error_responses(404, 413, 429, 503), openapi_extra=json_request(BatchBody))
async def create_batch(gateway: GatewayDep, creator: CreatorDep, body: JSONObject) -> BatchView:
    """Begins a batch from an uploaded file of requests; what its lines say is checked then."""
    wanted = parse_as(BatchBody, body)
    return BatchView.of(await gateway.batches.create(creator.tenant, wanted, actor=creator.actor))


@router.get("/v1/batches", responses=error_responses())
async def list_batches(
    gateway: GatewayDep,
    tenant: TenantDep,
    after: AfterQuery = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT,
) -> BatchList:
    """The tenant's batches, the newest first."""
    page = await gateway.batches.list(tenant, after=after, limit=limit)
    return BatchList.of([BatchView.of(batch) for batch in page.data], has_more=page.has_more)


@router.get("/v1/batches/{batch_id}", responses=error_responses(404))
async def retrieve_batch(gateway: GatewayDep, tenant: TenantDep, batch_id: str) -> BatchView:
    """One batch."""
    return BatchView.of(await gateway.batches.get(tenant, batch_id))


@router.post("/v1/batches/{batch_id}/cancel", responses=error_responses(404, 409, 429))
async def cancel_batch(gateway: GatewayDep, creator: CreatorDep, batch_id: str) -> BatchView:
    """Ends an unfinished batch: what was answered by then is in its files; 409 for one that has ended."""
    return BatchView.of(await gateway.batches.cancel(creator.tenant, batch_id, actor=creator.actor))
