"""`/admin`: keys and tenants, for the operator. A key with the scope `admin` is asked for even where others are not."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from cocktail_serve.errors import NotFoundError
from cocktail_serve.gateway.dependencies import AdminDep, GatewayDep, admin_of
from cocktail_serve.gateway.json_body import JSONObject
from cocktail_serve.gateway.openapi import error_responses, json_request
from cocktail_serve.gateway.schemas.admin import (
    CreatedKey,
    KeyBody,
    KeyList,
    KeyView,
    RotationBody,
    TenantBody,
    TenantList,
    TenantView,
)
from cocktail_serve.request_schema import parse_as
from cocktail_serve.suggestions import did_you_mean

router = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(admin_of)])


@router.post("/keys", status_code=201, responses=error_responses(413), openapi_extra=json_request(KeyBody))
async def create_key(gateway: GatewayDep, admin: AdminDep, body: JSONObject) -> CreatedKey:
    """Makes a key, which is shown this once."""
    wanted = parse_as(KeyBody, body)
    key, secret = await gateway.tenants.create_key(
        wanted.tenant, wanted.scopes, lifetime_s=wanted.expires_in_s, actor=admin.actor
    )
    return CreatedKey.made(key, secret)


@router.get("/keys", responses=error_responses())
async def list_keys(gateway: GatewayDep, tenant: str | None = None) -> KeyList:
    """All keys, those that ended too, without the secrets; of one tenant if given."""
    return KeyList(data=[KeyView.of(key) for key in await gateway.tenants.keys(tenant)])


@router.delete("/keys/{key_id}", responses=error_responses(404))
async def revoke_key(gateway: GatewayDep, admin: AdminDep, key_id: str) -> KeyView:
    """Ends a key: at once here, within seconds in other processes on the same store."""
    key = await gateway.tenants.revoke(key_id, actor=admin.actor)
    gateway.authenticator.forget(key.id)
    return KeyView.of(key)


@router.post(
    "/keys/{key_id}/rotate",
    status_code=201,
    responses=error_responses(404, 409, 413),
    openapi_extra=json_request(RotationBody),
)
async def rotate_key(gateway: GatewayDep, admin: AdminDep, key_id: str, body: JSONObject) -> CreatedKey:
    """Makes a key like this one, which stays valid for `overlap_s` more seconds."""
    wanted = parse_as(RotationBody, body)
    key, secret = await gateway.tenants.rotate(key_id, overlap_s=wanted.overlap_s, actor=admin.actor)
    gateway.authenticator.forget(key_id)
    return CreatedKey.made(key, secret)


@router.get("/tenants", responses=error_responses())
async def list_tenants(gateway: GatewayDep) -> TenantList:
    """All tenants that have, or had, a key or a limit to certain pools."""
    limits_of = gateway.tenants_cache.limits_of
    return TenantList(
        data=[TenantView.of(tenant, limits_of(tenant.name)) for tenant in await gateway.tenants.tenants()]
    )


@router.put("/tenants/{name}", responses=error_responses(404, 413), openapi_extra=json_request(TenantBody))
async def update_tenant(gateway: GatewayDep, admin: AdminDep, name: str, body: JSONObject) -> TenantView:
    """Says which pools a tenant may use (others are not there for it), and which limits it has."""
    wanted = parse_as(TenantBody, body)
    unknown = sorted(set(wanted.pools or ()) - gateway.pools.keys())
    if unknown:
        known = ", ".join(sorted(gateway.pools))
        raise NotFoundError(
            f"there is no pool {unknown[0]!r}; there are: {known}{did_you_mean(unknown[0], gateway.pools)}",
            param="pools",
            code="pool_not_found",
        )
    tenant = await gateway.tenants.change_tenant(name, **wanted.changes, actor=admin.actor)
    gateway.authenticator.forget_tenant(name)
    gateway.tenants_cache.set(tenant)
    return TenantView.of(tenant, gateway.tenants_cache.limits_of(name))
