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
    replicas: list[EngineState] = Field(description="State of each of its engines; one that is ready answers.")
    queued: int = Field(description="Requests that wait for their recipe's turn.")
    detail: dict[str, Any] = Field(
        description="Why it is not ready, or which mixing path it took. The last lines of a server that did not start, "
        "`log`, only where no key is required: `GET /admin/engines/{id}` has them always."
    )

    @classmethod
    def of(cls, engine: EngineSnapshot, *, with_log: bool) -> EngineReadiness:
        """What anybody may read; with the log of a server that did not start where everybody is the operator."""
        detail: dict[str, Any] = {name: value for name, value in engine.detail.items() if with_log or name != "log"}
        return cls(
            state=engine.state,
            resident=engine.resident,
            replicas=[one.state for one in engine.each],
            queued=engine.num_queued,
            detail=detail,
        )


class Readiness(BaseModel):
    status: Literal["ready", "not_ready", "stopping"]
    registry: str | None = Field(
        None, description="Why the registry is lost and does not come back by itself; null: it is not."
    )
    pools: dict[str, EngineReadiness]
