"""Which of several engines a request goes to: pure rules over what each of them does now.

Where recipes take turns (`ResidentPlacement`) a request goes to the engine that has its recipe, or that others wait at
for the same recipe; else to the recipe's *home*, so that equal requests meet and find their mixture in that engine's
memory. It spills to the engine that would let it in soonest where waiting at the first costs more than the swap that it
saves. A recipe that fills more than half of an engine's slots is waited for at the next one too, so a hot recipe gets
two, and as many more as it needs; when it cools, its home keeps it.

Where recipes share a batch (`SharedPlacement`) nothing is resident: the shortest queue has it, but for its own home
(of tenant and recipe, which is what the prefix cache is kept by) as long as that is not much longer.

Homes are found by rendezvous hashing: with an engine more or less only the recipes of that one move.

Knows no clock, no event loop and no engine: whoever routes to engines elsewhere can decide by the same rules, and
`bench.placement` simulates them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cocktail_serve.engines.load import EngineLoad

DEFAULT_SWAP_S = 0.5
"""What a swap is taken for until one was seen."""

DEFAULT_REQUEST_S = 1.0
"""How long a request is taken to hold its slot until one has ended."""

CROWDED_SHARE = 0.5
"""Share of an engine's slots beyond which its requests slow each other down, which counts as waiting."""

AFFINITY_SHARE = 1 / 8
"""Of an engine's slots: how many more requests than the emptiest a home may have, in whose prefix cache they find their
beginnings."""


@dataclass(frozen=True, slots=True)
class PlacedRequest:
    """What is known of a request before it is sent anywhere.

    Attributes:
        recipe_digest: of the recipe that answers it.
        tenant: whose it is; empty for background work.
        is_background: whether it gives way to requests: scoring, mixing ahead.
    """

    recipe_digest: str
    tenant: str = ""
    is_background: bool = False


Loads = Mapping[str, EngineLoad]
"""The engines of a pool by name, as they are now. Names outlive the engines: they say where a recipe is at home."""


class Placement(Protocol):
    """Chooses between engines. Changes nothing."""

    def choose(self, request: PlacedRequest, loads: Loads, *, request_s: float) -> str:
        """The name of the engine that a request goes to.

        Args:
            loads: at least one.
            request_s: how long a request holds its slot, on average, seconds.
        """
        ...

    def should_move(
        self, request: PlacedRequest, at: str, to: str, loads: Loads, *, request_s: float, waited_s: float
    ) -> bool:
        """Whether a request in line at one engine, which lets it in some time, does better in an idle one.

        Args:
            waited_s: how long it has waited there. What has lasted long is expected to last as long again.
        """
        ...


def homes(key: str, names: Sequence[str]) -> list[str]:
    """Names in the order in which they are a key's home, the first at first (rendezvous hashing; Thaler and
    Ravishankar, 1998)."""
    return sorted(names, key=lambda name: _weight(name, key), reverse=True)


def _weight(name: str, key: str) -> bytes:
    return hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=8).digest()


def open_to(request: PlacedRequest, loads: Loads) -> Loads:
    """The engines that may be asked: those that let it in; where there is none, those that may come up; else all, which
    say why they do not."""
    kept_in = {name: load for name, load in loads.items() if not load.keeps_out(request.recipe_digest)}
    up = {name: load for name, load in kept_in.items() if load.is_up}
    coming = {name: load for name, load in kept_in.items() if not load.is_failed}
    return up or coming or kept_in or loads


