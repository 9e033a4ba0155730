"""`/v1/usage`, `/admin/usage` and `/admin/audit`: what was used, and who changed what."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from cocktail_serve.gateway.dependencies import GatewayDep, TenantDep, admin_of
from cocktail_serve.gateway.gateway import Gateway
from cocktail_serve.gateway.openapi import ErrorResponses, error_responses
from cocktail_serve.gateway.schemas.usage import AuditEventList, AuditEventView, UsageList, UsageView, usage_csv
from cocktail_serve.ids import Order
from cocktail_serve.usage.audit import Action
from cocktail_serve.usage.days import usage_days
from cocktail_serve.usage.store import Group

router = APIRouter(tags=["usage"])

MAX_EVENTS = 1000

OwnGroup = Literal["day", "key", "model", "pool"]

Start = Annotated[date | None, Query(description="First day, UTC; left out: 29 days before the last one.")]
End = Annotated[date | None, Query(description="Last day, included; left out: today.")]
Format = Annotated[Literal["json", "csv"] | None, Query(description="Left out: CSV where `Accept` asks for it.")]

_CSV: ErrorResponses = {200: {"model": UsageList, "content": {"text/csv": {"schema": {"type": "string"}}}}}


@router.get("/v1/usage", response_model=UsageList, responses={**error_responses(503), **_CSV})
async def own_usage(
    *,
    gateway: GatewayDep,
    tenant: TenantDep,
    request: Request,
    start: Start = None,
    end: End = None,
    group_by: Annotated[list[OwnGroup], Query(description="What sums are kept apart by.")] = ["day", "model"],  # noqa: B006
    format: Format = None,  # noqa: A002  # the parameter's name
) -> Response | UsageList:
    """What the tenant used, by day and model unless asked otherwise."""
    return await _usage(gateway, request, start, end, group_by=list(group_by), tenant=tenant, as_format=format)


@router.get(
    "/admin/usage",
    response_model=UsageList,
    responses={**error_responses(503), **_CSV},
    dependencies=[Depends(admin_of)],
)
async def all_usage(
    *,
    gateway: GatewayDep,
    request: Request,
    start: Start = None,
    end: End = None,
    group_by: Annotated[list[Group], Query(description="What sums are kept apart by.")] = ["day", "tenant"],  # noqa: B006
    tenant: Annotated[str | None, Query(description="Whose; left out: of all.")] = None,
    format: Format = None,  # noqa: A002  # the parameter's name
) -> Response | UsageList:
    """What all tenants used, by day and tenant unless asked otherwise."""
    return await _usage(gateway, request, start, end, group_by=list(group_by), tenant=tenant, as_format=format)


@router.get("/admin/audit", responses=error_responses(503), dependencies=[Depends(admin_of)])
async def list_events(
    *,
    gateway: GatewayDep,
    after: Annotated[str | None, Query(description="Id to begin behind.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 100,
    order: Annotated[Order, Query(description="By the moment they happened.")] = "desc",
    tenant: Annotated[str | None, Query(description="Only what concerns it.")] = None,
    action: Annotated[Action | None, Query(description="Only these.")] = None,
) -> AuditEventList:
    """Who made, changed and deleted cocktails, keys, tenants and experts; the newest first."""
    page = await gateway.audit.list(after=after, limit=limit, order=order, tenant=tenant, action=action)
    return AuditEventList.of([AuditEventView.of(event) for event in page.data], has_more=page.has_more)


async def _usage(
    gateway: Gateway,
    request: Request,
    start: date | None,
    end: date | None,
    *,
    group_by: list[Group],
    tenant: str | None,
    as_format: Literal["json", "csv"] | None,
) -> Response | UsageList:
    first, last = usage_days(start, end)
    # what this gateway has counted and not written yet belongs to the answer
    await gateway.ledger.flush()
    rows = await gateway.usage.sums(first, last, group_by=group_by, tenant=tenant)
    if as_format == "csv" or (as_format is None and "text/csv" in request.headers.get("accept", "")):
        return Response(usage_csv(rows, group_by), media_type="text/csv; charset=utf-8")
    return UsageList(data=[UsageView.of(row) for row in rows])
