"""What probes read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from cocktail_serve.engines.base import EngineHealth, EngineState


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    version: str


class EngineReadiness(BaseModel):
    state: EngineState
    resident: str | None = Field(description="Digest of the recipe whose parameters are in the engine now.")
    queued: int = Field(description="Requests that wait for their recipe's turn.")
    detail: dict[str, Any]

    @classmethod
    def of(cls, health: EngineHealth) -> EngineReadiness:
        return cls(state=health.state, resident=health.resident, queued=health.queued, detail=dict(health.detail))


class Readiness(BaseModel):
    status: Literal["ready", "not_ready", "stopping"]
    pools: dict[str, EngineReadiness]