@dataclass(frozen=True, slots=True)
class ResidentPlacement:
    """`Placement` on engines that hold one recipe at a time.

    Attributes:
        slice_s: how long a recipe keeps its turn while others wait.
        spill_swaps: how many swaps more than elsewhere a request waits where its recipe is, or at home, before it goes
            elsewhere: what is resident there is swapped out, and has to come back.
    """

    slice_s: float
    spill_swaps: float = 1.0

    def choose(self, request: PlacedRequest, loads: Loads, *, request_s: float) -> str:
        loads = open_to(request, loads)
        if len(loads) == 1:
            return next(iter(loads))
        digest = request.recipe_digest
        order = homes(digest, list(loads))
        if request.is_background:
            return min(order, key=lambda name: _background_ahead(loads[name], digest))
        if not any(load.is_up for load in loads.values()):
            return order[0]
        waits = {name: self.wait_s(loads[name], digest, request_s=request_s) for name in order}
        holding = [name for name in order if _holds(loads[name], digest)]
        preferred = min(holding or order[:1], key=waits.__getitem__)
        soonest = min(order, key=waits.__getitem__)
        margin = self.spill_swaps * _swap_s(loads[soonest])
        return soonest if waits[preferred] > waits[soonest] + margin else preferred

    def should_move(
        self, request: PlacedRequest, at: str, to: str, loads: Loads, *, request_s: float, waited_s: float
    ) -> bool:
        digest = request.recipe_digest
        if request.is_background:
            return _background_ahead(loads[at], digest) > _background_ahead(loads[to], digest)
        stays_s = max(waited_s, self.wait_s(loads[at], digest, request_s=request_s))
        margin = self.spill_swaps * _swap_s(loads[to])
        return stays_s > self.wait_s(loads[to], digest, request_s=request_s) + margin

    def wait_s(self, load: EngineLoad, digest: str, *, request_s: float) -> float:
        """Seconds until an engine would answer one request more by a recipe, as things stand: the rest of the turn
        that is on, the turns before its own with their swaps, its own swap, and those who are before it then."""
        swap_s = _swap_s(load)
        own = load.waiting.get(digest, 0)
        if load.resident == digest:
            return _crowding(load.num_in_flight + own, load) * request_s
        ahead = sum(
            swap_s + min(self.slice_s, (1 + _crowding(num, load)) * request_s)
            for other, num in load.waiting.items()
            if other not in (digest, load.resident)
        )
        is_in_use = load.num_in_flight > 0 or load.num_background > 0
        turn_s = load.turn_left_s + request_s if is_in_use else 0.0
        return turn_s + ahead + swap_s + _crowding(own, load) * request_s


@dataclass(frozen=True, slots=True)
class SharedPlacement:
    """`Placement` on engines that answer by any number of recipes at a time."""

    def choose(self, request: PlacedRequest, loads: Loads, *, request_s: float) -> str:
        loads = open_to(request, loads)
        order = homes(f"{request.tenant}\0{request.recipe_digest}", list(loads))
        if request.is_background:
            return min(order, key=lambda name: _work(loads[name]))
        least = min(load.num_asked for load in loads.values())
        return next(name for name in order if loads[name].num_asked <= least + _slack(loads[name]))

    def should_move(
        self, request: PlacedRequest, at: str, to: str, loads: Loads, *, request_s: float, waited_s: float
    ) -> bool:
        if request.is_background:
            return _work(loads[at]) > _work(loads[to]) + 1
        return loads[at].num_asked > loads[to].num_asked + _slack(loads[at])


def idle(loads: Loads) -> Iterator[str]:
    """Engines that would let one more request in without a line: those that lines elsewhere may be shortened by."""
    for name, load in loads.items():
        has_line = load.waiting or load.background
        if load.is_up and not load.is_drained and not has_line and load.num_in_flight < _uncrowded(load):
            yield name


def _holds(load: EngineLoad, digest: str) -> bool:
    return load.resident == digest or digest in load.waiting


def _swap_s(load: EngineLoad) -> float:
    return DEFAULT_SWAP_S if load.swap_s is None else load.swap_s


def _crowding(num_before: int, load: EngineLoad) -> float:
    """How many times the length of a request one waits with so many before it: for a slot, and for those beside it."""
    return max(0.0, num_before + 1 - _uncrowded(load)) / load.num_slots


def _uncrowded(load: EngineLoad) -> float:
    """Requests that do not slow each other down."""
    return max(1.0, load.num_slots * CROWDED_SHARE)


def _background_ahead(load: EngineLoad, digest: str) -> tuple[int, int]:
    """Visits of other recipes that come first, then requests."""
    others = (load.waiting.keys() | load.background.keys()) - {digest}
    is_in_use = load.num_asked > 0 or load.num_background > 0
    return len(others) + (is_in_use and load.resident != digest), load.num_asked


def _work(load: EngineLoad) -> int:
    return load.num_asked + load.num_background + sum(load.background.values())


def _slack(load: EngineLoad) -> int:
    return max(1, int(load.num_slots * AFFINITY_SHARE))
