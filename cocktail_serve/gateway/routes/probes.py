"""`/health`, `/ready` and `/metrics`: for probes and scrapers, which carry no key."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from fastapi import APIRouter, Response

import cocktail_serve
from cocktail_serve.engines.snapshot import EngineSnapshot
from cocktail_serve.gateway.dependencies import GatewayDep
from cocktail_serve.gateway.gateway import Gateway
from cocktail_serve.gateway.schemas.probes import EngineReadiness, Health, Readiness

router = APIRouter(tags=["operations"])

_METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/health")
async def health() -> Health:
    """The process answers; says nothing about engines."""
    return Health(version=cocktail_serve.__version__)


@router.get(
    "/ready",
    responses={
        503: {
            "model": Readiness,
            "description": "An engine is not ready, or the registry is lost; the body says which and why.",
        }
    },
)
async def ready(gateway: GatewayDep, response: Response) -> Readiness:
    """Asks each engine itself, all at once, each within `server.ready_deadline_s`; looks whether the registry's file is
    still there. A database server that is gone for a while is no reason: known models are served meanwhile."""
    # a probe that comes while the server stops is answered at once: engines may be past answering
    deadline_s = 0.1 if gateway.lifecycle.is_stopping else gateway.settings.server.ready_deadline_s
    snapshots = await _snapshots(gateway, deadline_s=deadline_s)
    is_stopping = gateway.lifecycle.is_stopping
    lost = gateway.database.reason_lost()
    is_ready = not is_stopping and not lost and all(engine.state == "ready" for engine in snapshots.values())
    if not is_ready:
        response.status_code = 503
        response.headers["retry-after"] = "5"
    with_log = not gateway.settings.server.requires_key
    return Readiness(
        status="stopping" if is_stopping else "ready" if is_ready else "not_ready",
        registry=(lost if with_log else "lost: the log says why") if lost else None,
        pools={pool_id: EngineReadiness.of(engine, with_log=with_log) for pool_id, engine in snapshots.items()},
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text."}},
)
async def metrics(gateway: GatewayDep) -> Response:
    """Counters in Prometheus' text format."""
    # a scrape comes every few seconds: it does not wait long for an engine that hangs
    deadline_s = min(1.0, gateway.settings.server.ready_deadline_s)
    snapshots, counted = await asyncio.gather(
        _snapshots(gateway, deadline_s=deadline_s), _server_metrics(gateway, deadline_s=deadline_s)
    )
    text = gateway.metrics.render(snapshots, gateway.service.catalog.statuses(), server_metrics=counted)
    return Response(text, media_type=_METRICS_MEDIA_TYPE)


async def _snapshots(gateway: Gateway, *, deadline_s: float) -> dict[str, EngineSnapshot]:
    snapshots = await asyncio.gather(*(engine.snapshot(deadline_s=deadline_s) for engine in gateway.engines.values()))
    return dict(zip(gateway.engines, snapshots, strict=True))


async def _server_metrics(gateway: Gateway, *, deadline_s: float) -> dict[str, Sequence[Mapping[str, float]]]:
    engines = gateway.decoders
    counted = await asyncio.gather(*(engine.server_metrics(deadline_s=deadline_s) for engine in engines.values()))
    return dict(zip(engines, counted, strict=True))
