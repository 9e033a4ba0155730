"""Where requests go, of many replicas: swaps a second and how long requests wait, by policy. No engines.

The turns and the dispatcher that serve, and the policies in turn, on a clock that jumps to the next event: an engine is
a mix that takes its time and answers that take theirs. A recipe that an engine has mixed before comes from memory, as
long as it is among the last `--kept`. Requests arrive at random (Poisson), for recipes of which some are asked far more
than others (Zipf), the same requests at the same times for each policy:

    random       any replica
    hashing      the recipe's home alone, by rendezvous hashing
    two choices  the emptier of two at random, as Ray Serve routes
    stays        ours, but who is in line stays in it
    ours         `ResidentPlacement`, as it serves
    oracle       knows when each answer will have ended, and which recipe is asked when: of the replicas that answer
                 soonest, the one whose resident recipe is not asked for the longest time

    python -m bench.placement --rate 15 --rate 50

Prints JSON: seconds from arrival to admission, swaps and their share from memory, and how full replicas were.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import itertools
import json
import random
import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.machine import describe_machine
from cocktail_serve.engines.fairness import ServedTokensByTenant
from cocktail_serve.engines.line_place import LinePlace
from cocktail_serve.engines.load import EngineLoad
from cocktail_serve.engines.replicas.dispatcher import Dispatcher
from cocktail_serve.engines.replicas.placement import (
    Loads,
    PlacedRequest,
    Placement,
    ResidentPlacement,
    homes,
    open_to,
)
from cocktail_serve.engines.turns.exclusive import ExclusiveTurns
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.errors import CapacityError
from cocktail_serve.recipe import Recipe
from tests.jumping_clock import run

QUEUE_TIMEOUT_S = 60.0
TOKENS = 100
"""Of each answer, which tenants are charged."""


@dataclass(frozen=True, slots=True)
class Request:
    """One that arrives.

    Attributes:
        at: seconds from the start.
        recipe: number of its recipe, 0 is asked most.
        seconds: that its answer takes.
    """

    at: float
    recipe: int
    tenant: str
    seconds: float


@dataclass
class Outcome:
    """What became of them."""

    waits: list[float] = field(default_factory=list)
    swaps: int = 0
    from_memory: int = 0
    refused: int = 0
    seconds: float = 0.0


def make_requests(arguments: argparse.Namespace, rate: float) -> list[Request]:
    """The same for each policy."""
    pick = random.Random(arguments.seed)
    weights = [1 / (number + 1) ** arguments.zipf for number in range(arguments.recipes)]
    cumulated = list(itertools.accumulate(weights))
    requests, now = [], 0.0
    while (now := now + pick.expovariate(rate)) < arguments.seconds:
        recipe = pick.choices(range(arguments.recipes), cum_weights=cumulated)[0]
        tenant = f"tenant-{recipe % arguments.tenants}"
        requests.append(Request(now, recipe, tenant, pick.expovariate(1 / arguments.answer_s)))
    return requests


class SimulatedEngine:
    """One replica: its turns are those that serve."""

    def __init__(self, arguments: argparse.Namespace, outcome: Outcome, served_tokens: ServedTokensByTenant) -> None:
        self.turns = ExclusiveTurns(
            slice_s=arguments.slice_s,
            drain_s=30.0,
            background_delay_s=2 * arguments.slice_s,
            max_in_flight=arguments.slots,
            served_tokens=served_tokens,
        )
        self.ends: dict[Lease, float] = {}
        self._arguments = arguments
        self._outcome = outcome
        self._kept: OrderedDict[str, None] = OrderedDict()

    def load(self) -> EngineLoad:
        return self.turns.load()

    async def mix(self, recipe: Recipe) -> float:
        is_kept = recipe.digest in self._kept
        seconds: float = self._arguments.kept_swap_s if is_kept else self._arguments.swap_s
        await asyncio.sleep(seconds)
        self._outcome.swaps += 1
        self._outcome.from_memory += is_kept
        self._kept[recipe.digest] = None
        self._kept.move_to_end(recipe.digest)
        if len(self._kept) > self._arguments.kept:
            self._kept.popitem(last=False)
        return seconds

    async def answer(self, lease: Lease, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self.ends[lease] = loop.time() + seconds
        try:
            with lease, lease.interruptible():
                await asyncio.sleep(seconds)
        finally:
            del self.ends[lease]


class Staying:
    """Where who is in line stays there."""

    def should_move(
        self, request: PlacedRequest, at: str, to: str, loads: Loads, *, request_s: float, waited_s: float
    ) -> bool:
        return False


class Random(Staying):
    def __init__(self, seed: int) -> None:
        self._pick = random.Random(seed)

    def choose(self, request: PlacedRequest, loads: Loads, *, request_s: float) -> str:
        return self._pick.choice(list(open_to(request, loads)))


class Hashing(Staying):
    def choose(self, request: PlacedRequest, loads: Loads, *, request_s: float) -> str:
        return homes(request.recipe_digest, list(open_to(request, loads)))[0]


class TwoChoices(Random):
    def choose(self, request: PlacedRequest, loads: Loads, *, request_s: float) -> str:
        two = self._pick.sample(list(open_to(request, loads)), 2)
        return min(two, key=lambda name: loads[name].num_asked)


class Stays(Staying):
    def __init__(self, placement: ResidentPlacement) -> None:
        self.choose = placement.choose


class Oracle(Staying):
    """Knows the ends of answers and the requests that will come."""

    def __init__(
        self, engines: dict[str, SimulatedEngine], digests: Sequence[str], requests: Sequence[Request]
    ) -> None:
        self._engines = engines
        self._rules = ResidentPlacement(slice_s=0.0)
        self._asked_at: defaultdict[str, list[float]] = defaultdict(list)
        for request in requests:
            self._asked_at[digests[request.recipe]].append(request.at)

    def choose(self, request: PlacedRequest, loads: Loads, *, request_s: float) -> str:
        now = asyncio.get_running_loop().time()
        waits = {name: self._wait_s(load, name, request, now, request_s) for name, load in loads.items()}
        soonest = min(waits.values())
        return max(
            (name for name, wait in waits.items() if wait <= soonest + 1e-6),
            key=lambda name: (loads[name].resident == request.recipe_digest, self._next_use(loads[name].resident, now)),
        )

    def _wait_s(self, load: EngineLoad, name: str, request: PlacedRequest, now: float, request_s: float) -> float:
        if load.resident == request.recipe_digest:
            return self._rules.wait_s(load, request.recipe_digest, request_s=request_s)
        ends = self._engines[name].ends.values()
        free_in = max(ends, default=now) - now
        empty = EngineLoad(is_up=True, num_slots=load.num_slots, waiting=load.waiting, swap_s=load.swap_s)
        return free_in + self._rules.wait_s(empty, request.recipe_digest, request_s=request_s)

    def _next_use(self, resident: str | None, now: float) -> float:
        times = self._asked_at.get(resident or "", [])
        index = bisect.bisect(times, now)
        return times[index] if index < len(times) else float("inf")


async def simulate(arguments: argparse.Namespace, policy: str, requests: Sequence[Request], outcome: Outcome) -> None:
    """All requests under one policy."""
    recipes = [
        Recipe(base="base", coefficients=((f"expert {number}", 1.0),), dtype="bfloat16")
        for number in range(arguments.recipes)
    ]
    served_tokens = ServedTokensByTenant()
    engines = {str(n): SimulatedEngine(arguments, outcome, served_tokens) for n in range(arguments.replicas)}
    ours = ResidentPlacement(slice_s=arguments.slice_s, spill_swaps=arguments.spill_swaps)
    placement: Placement = {
        "random": lambda: Random(arguments.seed),
        "hashing": Hashing,
        "two choices": lambda: TwoChoices(arguments.seed),
        "stays": lambda: Stays(ours),
        "ours": lambda: ours,
        "oracle": lambda: Oracle(engines, [recipe.digest for recipe in recipes], requests),
    }[policy]()
    dispatcher = Dispatcher(engines, placement)
    lives = [asyncio.create_task(engine.turns.run("base", engine.mix)) for engine in engines.values()]
    await asyncio.sleep(0)

    async def ask(request: Request) -> None:
        recipe, loop = recipes[request.recipe], asyncio.get_running_loop()
        came = loop.time()

        async def attempt(at: str, place: LinePlace) -> tuple[str, Lease]:
            return at, await engines[at].turns.acquire(
                recipe, tenant=request.tenant, num_tokens=TOKENS, timeout_s=QUEUE_TIMEOUT_S, place=place
            )

        try:
            at, lease = await dispatcher.send(PlacedRequest(recipe.digest, request.tenant), attempt)
            outcome.waits.append(loop.time() - came)
            await engines[at].answer(lease, request.seconds)
            dispatcher.observe(request.seconds)
        except CapacityError:
            outcome.refused += 1

    asked = []
    for request in requests:
        await asyncio.sleep(request.at - asyncio.get_running_loop().time())
        asked.append(asyncio.create_task(ask(request)))
    await asyncio.gather(*asked)
    outcome.seconds = asyncio.get_running_loop().time()
    dispatcher.close()
    for life in lives:
        life.cancel()
    await asyncio.gather(*lives, return_exceptions=True)


def measure(arguments: argparse.Namespace, policy: str, requests: Sequence[Request]) -> dict[str, Any]:
    """One policy at one rate."""
    outcome, started = Outcome(), time.perf_counter()
    run(simulate(arguments, policy, requests, outcome))
    p50, p95, p99 = np.percentile(outcome.waits, (50, 95, 99))
    return {
        "requests": len(requests),
        "refused": outcome.refused,
        "wait_p50_s": round(p50, 3),
        "wait_p95_s": round(p95, 3),
        "wait_p99_s": round(p99, 3),
        "swaps_per_s": round(outcome.swaps / outcome.seconds, 2),
        "swaps_from_memory": round(outcome.from_memory / max(1, outcome.swaps), 3),
        "seconds_of_this_run": round(time.perf_counter() - started, 1),
    }


POLICIES = ("random", "hashing", "two choices", "stays", "ours", "oracle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, action="append", help="requests a second; may be repeated; 15, 30, 50")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="only this one; may be repeated")
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--recipes", type=int, default=1000)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent: 0 asks all recipes alike")
    parser.add_argument("--tenants", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--answer-s", type=float, default=2.0, help="mean of the answers' lengths (exponential)")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--slice-s", type=float, default=2.0)
    parser.add_argument("--swap-s", type=float, default=0.42, help="from the experts' files (docs/benchmarks.md)")
    parser.add_argument("--kept-swap-s", type=float, default=0.33, help="of a recipe in the worker's memory")
    parser.add_argument("--kept", type=int, default=4, help="recipes that a worker keeps in memory")
    parser.add_argument("--spill-swaps", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for rate in arguments.rate or (15.0, 30.0, 50.0):
        requests = make_requests(arguments, rate)
        of_rate = {policy: measure(arguments, policy, requests) for policy in arguments.policy or POLICIES}
        results[f"{rate:g} requests/s"] = of_rate
    print(json.dumps({"machine": describe_machine(), "settings": vars(arguments), "rates": results}, indent=2))


if __name__ == "__main__":
    main()
