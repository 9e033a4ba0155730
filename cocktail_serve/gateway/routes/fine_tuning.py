"""`/v1/fine_tuning/jobs`: cocktails for clients that know fine-tuning. Each tenant its own."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.finetuning.request import JobBody
from cocktail_serve.gateway.dependencies import CreatorDep, GatewayDep, TenantDep
from cocktail_serve.gateway.json_body import JSONObject
from cocktail_serve.gateway.openapi import engine_errors, error_responses, json_request
from cocktail_serve.gateway.schemas.fine_tuning import CheckpointList, JobEventList, JobEventView, JobList, JobView
from cocktail_serve.gateway.schemas.pages import AfterQuery
from cocktail_serve.request_schema import parse_as

router = APIRouter(tags=["fine-tuning"])

DEFAULT_LIMIT = 20
"""As OpenAI's."""

MAX_LIMIT = 1000

LimitQuery = Annotated[int, Query(ge=1, le=MAX_LIMIT)]


@router.post("/v1/fine_tuning/jobs", responses=engine_errors(), openapi_extra=json_request(JobBody))
async def create_job(gateway: GatewayDep, creator: CreatorDep, body: JSONObject) -> JobView:
    """Mixes a model from a file of examples; an identical request within ten minutes finds the same job."""
    wanted = parse_as(JobBody, body)
    job = await gateway.fine_tuning.create(creator.tenant, wanted, visible=creator.pools, actor=creator.actor)
    return JobView.of(job)


@router.get("/v1/fine_tuning/jobs", responses=error_responses())
async def list_jobs(
    *,
    gateway: GatewayDep,
    tenant: TenantDep,
    request: Request,
    after: AfterQuery = None,
    limit: LimitQuery = DEFAULT_LIMIT,
    metadata: Annotated[
        str | None, Query(description="`null`: only jobs without. `metadata[key]=value`: only jobs with that pair.")
    ] = None,
) -> JobList:
    """The tenant's jobs, the newest first."""
    pairs = _metadata(request, metadata)
    page = await gateway.fine_tuning.jobs.list(tenant, after=after, limit=limit, metadata=pairs)
    return JobList.of([JobView.of(job) for job in page.data], has_more=page.has_more)


@router.get("/v1/fine_tuning/jobs/{job_id}", responses=error_responses(404))
async def retrieve_job(gateway: GatewayDep, tenant: TenantDep, job_id: str) -> JobView:
    """One job."""
    return JobView.of(await gateway.fine_tuning.jobs.get(tenant, job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel", responses=error_responses(404, 429))
async def cancel_job(gateway: GatewayDep, creator: CreatorDep, job_id: str) -> JobView:
    """Ends an unfinished job; 400 for one that has succeeded or failed."""
    return JobView.of(await gateway.fine_tuning.cancel(creator.tenant, job_id))


@router.get("/v1/fine_tuning/jobs/{job_id}/events", responses=error_responses(404))
async def list_events(
    gateway: GatewayDep, tenant: TenantDep, job_id: str, after: AfterQuery = None, limit: LimitQuery = DEFAULT_LIMIT
) -> JobEventList:
    """What happened to a job, with losses, weights and progress; the newest first."""
    page = await gateway.fine_tuning.events(tenant, job_id, after=after, limit=limit)
    return JobEventList.of([JobEventView.of(event) for event in page.data], has_more=page.has_more)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints", responses=error_responses(404))
async def list_checkpoints(gateway: GatewayDep, tenant: TenantDep, job_id: str) -> CheckpointList:
    """None: a mixture has no steps to keep."""
    await gateway.fine_tuning.jobs.get(tenant, job_id)
    return CheckpointList.of([], has_more=False)


@router.post("/v1/fine_tuning/jobs/{job_id}/pause", responses=error_responses(404, 429))
async def pause_job(gateway: GatewayDep, creator: CreatorDep, job_id: str) -> JobView:
    """Not served: 400."""
    await gateway.fine_tuning.jobs.get(creator.tenant, job_id)
    raise _not_paused()


@router.post("/v1/fine_tuning/jobs/{job_id}/resume", responses=error_responses(404, 429))
async def resume_job(gateway: GatewayDep, creator: CreatorDep, job_id: str) -> JobView:
    """Not served: 400."""
    await gateway.fine_tuning.jobs.get(creator.tenant, job_id)
    raise _not_paused()


def _not_paused() -> InvalidRequestError:
    return InvalidRequestError(
        "jobs take seconds here and are not paused or resumed; cancel it, or wait for it", code="not_supported"
    )


def _metadata(request: Request, metadata: str | None) -> dict[str, str] | None:
    """The pairs that jobs must have; empty: none at all; None: whichever."""
    pairs = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.multi_items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if metadata not in (None, "null") or (metadata is not None and pairs):
        raise InvalidRequestError(
            "metadata: filter by metadata[key]=value, or by metadata=null for jobs without", param="metadata"
        )
    return pairs if pairs or metadata is not None else None
