"""What probes read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from cocktail_serve.engines.snapshot import EngineSnapshot, EngineState


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    version: str


class EngineReadiness(BaseModel):
    state: EngineState
    resident: str | None = Field(description="Digest of the recipe whose parameters are in the engine now.")
    queued: int = Field(description="Requests that wait for their recipe's turn.")
    detail: dict[str, Any]

    @classmethod
    def of(cls, engine: EngineSnapshot) -> EngineReadiness:
        return cls(state=engine.state, resident=engine.resident, queued=engine.num_queued, detail=dict(engine.detail))


class Readiness(BaseModel):
    status: Literal["ready", "not_ready", "stopping"]
    pools: dict[str, EngineReadiness]
