"""`/v1/models`: pools, experts, current names and ready versions. Ids hold `/` and `@`, raw or percent-encoded."""

from __future__ import annotations

from fastapi import APIRouter, Response

from cocktail_serve.cocktails.cocktail import ModelEntry
from cocktail_serve.cocktails.pool_models import no_model
from cocktail_serve.gateway.authentication import Caller
from cocktail_serve.gateway.dependencies import CallerDep, CreatorDep, GatewayDep
from cocktail_serve.gateway.gateway import Gateway
from cocktail_serve.gateway.listing import list_response
from cocktail_serve.gateway.openapi import error_responses
from cocktail_serve.gateway.schemas.models import OF_KIND, Model, ModelDeleted, ModelList

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=ModelList, responses=error_responses())
async def list_models(gateway: GatewayDep, caller: CallerDep) -> Response:
    """Pools, experts, current names and ready versions."""
    entries = gateway.service.catalog.models(caller.tenant).values()
    views = (_view(entry, caller.tenant, gateway) for entry in entries if caller.sees(entry.pool))
    return await list_response(ModelList(data=[]), views, every=25)


@router.get("/v1/models/{model_id:path}", responses=error_responses(404))
async def retrieve_model(gateway: GatewayDep, caller: CallerDep, model_id: str) -> Model:
    """One model."""
    return _view(await _entry(gateway, caller, model_id), caller.tenant, gateway)


@router.delete("/v1/models/{model_id:path}", responses=error_responses(404, 429))
async def delete_model(gateway: GatewayDep, creator: CreatorDep, model_id: str) -> ModelDeleted:
    """Deletes a cocktail's version, or all versions of a name."""
    await _entry(gateway, creator, model_id)
    await gateway.service.delete(creator.tenant, model_id, actor=creator.actor)
    return ModelDeleted(id=model_id)


async def _entry(gateway: Gateway, caller: Caller, model_id: str) -> ModelEntry:
    entry = await gateway.service.find_model_entry(caller.tenant, model_id)
    if entry is None or not caller.sees(entry.pool):
        raise no_model(model_id, gateway.service.catalog.names(caller.tenant, visible=caller.pools))
    return entry


def _view(entry: ModelEntry, tenant: str, gateway: Gateway) -> Model:
    is_operators = "@" not in entry.id and entry.id.partition("/")[0] in gateway.pools
    model_type, capability = OF_KIND[entry.kind]
    calls_tools = gateway.settings.pool(entry.pool).calls_tools
    return Model(
        id=entry.id,
        created=entry.created,
        owned_by="operator" if is_operators else tenant,
        kind=entry.kind,
        type=model_type,
        capabilities=[capability, "tools"] if calls_tools else [capability],
        pool=entry.pool,
        max_model_len=gateway.engine(entry.pool).max_model_len,
    )
