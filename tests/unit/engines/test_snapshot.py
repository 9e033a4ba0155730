"""A snapshot of an engine may be read in another process, and changes no more."""

from __future__ import annotations

import pickle

from cocktail_serve.engines.scheduler_snapshot import Queue, SchedulerSnapshot
from cocktail_serve.engines.snapshot import EngineSnapshot
from cocktail_serve.engines.stats import EngineStats


def make_stats() -> EngineStats:
    stats = EngineStats(num_cache_hits=3, num_swaps_by_source={"files": 2}, num_restarts=1)
    stats.wait.observe(0.3)
    stats.observe_swap(0.02)
    return stats


def test_it_can_be_pickled() -> None:
    snapshot = EngineSnapshot(
        "restarting",
        resident="a" * 64,
        num_queued=2,
        detail={"reason": "lost", "cached": ["b" * 64], "cached_bytes": 7},
        scheduler=SchedulerSnapshot(
            phase="draining",
            num_in_flight=1,
            resident="a" * 64,
            turn_s=0.5,
            pinned="b" * 64,
            is_drained=True,
            queues=(Queue("b" * 64, num_waiting=2, num_background=1, oldest_s=0.25, reason="turn_ends"),),
        ),
        counters=make_stats(),
    )
    again = pickle.loads(pickle.dumps(snapshot))
    assert again == snapshot
    assert (again.counters.wait.count, again.counters.swap.total) == (1, 0.02)
    assert again.scheduler.queues[0].reason == "turn_ends"


def test_its_counters_are_its_own() -> None:
    stats = make_stats()
    kept = stats.copy()
    assert kept == stats
    stats.wait.observe(0.1)
    stats.num_swaps_by_source["files"] += 1
    stats.num_restarts += 1
    assert kept == make_stats()
