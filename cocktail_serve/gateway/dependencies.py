"""What FastAPI hands to routes: the gateway, and who is asking, with the right to."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from cocktail_serve.gateway.authentication import Caller
from cocktail_serve.gateway.exchange import exchange_of
from cocktail_serve.gateway.gateway import Gateway
from cocktail_serve.gateway.inside_request import inside_request_of
from cocktail_serve.gateway.rate_limits import enforce_limits


async def gateway_of(request: Request) -> Gateway:
    """The gateway of the app that the request came to."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway


GatewayDep = Annotated[Gateway, Depends(gateway_of)]


async def caller_of(request: Request, gateway: GatewayDep) -> Caller:
    """Who sent the request; may use models.

    Raises:
        AuthenticationError: a key is required, and there is none; or one was sent that is not valid.
        PermissionDeniedError: the key lacks the scope `use`; or a proxy opens to others what is this machine's.
    """
    inside = inside_request_of(request.scope)
    if inside is not None:
        exchange_of(request).tenant = inside.caller.tenant
        return inside.caller
    headers = request.headers
    caller = await gateway.authenticator.caller(headers.get("authorization", ""), header_names=headers.keys())
    exchange_of(request).tenant = caller.tenant
    caller.require("use")
    return caller


CallerDep = Annotated[Caller, Depends(caller_of)]


async def tenant_of(caller: CallerDep) -> str:
    """Whose request it is; raises as `caller_of` does."""
    return caller.tenant


TenantDep = Annotated[str, Depends(tenant_of)]


async def creator_of(request: Request, gateway: GatewayDep, caller: CallerDep) -> Caller:
    """Who makes, changes or deletes something; it counts against the tenant's requests a minute.

    Raises:
        AuthenticationError: as `caller_of`.
        PermissionDeniedError: the key lacks the scope `create`.
        RateLimitError: over the tenant's requests a minute.
    """
    caller.require("create")
    enforce_limits(exchange_of(request), gateway.limiter.admit_change(caller.tenant))
    return caller


CreatorDep = Annotated[Caller, Depends(creator_of)]


async def admin_of(request: Request, gateway: GatewayDep) -> Caller:
    """Who sent a request to `/admin`.

    Raises:
        AuthenticationError: no key, or one that is not valid; even where `server.auth` is off.
        PermissionDeniedError: the key lacks the scope `admin`.
    """
    admin = await gateway.authenticator.admin(request.headers.get("authorization", ""))
    exchange_of(request).tenant = admin.tenant
    return admin


AdminDep = Annotated[Caller, Depends(admin_of)]
