"""What is said of several engines as if they were one."""

from __future__ import annotations

from collections.abc import Sequence

from cocktail_serve.engines.scheduler_snapshot import Queue, SchedulerSnapshot
from cocktail_serve.engines.snapshot import EngineDetail, EngineSnapshot, EngineState, RestartProgress
from cocktail_serve.engines.stats import EngineStats

_BEST_FIRST: Sequence[EngineState] = ("ready", "restarting", "starting", "failed", "stopped")


def combined_snapshot(each: Sequence[EngineSnapshot], *, restart: RestartProgress | None) -> EngineSnapshot:
    """All of them as one, which is ready where any is: it answers. What each does is in `replicas`.

    Args:
        restart: how far the last rolling restart is.
    """
    state = min((one.state for one in each), key=_BEST_FIRST.index)
    detail = EngineDetail()
    reasons = {number: one.detail["reason"] for number, one in enumerate(each) if "reason" in one.detail}
    if reasons:
        detail["reason"] = "; ".join(f"replica {number}: {reason}" for number, reason in reasons.items())
    for one in each:
        if one.detail.get("log") and state != "ready":
            detail["log"] = one.detail["log"]
    return EngineSnapshot(
        state,
        num_queued=sum(one.num_queued for one in each),
        detail=detail,
        scheduler=_combined_scheduler([one.scheduler for one in each]),
        counters=EngineStats.sum_of([one.counters for one in each]),
        replicas=tuple(each),
        restart=restart,
    )


def _combined_scheduler(each: Sequence[SchedulerSnapshot]) -> SchedulerSnapshot:
    """Turns are each engine's own: phase and resident recipe are nobody's."""
    pinned = {one.pinned for one in each}
    return SchedulerSnapshot(
        phase=None,
        num_in_flight=sum(one.num_in_flight for one in each),
        pinned=pinned.pop() if len(pinned) == 1 else None,
        is_drained=all(one.is_drained for one in each),
        queues=_combined_queues([queue for one in each for queue in one.queues]),
    )


def _combined_queues(queues: Sequence[Queue]) -> tuple[Queue, ...]:
    """Those who wait for one recipe, wherever, for the reason that the first of them has."""
    by_recipe: dict[str, Queue] = {}
    for queue in sorted(queues, key=lambda queue: -queue.oldest_s):
        first = by_recipe.setdefault(queue.recipe_digest, queue)
        if first is not queue:
            by_recipe[queue.recipe_digest] = Queue(
                recipe_digest=queue.recipe_digest,
                num_waiting=first.num_waiting + queue.num_waiting,
                num_background=first.num_background + queue.num_background,
                oldest_s=first.oldest_s,
                reason=first.reason,
            )
    return tuple(by_recipe.values())
