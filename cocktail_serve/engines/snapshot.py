"""One engine at one moment, for probes, scrapers and the operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cocktail_serve.engines.scheduling import SchedulerSnapshot
from cocktail_serve.engines.stats import EngineStats

EngineState = Literal["starting", "ready", "restarting", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What an engine said of itself before a deadline, and what its owner knows of it, in plain values of its own.

    It changes no more and can be pickled: the engine may live in another process than who reads it.

    Attributes:
        detail: why it is not ready (`reason`), or which mixing path it took and what it keeps; never a prompt or an
            example.
        resident: digest of the recipe whose parameters are in the engine now, as the engine itself says, where it
            holds one at a time.
        num_queued: requests that wait for their turn; of an engine without turns, inputs.
        scheduler: what it does, and who waits.
        counters: since the gateway started.
    """

    state: EngineState
    resident: str | None = None
    num_queued: int = 0
    detail: Mapping[str, Any] = field(default_factory=dict)
    scheduler: SchedulerSnapshot = field(default_factory=lambda: SchedulerSnapshot(phase=None, num_in_flight=0))
    counters: EngineStats = field(default_factory=EngineStats)
