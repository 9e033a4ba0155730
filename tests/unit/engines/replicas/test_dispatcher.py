"""Requests on their way to several engines with the turns that serve, under a clock of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cocktail_serve.engines.fairness import ServedTokensByTenant
from cocktail_serve.engines.line_place import LinePlace
from cocktail_serve.engines.load import EngineLoad
from cocktail_serve.engines.replicas.dispatcher import LOOK_S, Dispatcher
from cocktail_serve.engines.replicas.placement import (
    PlacedRequest,
    Placement,
    ResidentPlacement,
    SharedPlacement,
    homes,
)
from cocktail_serve.engines.turns.base import Turns
from cocktail_serve.engines.turns.exclusive import ExclusiveTurns
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.turns.shared import SharedTurns
from cocktail_serve.errors import EngineError, ModelNotReadyError, QueueTimeoutError
from cocktail_serve.recipe import Recipe
from tests.jumping_clock import pause, run

SLICE_S, SWAP_S, TIMEOUT_S = 2.0, 0.5, 60.0


def recipe(name: str) -> Recipe:
    return Recipe(base="base", coefficients=((name, 1.0),), dtype="float32")


class FakeReplica:
    """Turns over nothing: a mix takes half a second."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.mixed: list[Recipe] = []
        self._life: asyncio.Task[Any] | None = None

    def load(self) -> EngineLoad:
        return self.turns.load()

    def up(self) -> None:
        self._life = asyncio.create_task(self.turns.run("base", self._mix))

    async def down(self) -> None:
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)

    async def _mix(self, wanted: Recipe) -> float:
        await asyncio.sleep(SWAP_S)
        self.mixed.append(wanted)
        return SWAP_S


class Replicas:
    """Engines `0`, `1`, ... that are up, and the dispatcher before them."""

    def __init__(self, num: int, placement: Placement | None = None, *, slots: int = 8) -> None:
        served = ServedTokensByTenant()
        is_shared = isinstance(placement, SharedPlacement)
        self.engines = {
            str(number): FakeReplica(
                SharedTurns(max_in_flight=slots, served_tokens=served)
                if is_shared
                else ExclusiveTurns(
                    slice_s=SLICE_S,
                    drain_s=30.0,
                    background_delay_s=2 * SLICE_S,
                    max_in_flight=slots,
                    served_tokens=served,
                )
            )
            for number in range(num)
        }
        self.dispatcher = Dispatcher(self.engines, placement or ResidentPlacement(slice_s=SLICE_S))
        self.tried: list[str] = []

    async def admitted(self, wanted: Recipe, *, tenant: str = "t", background: bool = False) -> tuple[str, Lease]:
        """The engine that lets a request in, and its lease."""

        async def attempt(at: str, place: LinePlace) -> tuple[str, Lease]:
            self.tried.append(at)
            lease = await self.engines[at].turns.acquire(
                wanted,
                tenant=tenant,
                background=background,
                timeout_s=None if background else TIMEOUT_S,
                place=place,
            )
            return at, lease

        request = PlacedRequest(wanted.digest, tenant, is_background=background)
        return await self.dispatcher.send(request, attempt)

    async def answer(self, wanted: Recipe, seconds: float, **options: Any) -> str:
        """Uses an engine like a stream; its name."""
        at, lease = await self.admitted(wanted, **options)
        with lease, lease.interruptible():
            await asyncio.sleep(seconds)
        self.dispatcher.observe(seconds)
        return at

    def at_home(self, name: str) -> Recipe:
        """A recipe whose home is this engine."""
        candidates = (recipe(f"of {name}: {number}") for number in range(1000))
        return next(each for each in candidates if homes(each.digest, list(self.engines))[0] == name)


@asynccontextmanager
async def up(replicas: Replicas) -> AsyncIterator[Replicas]:
    for engine in replicas.engines.values():
        engine.up()
    await asyncio.sleep(0)
    try:
        yield replicas
    finally:
        replicas.dispatcher.close()
        for engine in replicas.engines.values():
            await engine.down()


