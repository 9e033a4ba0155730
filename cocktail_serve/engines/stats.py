"""What an engine counts, in plain numbers: the gateway turns them into metrics, the engines know no metrics library."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

WAIT_BOUNDS_S = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SWAP_BOUNDS_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(slots=True)
class Histogram:
    """Observations counted per bucket.

    Attributes:
        bounds: upper bounds of the buckets, inclusive, ascending.
        counts: observations per bucket, one more than `bounds` for what lies above the last.
        total: sum of all observations.
    """

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, other: Histogram) -> None:
        """Counts what another of the same bounds has observed too."""
        self.counts = [mine + more for mine, more in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


@dataclass(slots=True)
class EngineStats:
    """Counters since the gateway started; they only grow, restarts of the engine included.

    Attributes:
        wait: seconds between a request's arrival and its admission.
        swap: seconds of each mix that made another recipe resident.
        mix: seconds of the mixing alone, where the engine tells it apart from the swap around it.
        num_cache_hits, num_cache_misses: parameters of a mixture found in memory, and those that had to be mixed.
        last_swap_s: seconds of the last of those; None: there was none.
        num_swaps_by_source: where the parameters came from: `experts`, `cache` or `files`.
        num_drained: streams ended because they outlived `drain_s`.
        num_queue_timeouts: requests that were never admitted.
        num_restarts: times the engine was lost and started again.
    """

    wait: Histogram = field(default_factory=lambda: Histogram(WAIT_BOUNDS_S))
    swap: Histogram = field(default_factory=lambda: Histogram(SWAP_BOUNDS_S))
    last_swap_s: float | None = None
    mix: Histogram = field(default_factory=lambda: Histogram(SWAP_BOUNDS_S))
    num_cache_hits: int = 0
    num_cache_misses: int = 0
    num_swaps_by_source: dict[str, int] = field(default_factory=dict)
    num_drained: int = 0
    num_queue_timeouts: int = 0
    num_restarts: int = 0

    def observe_swap(self, seconds: float) -> None:
        """Counts a mix that made another recipe resident."""
        self.swap.observe(seconds)
        self.last_swap_s = seconds

    def observe_mix(self, seconds: float, *, source: str) -> None:
        """Counts the mixing alone, and where its parameters came from."""
        self.mix.observe(seconds)
        self.num_swaps_by_source[source] = self.num_swaps_by_source.get(source, 0) + 1

    @classmethod
    def sum_of(cls, each: Iterable[EngineStats]) -> Self:
        """What several engines counted, together; of `last_swap_s` any of them."""
        whole = cls()
        for stats in each:
            whole.wait.add(stats.wait)
            whole.swap.add(stats.swap)
            whole.mix.add(stats.mix)
            whole.last_swap_s = stats.last_swap_s if whole.last_swap_s is None else whole.last_swap_s
            whole.num_cache_hits += stats.num_cache_hits
            whole.num_cache_misses += stats.num_cache_misses
            for source, number in stats.num_swaps_by_source.items():
                whole.num_swaps_by_source[source] = whole.num_swaps_by_source.get(source, 0) + number
            whole.num_drained += stats.num_drained
            whole.num_queue_timeouts += stats.num_queue_timeouts
            whole.num_restarts += stats.num_restarts
        return whole

    def copy(self) -> Self:
        """The counters as they are now, which do not grow any more."""
        return copy.deepcopy(self)
