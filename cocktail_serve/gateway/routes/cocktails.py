"""`/v1/cocktails`: make, watch, choose and delete the tenant's own models."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response

from cocktail_serve.cocktails.cocktail import Cocktail
from cocktail_serve.cocktails.parsing import CocktailBody
from cocktail_serve.errors import ModelNotReadyError, NotFoundError
from cocktail_serve.gateway.dependencies import CreatorDep, GatewayDep, TenantDep
from cocktail_serve.gateway.disconnect import ended_with_client
from cocktail_serve.gateway.json_body import JSONObject
from cocktail_serve.gateway.listing import list_response
from cocktail_serve.gateway.openapi import engine_errors, error_responses, json_request
from cocktail_serve.gateway.schemas.cocktails import (
    CocktailDeleted,
    CocktailList,
    CocktailReport,
    CocktailView,
    CurrentVersion,
    ExampleList,
    RecipeView,
    WeighingView,
)
from cocktail_serve.gateway.schemas.pages import AfterQuery
from cocktail_serve.request_schema import parse_as

router = APIRouter(tags=["cocktails"])

MAX_WAIT_S = 60.0

MAX_COCKTAILS = 10_000
"""Versions of one page, and the default, as of files: a client that asks for no pages sees all."""

_LOCATION = {"Location": {"description": "Where to follow it.", "schema": {"type": "string"}}}


@router.post(
    "/v1/cocktails",
    status_code=201,
    responses={
        **engine_errors(),
        200: {"model": CocktailView | WeighingView, "description": "The same request existed; or a dry run."},
        201: {"model": CocktailView, "description": "New and ready.", "headers": _LOCATION},
        202: {"model": CocktailView, "description": "In the making.", "headers": _LOCATION},
    },
    openapi_extra=json_request(CocktailBody),
)
async def create_cocktail(
    *,
    gateway: GatewayDep,
    creator: CreatorDep,
    body: JSONObject,
    request: Request,
    response: Response,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False, description="Seconds to wait for it to be ready.")
    ] = 0,
    dry_run: Annotated[bool, Query(description="Losses and weights only; nothing is kept.")] = False,
) -> CocktailView | WeighingView:
    """Makes a cocktail from examples, weights or a recipe, or finds the one that the same request made."""
    wanted = await gateway.parse_cocktail(body, creator)
    if dry_run:
        response.status_code = 200
        async with ended_with_client(request.receive):
            return WeighingView.of(await gateway.service.dry_run(creator.tenant, wanted, actor=creator.actor))
    cocktail, existed = await gateway.service.create(creator.tenant, wanted, actor=creator.actor)
    if wait and not cocktail.is_final:
        # the job goes on when the client leaves: only the waiting ends
        async with ended_with_client(request.receive):
            cocktail = await gateway.service.wait(creator.tenant, cocktail.id, wait)
    if cocktail.status == "failed" and cocktail.error is not None:
        raise cocktail.error.exception()
    response.status_code = _status_of(cocktail, existed=existed)
    response.headers["location"] = f"/v1/cocktails/{quote(cocktail.id, safe='@')}"
    return CocktailView.of(cocktail, gateway.pools)


def _status_of(cocktail: Cocktail, *, existed: bool) -> int:
    if existed:
        return 200
    return 201 if cocktail.status == "ready" else 202


@router.get("/v1/cocktails", response_model=CocktailList, responses=error_responses())
async def list_cocktails(
    *,
    gateway: GatewayDep,
    tenant: TenantDep,
    name: Annotated[str | None, Query(description="Only versions of this name.")] = None,
    after: AfterQuery = None,
    limit: Annotated[int, Query(ge=1, le=MAX_COCKTAILS)] = MAX_COCKTAILS,
) -> Response:
    """All versions, the newest first; of one name if given."""
    page = gateway.service.catalog.page(tenant, name, after=after, limit=limit)
    views = (CocktailView.of(cocktail, gateway.pools) for cocktail in page.data)
    return await list_response(CocktailList.without_data(page.data, has_more=page.has_more), views, every=2)


@router.get("/v1/cocktails/{ref}", responses=error_responses(404))
async def retrieve_cocktail(
    *,
    gateway: GatewayDep,
    tenant: TenantDep,
    request: Request,
    ref: str,
    wait: Annotated[
        float,
        Query(
            ge=0,
            le=MAX_WAIT_S,
            allow_inf_nan=False,
            description="Seconds to wait for its status or progress to change, unless its job has ended.",
        ),
    ] = 0,
) -> CocktailView:
    """One version; by name, the current one. May wait for a change of it."""
    if not wait:
        return CocktailView.of(await gateway.service.find_cocktail(tenant, ref), gateway.pools)
    async with ended_with_client(request.receive):
        return CocktailView.of(await gateway.service.wait_for_change(tenant, ref, wait), gateway.pools)


@router.get("/v1/cocktails/{ref}/recipe", responses=error_responses(404, 503))
async def retrieve_recipe(gateway: GatewayDep, tenant: TenantDep, ref: str) -> RecipeView:
    """What reproduces the mixture bit for bit: what another server takes as `recipe`, and `mix --recipe`."""
    cocktail = await gateway.service.find_cocktail(tenant, ref)
    if cocktail.recipe is not None:
        return RecipeView.of(cocktail.recipe, gateway.pools.get(cocktail.pool_id))
    if cocktail.is_final:
        raise NotFoundError(f"{cocktail.id!r} {cocktail.status} before it had a recipe", code="recipe_not_found")
    raise ModelNotReadyError(f"{cocktail.id!r} has no recipe yet: it is {cocktail.status}")


@router.get("/v1/cocktails/{ref}/examples", responses=error_responses(404))
async def retrieve_examples(gateway: GatewayDep, tenant: TenantDep, ref: str) -> ExampleList:
    """The examples it was made from, after sampling."""
    return ExampleList(data=[dict(row) for row in await gateway.service.examples(tenant, ref)])


@router.get("/v1/cocktails/{ref}/report", responses=error_responses(404))
async def retrieve_report(gateway: GatewayDep, tenant: TenantDep, ref: str) -> CocktailReport:
    """Losses beside merging weights, what the mixture bought, and whether to use it: made in the background."""
    return CocktailReport.of(await gateway.service.report(tenant, ref))


@router.patch(
    "/v1/cocktails/{name}", responses=error_responses(404, 409, 413, 429), openapi_extra=json_request(CurrentVersion)
)
async def update_cocktail(gateway: GatewayDep, creator: CreatorDep, name: str, body: JSONObject) -> CocktailView:
    """Says which version the name means: a ready one, or null for the newest."""
    wanted = parse_as(CurrentVersion, body)
    current = await gateway.service.set_current(creator.tenant, name, wanted.current, actor=creator.actor)
    return CocktailView.of(current, gateway.pools)


@router.delete("/v1/cocktails/{ref}", responses=error_responses(404, 429))
async def delete_cocktail(gateway: GatewayDep, creator: CreatorDep, ref: str) -> CocktailDeleted:
    """Deletes a version, or all versions of a name, with examples and losses."""
    await gateway.service.delete(creator.tenant, ref, actor=creator.actor)
    return CocktailDeleted(id=ref)
