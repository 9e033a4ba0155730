"""`/admin/engines` and `/admin/pools/{id}/experts`: what the operator does while the server runs."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Response

from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.gateway.dependencies import AdminDep, GatewayDep, admin_of
from cocktail_serve.gateway.gateway import Gateway
from cocktail_serve.gateway.json_body import JSONObject
from cocktail_serve.gateway.openapi import error_responses, json_request
from cocktail_serve.gateway.schemas.engines import (
    DeletedExpert,
    EngineBody,
    EngineList,
    EngineView,
    ExpertBody,
    ExpertList,
    ExpertView,
    RestartBody,
)
from cocktail_serve.request_schema import parse_as

router = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(admin_of)])


@router.get("/engines", responses=error_responses())
async def list_engines(gateway: GatewayDep) -> EngineList:
    """What each engine does now: the resident recipe, who waits and why."""
    return EngineList(data=list(await asyncio.gather(*(_view(gateway, pool_id) for pool_id in gateway.engines))))


@router.get("/engines/{engine_id}", responses=error_responses(404))
async def get_engine(gateway: GatewayDep, engine_id: str) -> EngineView:
    """One engine, by the id of its pool."""
    return await _view(gateway, engine_id)


@router.post("/engines/{engine_id}", responses=error_responses(404, 413, 503), openapi_extra=json_request(EngineBody))
async def operate_engine(gateway: GatewayDep, engine_id: str, body: JSONObject) -> EngineView:
    """Pins a model in an engine, or drains it. Neither outlives the server."""
    engine = gateway.engine(engine_id)
    wanted = parse_as(EngineBody, body)
    if "pin" in wanted.model_fields_set:
        recipe = None
        if wanted.pin is not None:
            served = gateway.service.catalog.resolve(wanted.tenant, wanted.pin)
            if served.pool.id != engine_id:
                raise InvalidRequestError(f"{wanted.pin!r} is a model of pool {served.pool.id!r}", param="pin")
            recipe = served.recipe
        engine.pin(recipe, replica=wanted.replica)
    if wanted.drain is not None:
        engine.drain(wanted.drain, replica=wanted.replica)
    return await _view(gateway, engine_id)


@router.post(
    "/engines/{engine_id}/restart",
    status_code=202,
    responses=error_responses(404, 409, 413, 503),
    openapi_extra=json_request(RestartBody),
)
async def restart_engine(gateway: GatewayDep, engine_id: str, body: JSONObject) -> EngineView:
    """Begins to start the replicas of a decoder pool again, one after the other, while the others answer; `restart` in
    the answers of `GET` says how far it is."""
    wanted = parse_as(RestartBody, body)
    engine = gateway.engine(engine_id)
    if engine.kind != "decoder":
        raise InvalidRequestError(f"pool {engine_id!r} computes in the server's own process: restart the server")
    engine.begin_restart(drain_s=wanted.drain_s)
    return await _view(gateway, engine_id)


@router.get("/pools/{pool_id}/experts", responses=error_responses(404))
async def list_experts(gateway: GatewayDep, pool_id: str) -> ExpertList:
    """The experts of a pool, and where they lie."""
    return ExpertList(data=[ExpertView.of(pool_id, member, added) for member, added in gateway.experts.of(pool_id)])


@router.post(
    "/pools/{pool_id}/experts",
    status_code=201,
    responses={
        **error_responses(404, 409, 413, 422),
        200: {"model": ExpertView, "description": "The same model was there under this name."},
    },
    openapi_extra=json_request(ExpertBody),
)
async def add_expert(
    gateway: GatewayDep, admin: AdminDep, pool_id: str, body: JSONObject, response: Response
) -> ExpertView:
    """Takes a model of `server.expert_roots` into a pool, for good. Existing cocktails stay what they are."""
    wanted = parse_as(ExpertBody, body)
    member, added, was_there = await gateway.experts.add(pool_id, wanted.name, wanted.path, actor=admin.actor)
    if was_there:
        response.status_code = 200
    return ExpertView.of(pool_id, member, added)


@router.delete("/pools/{pool_id}/experts/{name}", responses=error_responses(404, 409))
async def remove_expert(
    gateway: GatewayDep, admin: AdminDep, pool_id: str, name: str, force: bool = False
) -> DeletedExpert:
    """Takes an added model out of a pool: 409 while cocktails are made of it, unless forced. Its files stay."""
    await gateway.experts.remove(pool_id, name, force=force, actor=admin.actor)
    return DeletedExpert(id=f"{pool_id}/{name}")


async def _view(gateway: Gateway, engine_id: str) -> EngineView:
    snapshot = await gateway.engine(engine_id).snapshot(deadline_s=gateway.settings.server.ready_deadline_s)
    schedulers = [snapshot.scheduler, *(replica.scheduler for replica in snapshot.replicas)]
    digests = {queue.recipe_digest for scheduler in schedulers for queue in scheduler.queues}
    digests |= {digest for scheduler in schedulers for digest in (scheduler.resident, scheduler.pinned) if digest}
    names = gateway.service.catalog.named(engine_id, digests)
    config = gateway.settings.pool(engine_id).engine
    return EngineView.of(gateway.pools[engine_id], config, snapshot=snapshot, names=names)
