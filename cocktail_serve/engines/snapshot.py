"""One engine at one moment, for probes, scrapers and the operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypedDict

from cocktail_serve.engines.scheduler_snapshot import SchedulerSnapshot
from cocktail_serve.engines.stats import EngineStats

EngineState = Literal["starting", "ready", "restarting", "failed", "stopped"]


class EngineDetail(TypedDict, total=False):
    """What the operator is shown of an engine besides, as far as it applies; never a prompt or an example.

    Attributes:
        reason: why it is not ready.
        log: the last lines that its server wrote, where it ended before it was ready.
        mixing: its server is busy with a mix, and has not said more.
        device: of an engine in this process.
        mode, mixing_path, streams_because, captured, mixing_kernel, in_flight, cached, cached_bytes: as of the plugin's
            `StatusReply`; an engine in this process has the last two.
    """

    reason: str
    log: list[str]
    mixing: bool
    device: str
    mode: str
    mixing_path: str
    streams_because: str | None
    captured: list[str]
    mixing_kernel: str
    in_flight: int
    cached: list[str]
    cached_bytes: int


@dataclass(frozen=True, slots=True)
class RestartProgress:
    """How far the last restart of a pool's engines is, one after the other.

    Attributes:
        num_done: engines that were started again.
        num_total: engines of the pool.
        replica: number of the one that is being restarted; None: it has ended.
        error: why it was given up; None: it was not.
    """

    num_done: int
    num_total: int
    replica: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What an engine said of itself before a deadline, and what its owner knows of it, in plain values of its own.

    It changes no more and can be pickled: the engine may live in another process than who reads it.

    Attributes:
        resident: digest of the recipe whose parameters are in the engine now, as the engine itself says, where it
            holds one at a time.
        num_queued: requests that wait for their turn; of an engine without turns, inputs.
        scheduler: what it does, and who waits.
        counters: since the gateway started.
        node: name of the machine that it runs on; empty: the gateway's own process.
        replicas: each of the engines that serve the pool together; empty where it is one.
        restart: of these engines; None: there was none.
    """

    state: EngineState
    resident: str | None = None
    num_queued: int = 0
    detail: EngineDetail = field(default_factory=EngineDetail)
    scheduler: SchedulerSnapshot = field(default_factory=lambda: SchedulerSnapshot(phase=None, num_in_flight=0))
    counters: EngineStats = field(default_factory=EngineStats)
    node: str = ""
    replicas: tuple[EngineSnapshot, ...] = ()
    restart: RestartProgress | None = None

    @property
    def each(self) -> tuple[EngineSnapshot, ...]:
        """The engines one by one, in the order of their numbers."""
        return self.replicas or (self,)
