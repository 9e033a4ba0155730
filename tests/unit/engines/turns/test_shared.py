"""Turns on an engine whose recipes share a batch, under a clock of their own."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocktail_serve.engines.fairness import ServedTokensByTenant
from cocktail_serve.engines.scheduler_snapshot import SchedulerSnapshot
from cocktail_serve.engines.turns.shared import SHARE_GAP_S, SharedTurns
from cocktail_serve.errors import (
    CocktailError,
    EngineError,
    InvalidRequestError,
    ModelNotReadyError,
    QueueTimeoutError,
)
from cocktail_serve.recipe import Recipe
from tests.jumping_clock import pause, run


def recipe(name: str) -> Recipe:
    return Recipe(base="base", coefficients=((name, 1.0),), dtype="float32", mode="unmerged")


A, B, C = recipe("a"), recipe("b"), recipe("c")


async def never_mixed(recipe: Recipe) -> None:
    raise AssertionError("recipes that share a batch are mixed by nobody")


class FakeEngine:
    """An engine that answers by any recipe, as long as it lives, and counts who uses it."""

    def __init__(self, *, max_in_flight: int = 8, **options: Any) -> None:
        self.turns = SharedTurns(max_in_flight=max_in_flight, **options)
        self.most_requests = self.most_background = 0
        self._users: Counter[bool] = Counter()
        self._task: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> FakeEngine:
        self.up()
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.down()

    def up(self) -> None:
        self._task = asyncio.create_task(self.turns.run("base", never_mixed))

    async def down(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def answer(self, wanted: Recipe, seconds: float, *, tokens: int = 0, **options: Any) -> float:
        """Uses the engine like a stream; the time at which it was admitted."""
        loop = asyncio.get_running_loop()
        with await self.turns.acquire(wanted, **options) as lease:
            lease.settle(tokens)
            admitted = loop.time()
            assert self._task
            assert not self._task.done(), "admitted to an engine that is down"
            is_background = lease.tenant is None
            self._users[is_background] += 1
            self.most_background = max(self.most_background, self._users[True])
            self.most_requests = max(self.most_requests, self._users[False])
            try:
                with lease.interruptible():
                    await asyncio.sleep(seconds)
            finally:
                self._users[is_background] -= 1
        return admitted

    def ask(self, wanted: Recipe, seconds: float = 1.0, **options: Any) -> asyncio.Task[float]:
        return asyncio.create_task(self.answer(wanted, seconds, **options))


def test_recipes_are_admitted_at_once_and_side_by_side() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            assert await asyncio.gather(*(engine.answer(wanted, 5) for wanted in (A, B, C, A))) == [0, 0, 0, 0]
            assert asyncio.get_running_loop().time() == 5
            assert (engine.turns.stats.wait.count, engine.turns.stats.wait.total) == (4, 0)

    run(main())


def test_who_finds_no_slot_waits_for_one_in_order_whatever_its_recipe() -> None:
    async def main() -> None:
        async with FakeEngine(max_in_flight=1) as engine:
            tasks = []
            for wanted in (A, B, A, C, B):
                tasks.append(engine.ask(wanted, 1, tenant="t"))
                await pause(0.1)
            assert engine.turns.num_waiting == 4
            assert await asyncio.gather(*tasks) == [0, 1, 2, 3, 4]
            assert engine.turns.stats.wait.total == pytest.approx(0.9 + 1.8 + 2.7 + 3.6)

    run(main())


def test_whoever_waits_too_long_is_told_what_to_raise() -> None:
    async def main() -> None:
        async with FakeEngine(max_in_flight=1) as engine:
            hold = engine.ask(A, 20)
            await pause(1)
            with pytest.raises(QueueTimeoutError) as raised:
                await engine.answer(B, 1, timeout_s=10)
            assert raised.value.message == (
                "no slot of the engine was free within queue_timeout_s=10 s: too many requests share it now; retry "
                "later, or raise engine.max_concurrency"
            )
            assert raised.value.retry_after_s == 2.0
            assert asyncio.get_running_loop().time() == 11
            assert (engine.turns.num_waiting, engine.turns.stats.num_queue_timeouts) == (0, 1)
            with pytest.raises(QueueTimeoutError):
                await engine.answer(B, 1, timeout_s=1)
            assert engine.turns.stats.num_queue_timeouts == 2
            assert await hold == 0

    run(main())


def test_while_the_engine_is_down_requests_wait_for_it() -> None:
    async def main() -> None:
        engine = FakeEngine()
        early, patient, scoring = (
            engine.ask(A, 1, timeout_s=5),
            engine.ask(B, 1, timeout_s=60),
            engine.ask(C, 1, background=True),
        )
        with pytest.raises(ModelNotReadyError) as raised:
            await early
        assert raised.value.message == "the engine is starting or restarting and was not ready within 5 s"
        await pause(5)
        async with engine:
            assert await asyncio.gather(patient, scoring) == [10, 10]

    run(main())


def test_losing_the_engine_fails_who_holds_it_and_nobody_else() -> None:
    async def main() -> None:
        engine = FakeEngine(max_in_flight=1)
        async with engine:
            holding, scoring = engine.ask(A, 100, tenant="t"), engine.ask(B, 100, background=True)
            await pause(0.1)
            waiting = engine.ask(C, 1, tenant="t")
            await pause(0.9)
        for task in (holding, scoring):
            with pytest.raises(EngineError) as raised:
                await task
            assert raised.value.message == "the engine failed while it held the request; it is being restarted"
        assert engine.turns.num_in_flight == 0
        async with engine:
            assert await waiting == 1
            assert await engine.answer(B, 1, background=True) == 2

    run(main())


def test_a_request_is_charged_when_it_is_admitted_and_what_it_took_at_its_end() -> None:
    async def main() -> None:
        served = ServedTokensByTenant()
        async with FakeEngine(served_tokens=served) as engine:
            now = asyncio.get_running_loop().time()
            scoring = await engine.turns.acquire(A, background=True)
            lease = await engine.turns.acquire(A, tenant="t", num_tokens=100)
            assert served.of("t", now).recent(now) == 100
            lease.settle(40)
            assert served.of("t", now).recent(now) == 40
            lease.settle(40)
            assert served.of("t", now).recent(now) == 40
            scoring.settle(1000)
            assert served.of("", now).recent(now) == 0
            lease.release()
            scoring.release()

    run(main())


def test_one_life_at_a_time() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            with pytest.raises(RuntimeError, match=r"^these turns are given already$"):
                await engine.turns.run("base", never_mixed)
            assert await engine.answer(A, 1) == 0, "the life that there was goes on"

    run(main())


def test_sending_everybody_away() -> None:
    async def main() -> None:
        engine = FakeEngine()
        waiting = [engine.ask(A), engine.ask(B, background=True)]
        await pause(1)
        engine.turns.fail_waiting(lambda: ModelNotReadyError("it keeps failing"))
        for task in waiting:
            with pytest.raises(ModelNotReadyError, match="keeps failing"):
                await task

    run(main())


@pytest.mark.parametrize("background", [False, True])
def test_a_waiter_that_is_cancelled_as_it_is_admitted_gives_its_slot_back(background: bool) -> None:
    async def main() -> None:
        async with FakeEngine(max_in_flight=1, max_background=1) as engine:
            hold = await engine.turns.acquire(A, tenant="t", background=background)
            cancelled = engine.ask(B, tenant="t", background=background)
            await pause(1)
            hold.release()  # admits it
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            assert engine.turns.num_in_flight == 0
            assert await engine.answer(C, 1, tenant="t", background=background) == 1

    run(main())


def test_a_waiter_that_leaves_lets_in_the_work_that_gave_way_to_it() -> None:
    async def main() -> None:
        async with FakeEngine(max_in_flight=1) as engine:
            hold, scoring = engine.ask(A, 100), engine.ask(A, 100, background=True)
            await pause(1)
            waiting = engine.ask(B)
            await pause(1)
            more = engine.ask(B, 1, background=True)
            await pause(1)
            assert not more.done()
            assert engine.turns.num_in_flight == 2
            waiting.cancel()
            await pause(0.5)
            assert engine.turns.num_in_flight == 2, "half of one slot is one background lease"
            scoring.cancel()
            assert await more == 3.5
            hold.cancel()

    run(main())


class TestBackground:
    def test_it_is_bounded_and_takes_no_slot(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=4, max_background=3) as engine:
                jobs = [engine.ask(recipe(str(number)), 1, background=True) for number in range(7)]
                requests = [engine.ask(A, 1, tenant="t") for _ in range(4)]
                assert await asyncio.gather(*jobs) == [0, 0, 0, 1, 1, 1, 2]
                assert await asyncio.gather(*requests) == [0] * 4
                assert (engine.most_background, engine.most_requests) == (3, 4)

        run(main())

    def test_it_gives_way_to_those_in_line_but_never_starves(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=4, max_background=4) as engine:
                flood = [asyncio.create_task(_flood(engine, A, tenant="flood", until=60)) for _ in range(20)]
                await pause(0.05)
                came = asyncio.get_running_loop().time()
                admitted = await asyncio.gather(*(engine.answer(B, 2, background=True) for _ in range(5)))
                assert [round(at - came, 6) for at in admitted] == [0, 2, 4, 6, 8], "one at a time"
                await asyncio.gather(*flood)

        run(main())

    def test_all_but_one_are_told_to_give_way(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=1, max_background=2) as engine:
                one, other = [await engine.turns.acquire(wanted, background=True) for wanted in (A, B)]
                hold = engine.ask(C, 5)
                await pause(1)
                assert not one.should_yield
                waiting = engine.ask(C, 1)
                await pause(1)
                assert one.should_yield
                assert other.should_yield
                one.release()
                assert not other.should_yield, "the last one may go on"
                other.release()
                await asyncio.gather(hold, waiting)

        run(main())


class TestTenants:
    """Slots between tenants. The flood asks as fast as it is answered, with many clients and recipes."""

    def test_a_flood_leaves_a_tenant_its_latency(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=16) as engine:
                flood = [
                    asyncio.create_task(_flood(engine, recipe(str(n % 7)), tenant="flood", until=60)) for n in range(99)
                ]
                await pause(0.1)
                assert engine.turns.num_in_flight == 16, "alone, it may have them all"
                waits = []
                while asyncio.get_running_loop().time() < 50:
                    came = asyncio.get_running_loop().time()
                    waits.append(await engine.answer(C, 0.3, tenant="lone", tokens=30) - came)
                    await pause(0.7)
                # the first waits for a slot, later ones find the tenant's own share
                assert waits[0] <= 0.3
                assert waits[1:] == [0] * len(waits[1:])
                await asyncio.gather(*flood)

        run(main())

    def test_a_flood_has_few_slots_beside_a_tenant_that_asks_one_thing_after_the_other(self) -> None:
        """And all of them again once that has gone."""

        async def main() -> None:
            most_beside, most_after = [], []
            async with FakeEngine(max_in_flight=16, max_beside=5) as engine:
                flood = [asyncio.create_task(_flood(engine, A, tenant="flood", until=60)) for _ in range(40)]
                await pause(1)
                assert engine.turns.num_in_flight == 16, "alone, it has them all"
                while asyncio.get_running_loop().time() < 30:
                    await engine.answer(C, 0.3, tenant="lone", tokens=30)
                    most_beside.append(engine.turns.num_in_flight)
                    await pause(0.01)
                while asyncio.get_running_loop().time() < 50:
                    most_after.append(engine.turns.num_in_flight)
                    await pause(0.3)
                await asyncio.gather(*flood)
            assert set(most_beside[20:]) == {5}
            assert set(most_after[20:]) == {16}

        run(main())

    def test_two_floods_leave_no_slot_unused(self) -> None:
        async def main() -> None:
            served: Counter[str] = Counter()
            async with FakeEngine(max_in_flight=16, max_beside=5) as engine:
                floods = [
                    asyncio.create_task(_flood(engine, A, tenant=name, until=60, served=served))
                    for name in "ab"
                    for _ in range(20)
                ]
                await pause(20.1)
                assert engine.turns.num_in_flight == 16
                await asyncio.gather(*floods)
            assert served["a"] / served["b"] == pytest.approx(1.0, abs=0.1)

        run(main())

    def test_slots_are_shared_out_by_tenants_and_not_by_recipes_or_requests(self) -> None:
        async def main() -> None:
            served: Counter[str] = Counter()
            async with FakeEngine(max_in_flight=8) as engine:
                many = [_flood(engine, recipe(str(n)), tenant="many", until=120, served=served) for n in range(40)]
                one = [_flood(engine, C, tenant="one", until=120, served=served) for _ in range(5)]
                await asyncio.gather(*many, *one)
            assert served["one"] / served["many"] == pytest.approx(1.0, abs=0.1)

        run(main())

    def test_many_who_ask_now_and_then_keep_no_shares_that_nobody_uses(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=8) as engine:
                await asyncio.gather(*(engine.answer(A, 0.1, tenant=f"t{n}") for n in range(8)))
                now = asyncio.get_running_loop().time()
                # each of eight has one slot, and seven of them are idle
                tasks = [engine.ask(B, 1, tenant="t0") for _ in range(5)]
                assert await asyncio.gather(*tasks) == [now, now, now, now, now + 1]

        run(main())

    def test_a_free_slot_goes_to_the_tenant_served_the_fewest_tokens(self) -> None:
        async def main() -> None:
            shares = ServedTokensByTenant()
            async with FakeEngine(max_in_flight=1, served_tokens=shares) as engine:
                await engine.answer(A, 1, tenant="long", tokens=1000)
                await engine.answer(A, 1, tenant="short", tokens=10)
                hold = engine.ask(A, 1, tenant="hold")
                await pause(0.1)
                order = [engine.ask(A, 1, tenant=name) for name in ("long", "short", "new")]
                assert await asyncio.gather(*order) == [5, 4, 3]
                await hold
                assert shares.of("long", 6.0).recent(6.0) > shares.of("short", 6.0).recent(6.0)

        run(main())

    def test_a_share_that_is_kept_no_longer_is_given_to_those_in_line(self) -> None:
        """Nobody comes or goes at that moment."""

        async def main() -> None:
            async with FakeEngine(max_in_flight=3) as engine:
                tasks = [engine.ask(A, 100, tenant="a"), engine.ask(B, 0.1, tenant="b")]
                await pause(0.05)
                waiting = [engine.ask(A, 1, tenant="a") for _ in range(2)]
                await pause(1)
                assert not waiting[0].done()
                admitted = await asyncio.gather(*waiting)
                assert 0.1 + SHARE_GAP_S <= max(admitted) <= 0.1 + 2 * SHARE_GAP_S
                for task in tasks:
                    task.cancel()

        run(main())

    def test_nobody_overtakes_who_waits_for_a_share_that_has_become_free(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=2) as engine:
                tasks = [engine.ask(A, 10, tenant="a"), engine.ask(B, 0.1, tenant="b")]
                await pause(0.05)
                waiting = engine.ask(A, 10, tenant="a")
                await pause(0.1 + SHARE_GAP_S - 0.1)
                late = engine.ask(C, 10, tenant="a")
                assert await waiting < await late
                await asyncio.gather(*tasks)

        run(main())


class TestOperator:
    def test_a_drained_engine_finishes_what_it_has_and_admits_nobody(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=1) as engine:
                running, waiting = engine.ask(A, 10), engine.ask(B)
                await pause(0.1)
                engine.turns.drain(True)
                for refused in (waiting, engine.ask(A)):
                    with pytest.raises(ModelNotReadyError, match="drains this engine"):
                        await refused
                scoring = engine.ask(A, 1, background=True)
                assert await running == 0
                await pause(1)
                assert not scoring.done()
                assert engine.turns.snapshot().queues[0].reason == "drained"
                assert engine.turns.snapshot().is_drained
                engine.turns.drain(False)
                assert await scoring == 11

        run(main())

    def test_there_is_no_turn_to_pin(self) -> None:
        turns = SharedTurns(max_in_flight=1)
        with pytest.raises(InvalidRequestError) as raised:
            turns.pin(A)
        assert raised.value.message == "the engine's recipes share a batch: there are no turns to pin one in"
        assert raised.value.param == "pin"
        turns.pin(None)

    def test_it_is_told_who_is_in_and_why_others_wait(self) -> None:
        async def main() -> None:
            engine = FakeEngine(max_in_flight=1)
            waiting = [engine.ask(A, 1, tenant="t"), engine.ask(B, 1, tenant="t")]
            await pause(1)
            assert [queue.reason for queue in engine.turns.snapshot().queues] == ["engine_down"] * 2
            async with engine:
                await pause(0.5)
                found = engine.turns.snapshot()
                assert (found.phase, found.resident, found.turn_s, found.num_in_flight) == (None, None, None, 1)
                assert [(queue.recipe_digest, queue.reason) for queue in found.queues] == [(B.digest, "no_slot")]
                await asyncio.gather(*waiting)
                assert engine.turns.snapshot() == SchedulerSnapshot(phase=None, num_in_flight=0)

        run(main())


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_whatever_happens_nobody_is_lost_and_no_bound_is_broken(seed: int) -> None:
    chance = random.Random(seed)

    async def main() -> None:
        engine = FakeEngine(max_in_flight=3, max_background=2)

        async def live() -> None:
            while True:
                engine.up()
                await pause(chance.choice([1.0, 10.0, 100.0]))
                await engine.down()
                await pause(chance.choice([0.0, 2.0]))

        async def client(number: int) -> None:
            await pause(chance.uniform(0, 20))
            for _ in range(chance.randrange(1, 5)):
                options: dict[str, Any] = {"background": chance.random() < 0.3, "tenant": f"t{number % 4}"}
                options["timeout_s"] = chance.choice([None, 3.0])
                try:
                    async with asyncio.timeout(chance.choice([None, None, 2.0])):
                        await engine.answer(recipe(str(number % 5)), chance.uniform(0, 3), **options)
                except (CocktailError, TimeoutError):
                    pass
                if chance.random() < 0.1:
                    engine.turns.drain(True)
                    await pause(1)
                    engine.turns.drain(False)

        owner = asyncio.create_task(live())
        await asyncio.gather(*(client(number) for number in range(30)))
        assert engine.most_requests <= 3
        assert engine.most_background <= 2
        assert engine.turns.num_in_flight == engine.turns.num_waiting == engine.turns._slots.num_taken == 0
        assert not engine.turns._queues.background
        assert engine.turns._in_flight.num_background == 0
        owner.cancel()
        await asyncio.gather(owner, return_exceptions=True)

    run(main())


async def _flood(
    engine: FakeEngine, wanted: Recipe, *, tenant: str, until: float, served: Counter[str] | None = None
) -> None:
    while asyncio.get_running_loop().time() < until:
        await engine.answer(wanted, 0.3, tenant=tenant, num_tokens=30, tokens=30)
        if served is not None:
            served[tenant] += 1