def test_a_recipe_goes_home_and_stays_there() -> None:
    async def scene() -> None:
        async with up(Replicas(3)) as replicas:
            for name in ("2", "0", "1"):
                wanted = replicas.at_home(name)
                assert [await replicas.answer(wanted, 0.1) for _ in range(3)] == [name] * 3
            assert all(len(engine.mixed) == 1 for engine in replicas.engines.values())

    run(scene())


def test_one_that_waits_behind_a_long_answer_goes_to_an_engine_that_has_become_idle() -> None:
    """At first both are busy, so it waits at home; the stream there goes on and on, while the other engine idles."""

    async def scene() -> None:
        async with up(Replicas(2)) as replicas:
            loop = asyncio.get_running_loop()
            endless = asyncio.create_task(replicas.answer(recipe("base of 0"), 25.0))
            await pause(1)
            held = await endless_at(replicas)
            other = next(name for name in replicas.engines if name != held)
            short = asyncio.create_task(replicas.answer(replicas.at_home(other), 3.0))
            await pause(0.6)
            began = loop.time()
            third = next(r for r in map(recipe, "abcdefgh") if homes(r.digest, list(replicas.engines))[0] == held)
            assert await replicas.answer(third, 0.5) == other
            assert short.done()
            assert loop.time() - began < 10, "it waited for the end of the stream"
            await endless

    async def endless_at(replicas: Replicas) -> str:
        (name,) = [name for name, engine in replicas.engines.items() if engine.turns.num_in_flight]
        return name

    run(scene())


def test_those_in_line_at_an_engine_that_is_lost_are_served_by_the_others() -> None:
    async def scene() -> None:
        async with up(Replicas(2)) as replicas:
            held, waiting = replicas.at_home("0"), recipe("waiting")
            streams = [asyncio.create_task(replicas.answer(held, 20.0)) for _ in range(2)]
            await pause(1)
            replicas.engines["1"].turns.drain(True)
            in_line = [asyncio.create_task(replicas.answer(waiting, 0.1)) for _ in range(5)]
            await pause(0.2)
            assert replicas.engines["0"].turns.num_waiting == 5
            replicas.engines["1"].turns.drain(False)
            await replicas.engines["0"].down()
            assert [await each for each in in_line] == ["1"] * 5
            for stream in streams:  # what it held is lost with it, and is not asked again
                with pytest.raises(EngineError):
                    await stream

    run(scene())


def test_where_none_is_up_requests_wait_for_the_first_that_comes() -> None:
    async def scene() -> None:
        replicas = Replicas(3)
        wanted = replicas.at_home("0")
        asked = asyncio.create_task(replicas.answer(wanted, 0.1))
        await pause(5)
        assert not asked.done()
        replicas.engines["2"].up()
        assert await asked == "2"
        replicas.dispatcher.close()
        await replicas.engines["2"].down()

    run(scene())


def test_the_time_in_lines_that_were_left_counts() -> None:
    async def scene() -> None:
        replicas = Replicas(2)
        loop = asyncio.get_running_loop()
        asked = asyncio.create_task(replicas.answer(replicas.at_home("0"), 0.1))
        await pause(50)
        replicas.engines["1"].up()
        replicas.engines["1"].turns.pin(recipe("another"))
        await pause(1)
        replicas.dispatcher.recall("0")
        with pytest.raises(ModelNotReadyError):
            await asked
        assert loop.time() == pytest.approx(TIMEOUT_S, abs=LOOK_S)
        await replicas.engines["1"].down()
        replicas.dispatcher.close()

    run(scene())


def test_an_engine_that_is_drained_gives_its_line_away_and_gets_nobody() -> None:
    async def scene() -> None:
        async with up(Replicas(2)) as replicas:
            first = replicas.at_home("0")
            stream = asyncio.create_task(replicas.answer(first, 10.0))
            await pause(1)
            replicas.engines["1"].turns.drain(True)
            in_line = asyncio.create_task(replicas.answer(recipe("x"), 0.1))
            await pause(0.1)
            replicas.engines["1"].turns.drain(False)
            replicas.dispatcher.recall("0")
            replicas.engines["0"].turns.drain(True)
            assert await in_line == "1"
            assert [await replicas.answer(first, 0.1) for _ in range(3)] == ["1"] * 3
            assert await stream == "0"

    run(scene())


