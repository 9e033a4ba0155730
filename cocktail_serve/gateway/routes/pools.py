"""`/v1/pools`: what the operator has defined."""

from __future__ import annotations

from fastapi import APIRouter

from cocktail_serve.gateway.dependencies import CallerDep, GatewayDep
from cocktail_serve.gateway.openapi import error_responses
from cocktail_serve.gateway.schemas.pools import PoolList, PoolView

router = APIRouter(tags=["pools"])


@router.get("/v1/pools", responses=error_responses())
async def list_pools(gateway: GatewayDep, caller: CallerDep) -> PoolList:
    """The pools that are there for the tenant, and what they are made of."""
    return PoolList(
        data=[
            PoolView.of(pool, gateway.settings.pool(pool.id), dtype=gateway.engines[pool.id].dtype)
            for _, pool in sorted(gateway.pools.items())
            if caller.sees(pool.id)
        ]
    )