def test_a_hot_recipe_gets_a_second_engine() -> None:
    async def scene() -> None:
        async with up(Replicas(3, slots=4)) as replicas:
            hot = replicas.at_home("1")
            answers = [asyncio.create_task(replicas.answer(hot, 5.0)) for _ in range(12)]
            used = {await each for each in answers}
            assert len(used) > 1
            assert "1" in used
            assert sum(len(engine.mixed) for engine in replicas.engines.values()) == len(used), "once at each"

    run(scene())


def test_scoring_of_several_experts_at_once_is_spread() -> None:
    async def scene() -> None:
        async with up(Replicas(3)) as replicas:
            experts = [recipe(f"expert {number}") for number in range(6)]
            loop = asyncio.get_running_loop()
            visits = [asyncio.create_task(replicas.answer(each, 1.0, background=True)) for each in experts]
            used = [await each for each in visits]
            assert sorted(used) == ["0", "0", "1", "1", "2", "2"]
            assert loop.time() < 6

    run(scene())


def test_scoring_in_line_goes_to_an_engine_that_idles() -> None:
    async def scene() -> None:
        async with up(Replicas(2)) as replicas:
            replicas.engines["1"].turns.drain(True)
            stream = asyncio.create_task(replicas.answer(replicas.at_home("0"), 20.0))
            await pause(1)
            visit = asyncio.create_task(replicas.answer(recipe("expert"), 1.0, background=True))
            await pause(1)
            replicas.engines["1"].turns.drain(False)
            assert await visit == "1"
            assert not stream.done()
            await stream

    run(scene())


def test_rows_are_shared_out_and_stay_near_home() -> None:
    async def scene() -> None:
        async with up(Replicas(2, SharedPlacement(), slots=16)) as replicas:
            one = recipe("one")
            assert len({await replicas.answer(one, 0.1, tenant="acme") for _ in range(6)}) == 1
            answers = [asyncio.create_task(replicas.answer(one, 1.0, tenant="acme")) for _ in range(20)]
            used = [await each for each in answers]
            assert abs(used.count("0") - used.count("1")) <= 2

    run(scene())


def test_a_tenant_that_floods_all_replicas_is_behind_on_all() -> None:
    """What a tenant was served counts for all of them: another's first request goes before the flood's, wherever."""

    async def scene() -> None:
        async with up(Replicas(2, SharedPlacement(), slots=2)) as replicas:
            flood = [asyncio.create_task(replicas.answer(recipe("a"), 1.0, tenant="flood")) for _ in range(20)]
            await pause(0.1)
            for engine in replicas.engines.values():
                engine.turns.charge("flood", 1000)  # type: ignore[attr-defined]  # as a lease does
            loop = asyncio.get_running_loop()
            began = loop.time()
            await replicas.answer(recipe("b"), 0.1, tenant="quiet")
            assert loop.time() - began < 1.2, "it waited behind the flood"
            for each in flood:
                each.cancel()
            await asyncio.gather(*flood, return_exceptions=True)

    run(scene())


def test_a_request_that_is_cancelled_leaves_its_line() -> None:
    async def scene() -> None:
        replicas = Replicas(2)
        asked = asyncio.create_task(replicas.answer(replicas.at_home("0"), 0.1))
        await pause(1)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert asked.cancelled()
        assert [engine.turns.num_waiting for engine in replicas.engines.values()] == [0, 0]
        replicas.dispatcher.close()

    run(scene())


def test_who_was_let_in_is_not_called_away() -> None:
    async def scene() -> None:
        async with up(Replicas(1)) as replicas:
            at, lease = await replicas.admitted(replicas.at_home("0"))
            replicas.dispatcher.recall(at)
            await pause(1)
            lease.raise_if_ended()
            lease.release()
            assert replicas.tried == ["0"]

    run(scene())


def test_a_line_that_nobody_shortens_ends_in_time() -> None:
    async def scene() -> None:
        async with up(Replicas(2, slots=1)) as replicas:
            hot = replicas.at_home("0")
            streams = [asyncio.create_task(replicas.answer(hot, 100.0)) for _ in range(2)]
            await pause(2)
            with pytest.raises(QueueTimeoutError):
                await replicas.answer(hot, 1.0)
            await asyncio.gather(*streams)

    run(scene())
