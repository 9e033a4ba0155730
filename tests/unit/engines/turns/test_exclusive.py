"""Turns on an engine that holds one recipe at a time, under a clock of their own."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocktail_serve.engines.fairness import HALF_LIFE_S, MAX_KEPT, ServedTokens, ServedTokensByTenant
from cocktail_serve.engines.turns.exclusive import ExclusiveTurns
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.turns.mixing import MAX_BUSY_MIXES
from cocktail_serve.engines.turns.slots import Presence, Slots
from cocktail_serve.errors import (
    DrainedError,
    EngineError,
    InvalidMixError,
    ModelNotReadyError,
    QueueTimeoutError,
)
from cocktail_serve.recipe import Recipe
from tests.jumping_clock import pause, run

SLICE_S, DRAIN_S, DELAY_S, MIX_S = 2.0, 30.0, 4.0, 0.5


def recipe(name: str) -> Recipe:
    return Recipe(base="base", coefficients=((name, 1.0),), dtype="float32")


BASE, A, B, C = recipe("base"), recipe("a"), recipe("b"), recipe("c")


class FakeEngine:
    """Parameters that take time to mix, and a check on everybody who uses them."""

    def __init__(self, **options: Any) -> None:
        defaults = {"slice_s": SLICE_S, "drain_s": DRAIN_S, "background_delay_s": DELAY_S}
        self.residency = ExclusiveTurns(**{**defaults, **options})
        self.resident: Recipe | None = BASE
        self.mixed: list[Recipe] = []
        self.users: Counter[str] = Counter()
        self.outcomes: list[Exception | bool] = []
        self.mix_s = MIX_S
        self._task: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> FakeEngine:
        self.up()
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.down()

    def up(self) -> None:
        self.resident = BASE
        self._task = asyncio.create_task(self.residency.run(BASE.digest, self._mix))

    async def down(self) -> BaseException | None:
        assert self._task is not None
        self._task.cancel()
        (result,) = await asyncio.gather(self._task, return_exceptions=True)
        return result if isinstance(result, BaseException) else None

    async def ended(self) -> BaseException | None:
        assert self._task is not None
        await asyncio.wait({self._task})
        return self._task.exception()

    async def answer(self, wanted: Recipe, seconds: float, *, tokens: int = 0, **options: Any) -> float:
        """Uses the engine like a stream; the time at which it was admitted."""
        loop = asyncio.get_running_loop()
        with await self.residency.acquire(wanted, **options) as lease:
            lease.settle(tokens)
            admitted = loop.time()
            assert self.resident == wanted, "admitted under other parameters"
            self.users[wanted.digest] += 1
            ended = loop.create_future()

            def leave() -> None:
                if not ended.done():
                    ended.set_result(None)
                    self.users[wanted.digest] -= 1

            lease.on_end(leave)
            try:
                await asyncio.wait({ended}, timeout=seconds)
                if lease.error is not None:
                    raise lease.error
                assert self.resident == wanted, "parameters changed under a lease"
            finally:
                leave()
        return admitted

    def ask(self, wanted: Recipe, seconds: float = 1.0, **options: Any) -> asyncio.Task[float]:
        return asyncio.create_task(self.answer(wanted, seconds, **options))

    async def _mix(self, wanted: Recipe) -> float | None:
        assert not +self.users, f"mixed while in use: {self.users}"
        before, self.resident = self.resident, None
        await asyncio.sleep(self.mix_s)
        outcome = self.outcomes.pop(0) if self.outcomes else True
        if outcome is True:
            self.resident = wanted
            self.mixed.append(wanted)
        elif outcome is False or isinstance(outcome, InvalidMixError):
            self.resident = before
        if isinstance(outcome, Exception):
            raise outcome
        return self.mix_s if outcome else None


def test_the_resident_recipe_is_served_at_once_and_side_by_side() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            assert await asyncio.gather(*(engine.answer(BASE, 5) for _ in range(3))) == [0, 0, 0]
            assert asyncio.get_running_loop().time() == 5
            assert engine.mixed == []
            assert engine.residency.stats.wait.count == 3

    run(main())


def test_an_idle_engine_swaps_at_once() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            assert await engine.answer(A, 1) == MIX_S
            assert engine.residency.resident == A.digest
            assert engine.residency.stats.swap.total == MIX_S

    run(main())


def test_waits_and_swaps_are_counted_in_seconds() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            await pause(5)
            assert await engine.answer(A, 1, timeout_s=1) == 5 + MIX_S
            await engine.answer(A, 1)
            stats, occupancy = engine.residency.stats, engine.residency.snapshot()
            assert (stats.wait.count, stats.wait.total) == (2, MIX_S)
            assert (stats.swap.count, stats.swap.total) == (1, MIX_S)
            assert (occupancy.phase, occupancy.turn_s) == ("open", 2)
            await pause(5)
            assert stats.num_queue_timeouts == 0, "the first was answered before its time was over"

    run(main())


def test_all_who_wait_for_a_recipe_are_admitted_together() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            admitted = await asyncio.gather(*(engine.answer(A, 1) for _ in range(5)))
            assert admitted == [MIX_S] * 5
            assert engine.mixed == [A]

    run(main())


def test_a_turn_lasts_a_slice_from_when_others_began_to_wait() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            long = engine.ask(BASE, 10)
            await pause(5)
            other = engine.ask(A, 1)
            await pause(SLICE_S - 0.1)
            assert await engine.answer(BASE, 1) == 5 + SLICE_S - 0.1  # still its turn
            late = engine.ask(BASE, 1)
            assert await other == 10 + MIX_S  # once the stream is finished
            assert await long == 0
            # A's turn is over when it is idle
            assert await late == 10 + MIX_S + 1 + MIX_S

    run(main())


def test_a_turn_under_contention_lasts_a_slice_from_its_start() -> None:
    async def main() -> None:
        async with FakeEngine(drain_s=0) as engine:
            streams = [engine.ask(BASE, 100), engine.ask(A, 100), engine.ask(B, 100)]
            await asyncio.wait(streams)
            assert [type(stream.exception()) for stream in streams] == [DrainedError, DrainedError, type(None)]
            assert engine.residency.stats.num_drained == 2
            assert await streams[2] == (SLICE_S + MIX_S) * 2

    run(main())


def test_next_is_the_recipe_whose_oldest_request_waited_longest() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            hold = engine.ask(BASE, 1)
            await pause(0.1)
            waiting = []
            for wanted in (B, A, C, A, A, B):
                waiting.append(engine.ask(wanted, 0.1))
                await pause(0.01)
            await asyncio.gather(hold, *waiting)
            assert engine.mixed == [B, A, C]

    run(main())


def test_a_stream_is_ended_after_the_drain_and_not_before() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            long, finishing = engine.ask(BASE, 1000), engine.ask(BASE, SLICE_S + DRAIN_S - 0.1)
            other = engine.ask(A, 1)
            assert await other == SLICE_S + DRAIN_S + MIX_S
            assert await finishing == 0
            with pytest.raises(DrainedError) as ended:
                await long
            assert ended.value.message == (
                "the request ran for more than drain_s=30 s after its model's turn had ended, and requests for other "
                "models wait; ask for fewer tokens, or raise engine.drain_s"
            )
            assert ended.value.retry_after_s == SLICE_S
            assert engine.residency.stats.num_drained == 1

    run(main())


def test_a_turn_opens_again_when_all_others_have_left() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            long, other = engine.ask(BASE, 20), engine.ask(A, 1)
            await pause(SLICE_S + 1)
            late = engine.ask(BASE, 1)
            await pause(1)
            assert engine.residency.is_draining
            other.cancel()
            assert await late == SLICE_S + 2
            assert await long == 0
            assert engine.mixed == []

    run(main())


def test_whoever_waits_too_long_is_told_before_admission() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            long = engine.ask(BASE, 20)
            with pytest.raises(QueueTimeoutError) as told:
                await engine.answer(A, 1, timeout_s=10)
            assert told.value.message == (
                "the model's turn did not come within queue_timeout_s=10 s: too many models share this engine now; "
                "retry later, or raise engine.queue_timeout_s"
            )
            assert told.value.retry_after_s == SLICE_S
            assert asyncio.get_running_loop().time() == 10
            assert engine.residency.num_waiting == 0
            # nobody waits any more, so the stream is not ended
            assert await long == 0
            assert engine.residency.stats.num_queue_timeouts == 1
            again = engine.ask(BASE, 20)
            with pytest.raises(QueueTimeoutError):
                await engine.answer(A, 1, timeout_s=5)
            assert await again == 20
            assert engine.residency.stats.num_queue_timeouts == 2

    run(main())


def test_while_the_engine_is_down_requests_wait_for_it() -> None:
    async def main() -> None:
        engine = FakeEngine()
        early, patient = engine.ask(BASE, 1, timeout_s=5), engine.ask(A, 1, timeout_s=60)
        with pytest.raises(
            ModelNotReadyError, match=r"^the engine is starting or restarting and was not ready within 5 s$"
        ):
            await early
        await pause(5)
        async with engine:
            assert await patient == 10 + MIX_S

    run(main())


def test_losing_the_engine_fails_who_holds_it_and_nobody_else() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with engine:
            holding, waiting = engine.ask(BASE, 100), engine.ask(A, 1)
            await pause(1)
        with pytest.raises(EngineError, match=r"^the engine failed while it held the request; it is being restarted$"):
            await holding
        assert engine.residency.num_in_flight == 0
        assert engine.residency.resident is None
        async with engine:
            assert await waiting == 1 + MIX_S

    run(main())


def test_a_lease_tells_the_mix_that_its_wait_took() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:

            async def mixing_s(wanted: Recipe, seconds: float = 0.0, **options: Any) -> float:
                with await engine.residency.acquire(wanted, **options) as lease:
                    await asyncio.sleep(seconds)
                    return lease.mixing_s

            assert await mixing_s(BASE) == 0.0
            waited = [mixing_s(A), mixing_s(A, seconds=1.0), mixing_s(A, background=True)]
            assert await asyncio.gather(*waited) == [MIX_S] * 3
            assert await mixing_s(A) == 0.0, "it came behind the mix"
            engine.mix_s = 2 * MIX_S
            assert await asyncio.gather(mixing_s(B, background=True), mixing_s(A)) == [2 * MIX_S, 0.0]

    run(main())


def test_one_life_at_a_time() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            with pytest.raises(RuntimeError, match=r"^these turns are given already$"):
                await engine.residency.run(BASE.digest, engine._mix)
            assert await engine.answer(BASE, 1) == 0

    run(main())


def test_sending_everybody_away() -> None:
    async def main() -> None:
        engine = FakeEngine()
        waiting = [engine.ask(A), engine.ask(B, background=True)]
        await pause(1)
        engine.residency.fail_waiting(lambda: ModelNotReadyError("it keeps failing"))
        for task in waiting:
            with pytest.raises(ModelNotReadyError, match="keeps failing"):
                await task

    run(main())


def test_a_refused_recipe_fails_those_who_want_it_and_no_one_else() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            engine.outcomes = [InvalidMixError("no such model")]
            refused, fine, resident = engine.ask(A), engine.ask(B), engine.ask(BASE, 0.1)
            for error in await asyncio.gather(refused, return_exceptions=True):
                assert isinstance(error, InvalidMixError)
            await asyncio.gather(fine, resident)
            assert engine.mixed == [B]

    run(main())


def test_a_refusal_leaves_the_resident_recipe_in_its_place() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            engine.outcomes = [InvalidMixError("no such model")]
            refused = engine.ask(A)
            await asyncio.wait({refused})
            assert isinstance(refused.exception(), InvalidMixError)
            started = asyncio.get_running_loop().time()
            assert await engine.answer(BASE, 1) == started
            assert engine.mixed == []

    run(main())


def test_a_busy_engine_is_asked_again_and_not_for_ever() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            engine.outcomes = [False] * (MAX_BUSY_MIXES - 1)
            assert await engine.answer(A, 1) == MAX_BUSY_MIXES * MIX_S
            engine.outcomes = [False] * MAX_BUSY_MIXES
            waiting = engine.ask(B)
            assert isinstance(await engine.ended(), EngineError)
            waiting.cancel()

    run(main())


@pytest.mark.parametrize("background", [False, True])
def test_a_lost_mix_is_tried_once_more_in_the_next_life(background: bool) -> None:
    async def main() -> None:
        engine = FakeEngine()
        lucky, unlucky = A, B
        engine.up()
        engine.outcomes = [EngineError("torn")]
        waiting = engine.ask(lucky, background=background)
        assert isinstance(await engine.ended(), EngineError)
        assert not waiting.done()
        engine.up()
        await waiting
        engine.outcomes = [EngineError("torn"), EngineError("torn")]
        waiting = engine.ask(unlucky, background=background)
        await engine.ended()
        engine.up()
        await engine.ended()
        with pytest.raises(EngineError, match="2 times in a row"):
            await waiting
        engine.up()
        await engine.answer(C, 1)
        await engine.down()

    run(main())


def test_dying_in_the_middle_of_a_mix_counts_as_losing_it() -> None:
    async def main() -> None:
        engine = FakeEngine()
        waiting = engine.ask(A)
        for _ in range(2):
            engine.up()
            await pause(MIX_S / 2)
            assert engine.residency.is_mixing
            await engine.down()
        with pytest.raises(EngineError, match="2 times in a row"):
            await waiting

    run(main())


def test_scoring_on_an_idle_engine_starts_at_once_and_shares_its_visit() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            jobs = [engine.answer(wanted, 1, background=True) for wanted in (A, B, A, B)]
            assert await asyncio.gather(*jobs) == [0.5, 2.0, 0.5, 2.0]
            assert engine.mixed == [A, B]

    run(main())


def test_traffic_is_served_between_two_visits() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            hold = engine.ask(BASE, 1)
            jobs = [engine.ask(recipe(f"expert {number}"), 0.1, background=True) for number in range(3)]
            await pause(0.5)
            clients = [asyncio.create_task(_keep_asking(engine, wanted, until=12)) for wanted in (BASE, A)]
            await asyncio.gather(hold, *jobs, *clients)
            visits = [index for index, mixed in enumerate(engine.mixed) if mixed not in (BASE, A)]
            assert len(visits) == 3
            assert all(later - earlier > 1 for earlier, later in itertools.pairwise(visits))

    run(main())


def test_a_life_begins_after_no_background_turn() -> None:
    """Scoring that is the oldest in line goes first, even where the last life ended in a turn of its own."""

    async def main() -> None:
        engine = FakeEngine()
        for _ in range(2):
            engine.mixed = []
            async with engine:
                hold, scoring = engine.ask(BASE, DELAY_S + 2), engine.ask(A, 0.1, background=True)
                await pause(DELAY_S + 1)
                traffic = engine.ask(B, 0.1)
                await scoring
                assert engine.mixed == [A]
            for task in (hold, traffic):
                task.cancel()

    run(main())


@pytest.mark.parametrize("num_recipes", [1, 5])
def test_scoring_does_not_starve_under_constant_traffic(num_recipes: int) -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            clients = [
                asyncio.create_task(_keep_asking(engine, recipe(str(number % num_recipes)), until=120))
                for number in range(2 * num_recipes)
            ]
            await pause(10)
            came = asyncio.get_running_loop().time()
            admitted = await engine.answer(A, 1, background=True)
            # its head start for traffic, and a round in which each of the others has its turn
            assert DELAY_S <= admitted - came <= DELAY_S + (num_recipes + 1) * (SLICE_S + 1 + MIX_S)
            await asyncio.gather(*clients)

    run(main())


def test_long_scoring_is_told_when_to_give_way() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            with await engine.residency.acquire(A, background=True) as lease:
                traffic = engine.ask(B)
                await pause(SLICE_S - 0.1)
                assert not lease.should_yield
                await pause(0.2)
                assert lease.should_yield
            await traffic

    run(main())


async def _keep_asking(engine: FakeEngine, wanted: Recipe, *, until: float) -> None:
    while asyncio.get_running_loop().time() < until:
        await engine.answer(wanted, 0.7)


def test_an_ended_lease_interrupts_what_is_awaited_under_it() -> None:
    async def main() -> None:
        async with FakeEngine(drain_s=1) as engine:

            async def hold() -> None:
                with await engine.residency.acquire(BASE) as lease:
                    with pytest.raises(DrainedError), lease.interruptible():
                        await asyncio.get_running_loop().create_future()
                    with pytest.raises(DrainedError), lease.interruptible():
                        pytest.fail("entered although the lease has ended")
                    with pytest.raises(DrainedError):
                        lease.on_end(lambda: None)
                await asyncio.sleep(1)  # no cancellation is left over

            await asyncio.gather(hold(), engine.answer(A, 1))

    run(main())


def test_a_cancellation_from_elsewhere_stays_one() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:

            async def hold() -> None:
                with await engine.residency.acquire(BASE) as lease, lease.interruptible():
                    await asyncio.get_running_loop().create_future()

            task = asyncio.create_task(hold())
            await pause(1)
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
            assert engine.residency.num_in_flight == 0

    run(main())


def test_a_cancellation_in_the_moment_of_the_end_stays_one() -> None:
    async def main() -> None:
        async with FakeEngine(drain_s=0, slice_s=1) as engine:

            async def hold() -> None:
                with await engine.residency.acquire(BASE) as lease:
                    held.append(lease)
                    with lease.interruptible():
                        await asyncio.get_running_loop().create_future()

            held: list[Lease] = []
            task = asyncio.create_task(hold())
            await pause(0.5)
            held[0].end(DrainedError("its time is over"))
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()

    run(main())


def test_a_waiter_cancelled_in_the_moment_of_its_admission_gives_it_back() -> None:
    async def main() -> None:
        async with FakeEngine() as engine:
            engine.mix_s = 0
            task = engine.ask(A)
            for _ in range(20):
                if engine.residency.num_in_flight:
                    break
                await asyncio.sleep(0)
            assert engine.residency.num_in_flight == 1
            assert not engine.users[A.digest], "it has woken up already"
            task.cancel()
            await asyncio.wait({task})
            assert engine.residency.num_in_flight == 0
            await engine.answer(B, 1)

    run(main())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    num_recipes=st.integers(1, 5),
    num_requests=st.integers(1, 40),
    slice_s=st.sampled_from([0.0, 0.5, 2.0]),
    drain_s=st.sampled_from([0.0, 1.0, 30.0]),
    max_in_flight=st.sampled_from([1, 2, 5, None]),
)
def test_whatever_happens_nobody_meets_other_parameters_and_nothing_is_left(
    *, seed: int, num_recipes: int, num_requests: int, slice_s: float, drain_s: float, max_in_flight: int | None
) -> None:
    """Random requests of several tenants, cancellations, refusals, torn mixes, deaths, pins and drains; `FakeEngine`
    checks each use and each mix."""

    async def main() -> None:
        chance = random.Random(seed)
        recipes = [BASE, *(recipe(str(number)) for number in range(num_recipes))]
        engine = FakeEngine(slice_s=slice_s, drain_s=drain_s, max_in_flight=max_in_flight)
        engine.outcomes = [
            chance.choices([True, False, InvalidMixError("refused"), EngineError("torn")], [20, 2, 1, 1])[0]
            for _ in range(30)
        ]
        owner = asyncio.create_task(_restart_for_ever(engine, chance))
        requests = []
        for _ in range(num_requests):
            request = engine.ask(
                chance.choice(recipes),
                chance.choice([0.0, 0.1, 1.0, 50.0]),
                tokens=chance.choice([0, 1, 100, 10_000]),
                tenant=chance.choice(["a", "b", "c"]),
                background=chance.random() < 0.3,
                timeout_s=chance.choice([None, 0.0, 5.0, 60.0]),
            )
            requests.append(request)
            if chance.random() < 0.2:
                asyncio.get_running_loop().call_later(chance.choice([0.0, 0.5, 3.0]), request.cancel)
            if chance.random() < 0.1:
                engine.residency.pin(chance.choice([None, *recipes]))
            if chance.random() < 0.1:
                engine.residency.drain(chance.random() < 0.5)
            await asyncio.sleep(chance.choice([0.0, 0.0, 0.1, 1.0, 7.0]))
            assert max_in_flight is None or engine.residency._slots.num_taken <= max_in_flight
        engine.residency.pin(None)
        engine.residency.drain(False)
        done, pending = await asyncio.wait(requests, timeout=100_000)
        assert not pending, "somebody starved"
        allowed = (DrainedError, EngineError, InvalidMixError, ModelNotReadyError, QueueTimeoutError)
        for request in done:
            if not request.cancelled() and request.exception() is not None:
                assert isinstance(request.exception(), allowed), request.exception()
        assert engine.residency.num_in_flight == 0
        assert engine.residency.num_waiting == 0
        owner.cancel()
        await asyncio.gather(owner, return_exceptions=True)

    run(main())


async def _restart_for_ever(engine: FakeEngine, chance: random.Random) -> None:
    while True:
        engine.up()
        assert engine._task is not None
        await asyncio.wait({engine._task}, timeout=chance.choice([3.0, 30.0, 300.0]))
        await engine.down()
        await asyncio.sleep(chance.choice([0.0, 2.0]))


class TestTenants:
    """Turns and slots between tenants. The flood asks as fast as it is answered, with many clients."""

    def test_a_flood_leaves_a_tenant_of_another_recipe_its_latency(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=16) as engine:
                lone = await _latencies(engine, C, until=60)
                flood = [_flood(engine, recipe(str(n % 3)), tenant="flood", until=360) for n in range(48)]
                beside, *_ = await asyncio.gather(_latencies(engine, C, until=360), *flood)
            assert _p95(beside) <= 2 * _p95(lone)

        run(main())

    def test_a_flood_of_the_same_recipe_leaves_it_slots(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=16) as engine:
                flood = [asyncio.create_task(_flood(engine, BASE, tenant="flood", until=60)) for _ in range(100)]
                await pause(0.1)
                assert engine.residency._slots.num_taken == 16, "alone, it may have them all"
                latencies = await _latencies(engine, BASE, until=60)
                await asyncio.gather(*flood)
            # the first waits for a slot, later ones find the tenant's own share
            assert latencies[0] <= 2 * 0.3
            assert latencies[1:] == pytest.approx([0.3] * len(latencies[1:]))

        run(main())

    def test_slots_are_shared_out_and_given_back(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=8) as engine:
                both = [_flood(engine, BASE, tenant=t, until=20) for t in ("a", "b") for _ in range(20)]
                tasks = [asyncio.create_task(flood) for flood in both]
                await pause(10.05)
                assert presence_of(engine, "a").num_in_flight == presence_of(engine, "b").num_in_flight == 4
                for task in tasks[20:]:
                    task.cancel()
                await pause(SLICE_S + 1)
                assert presence_of(engine, "a").num_in_flight == 8
                await asyncio.gather(*tasks, return_exceptions=True)

        run(main())

    def test_nobody_overtakes_who_waits_for_a_share_that_has_become_free(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=3) as engine:
                tasks = [engine.ask(BASE, 10, tenant="a"), engine.ask(BASE, 0.1, tenant="b")]
                await pause(0.05)
                waiting = engine.ask(BASE, 1, tenant="a")
                await pause(0.1 + SLICE_S)  # b has left, and its share is kept no longer: nothing tells of that
                assert not waiting.done()
                late = engine.ask(BASE, 1, tenant="a")
                assert await waiting == await late == 0.15 + SLICE_S
                await asyncio.gather(*tasks)

        run(main())

    def test_a_share_in_one_turn_is_none_in_the_next(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=2) as engine:
                hold = engine.ask(BASE, 1, tenant="a")
                admitted = await asyncio.gather(*(engine.answer(A, 5, tenant="b") for _ in range(2)))
                assert admitted == [1 + MIX_S] * 2
                await hold

        run(main())

    def test_more_recipes_are_no_more_service(self) -> None:
        async def main() -> None:
            served: Counter[str] = Counter()
            async with FakeEngine(max_in_flight=8) as engine:
                many = [_flood(engine, recipe(str(n % 5)), tenant="many", until=600, served=served) for n in range(40)]
                one = [_flood(engine, C, tenant="one", until=600, served=served) for _ in range(40)]
                await asyncio.gather(*many, *one)
            assert served["one"] / served["many"] == pytest.approx(1.0, abs=0.2)

        run(main())

    def test_nobody_goes_without_for_longer_than_the_patience(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=4, patience_s=10) as engine:
                # what the flood was served long outweighs what a slow client will ever use
                await engine.answer(A, 1, tenant="flood", tokens=1_000_000)
                slow = asyncio.create_task(_latencies(engine, B, until=100, tokens=1))
                await pause(1)
                waits = []
                while asyncio.get_running_loop().time() < 90:
                    came = asyncio.get_running_loop().time()
                    waits.append(await engine.answer(A, 0.3, tenant="flood", tokens=100) - came)
                    await pause(SLICE_S)
                await slow
            assert max(waits) <= 10 + SLICE_S + 0.3 + MIX_S
            assert max(waits) > 5, "the slow client was never preferred"

        run(main())

    def test_an_idle_tenant_is_owed_what_it_missed_lately_only(self) -> None:
        account = ServedTokens()
        account.charge(1000, now=0.0)
        assert account.recent(HALF_LIFE_S) == 500
        account.charge(-2000, now=HALF_LIFE_S)
        assert account.recent(HALF_LIFE_S) == 0

    def test_tenants_without_number_are_forgotten(self) -> None:
        served_tokens = ServedTokensByTenant()
        slots = Slots(served_tokens, max_in_flight=None, gap_s=SLICE_S)
        slots.take("busy", 1, 0.0)
        busy = slots.of("busy")
        for number in range(3 * MAX_KEPT):
            slots.take(str(number), 1, float(number))
            slots.leave(str(number), float(number))
        assert len(served_tokens._by_tenant) <= MAX_KEPT
        assert len(slots._tenants) <= MAX_KEPT
        assert slots.of("busy") is busy

    def test_engines_that_share_accounts_treat_a_tenant_alike(self) -> None:
        async def main() -> None:
            served_tokens = ServedTokensByTenant()
            async with (
                FakeEngine(served_tokens=served_tokens) as here,
                FakeEngine(served_tokens=served_tokens) as there,
            ):
                await there.answer(BASE, 1, tenant="flood", tokens=1000)
                hold = here.ask(BASE, 1, tenant="another")
                flood = here.ask(A, 1, tenant="flood")
                await pause(0.1)
                await asyncio.gather(hold, flood, here.ask(B, 1, tenant="quiet"))
                assert here.mixed == [B, A]

        run(main())

    def test_a_stream_is_charged_as_it_goes_and_settled_at_its_end(self) -> None:
        async def main() -> None:
            async with FakeEngine() as engine:
                lease = await engine.residency.acquire(BASE, tenant="a", num_tokens=10)
                assert engine.residency._slots.served("a", 0.0) == 10
                lease.emitted(8)
                assert engine.residency._slots.served("a", 0.0) == 10
                lease.emitted(8)
                assert engine.residency._slots.served("a", 0.0) == 16
                lease.release()
                lease.settle(14)
                assert engine.residency._slots.served("a", 0.0) == 14

        run(main())


class TestOperator:
    def test_a_pinned_recipe_is_mixed_and_stays_while_others_are_sent_away(self) -> None:
        async def main() -> None:
            async with FakeEngine() as engine:
                hold = engine.ask(BASE, 1)
                scoring, waiting = engine.ask(B, background=True), engine.ask(C)
                await pause(0.1)
                engine.residency.pin(A)
                with pytest.raises(ModelNotReadyError, match="keeps another model"):
                    await waiting
                await hold
                await pause(SLICE_S + MIX_S)
                assert engine.residency.resident == A.digest
                with pytest.raises(ModelNotReadyError, match="keeps another model"):
                    await engine.answer(BASE, 1)
                await engine.answer(A, 1)
                assert [(q.recipe_digest, q.reason) for q in engine.residency.snapshot().queues] == [
                    (B.digest, "pinned")
                ]
                engine.residency.pin(None)
                await scoring
                assert engine.mixed == [A, B]

        run(main())

    def test_an_idle_engine_is_pinned_and_released_at_once(self) -> None:
        async def main() -> None:
            async with FakeEngine() as engine:
                engine.residency.pin(A)
                scoring = engine.ask(B, background=True)
                await pause(5)
                assert engine.residency.resident == A.digest
                engine.residency.pin(None)
                assert await scoring == 5 + MIX_S

        run(main())

    def test_a_drained_engine_goes_on_at_once(self) -> None:
        async def main() -> None:
            async with FakeEngine() as engine:
                engine.residency.drain(True)
                scoring = engine.ask(A, background=True)
                await pause(5)
                engine.residency.drain(False)
                assert await scoring == 5 + MIX_S

        run(main())

    @pytest.mark.parametrize("error", [InvalidMixError("no such model"), EngineError("torn")])
    def test_a_recipe_that_cannot_be_mixed_is_not_pinned_for_ever(self, error: Exception) -> None:
        async def main() -> None:
            engine = FakeEngine()
            engine.outcomes = [error, error]
            engine.residency.pin(A)
            for _ in range(2):
                engine.up()
                await pause(2 * MIX_S)
                await engine.down()
            engine.outcomes = []
            async with engine:
                await engine.answer(B, 1)

        run(main())

    def test_a_drained_engine_finishes_what_it_has_and_admits_nobody(self) -> None:
        async def main() -> None:
            async with FakeEngine() as engine:
                running, waiting = engine.ask(BASE, 10), engine.ask(A)
                await pause(0.1)
                engine.residency.drain(True)
                with pytest.raises(ModelNotReadyError, match="drains this engine"):
                    await waiting
                with pytest.raises(ModelNotReadyError, match="drains this engine"):
                    await engine.answer(BASE, 1)
                scoring = engine.ask(BASE, 1, background=True)
                assert await running == 0
                await pause(1)
                assert not scoring.done()
                assert engine.residency.snapshot().queues[0].reason == "drained"
                engine.residency.drain(False)
                await scoring

        run(main())

    def test_it_is_told_why_nobody_is_served_while_the_engine_is_down(self) -> None:
        async def main() -> None:
            engine = FakeEngine()
            scoring = engine.ask(A, background=True)
            await pause(1)
            reasons = []
            for pinned, is_drained in ((None, False), (B, False), (B, True), (None, True)):
                engine.residency.pin(pinned)
                engine.residency.drain(is_drained)
                reasons += [queue.reason for queue in engine.residency.snapshot().queues]
            assert reasons == ["engine_down", "engine_down", "drained", "drained"]
            assert engine.residency.snapshot().turn_s is None
            scoring.cancel()

        run(main())

    def test_who_waits_for_what_is_pinned_goes_on_waiting(self) -> None:
        async def main() -> None:
            async with FakeEngine() as engine:
                hold, waiting, other = engine.ask(BASE, 1), engine.ask(A, 1), engine.ask(B, 1)
                await pause(0.1)
                engine.residency.pin(A)
                with pytest.raises(ModelNotReadyError, match="keeps another model"):
                    await other
                assert await hold == 0
                assert await waiting == 1 + MIX_S

        run(main())

    def test_it_is_told_what_is_in_the_engine(self) -> None:
        async def main() -> None:
            async with FakeEngine() as engine:
                told = engine.residency.snapshot()
                assert (told.phase, told.resident, told.pinned, told.is_drained) == ("open", BASE.digest, None, False)
                engine.residency.pin(A)
                waiting = engine.ask(A)
                await pause(MIX_S / 2)
                told = engine.residency.snapshot()
                assert (told.phase, told.resident, told.pinned, told.is_drained) == ("mixing", None, A.digest, False)
                assert (told.turn_s, [queue.reason for queue in told.queues]) == (None, ["mixing"])
                await waiting
                engine.residency.drain(True)
                told = engine.residency.snapshot()
                assert (told.phase, told.resident, told.pinned, told.is_drained) == ("open", A.digest, A.digest, True)

        run(main())

    def test_it_is_told_why_each_waits(self) -> None:
        async def main() -> None:
            async with FakeEngine(max_in_flight=1) as engine:
                tasks = [engine.ask(BASE, 5), engine.ask(BASE, 1), engine.ask(A, 1)]
                await pause(1)
                found = engine.residency.snapshot()
                assert {queue.recipe_digest: queue.reason for queue in found.queues} == {
                    BASE.digest: "no_slot",
                    A.digest: "other_turn",
                }
                assert (found.phase, found.num_in_flight, found.turn_s) == ("open", 1, 1)
                await pause(SLICE_S)
                assert {queue.reason for queue in engine.residency.snapshot().queues} == {"turn_ends"}
                await asyncio.gather(*tasks)

        run(main())


def presence_of(engine: FakeEngine, tenant: str) -> Presence:
    return engine.residency._slots.of(tenant)


async def _latencies(engine: FakeEngine, wanted: Recipe, *, until: float, tokens: int = 30) -> list[float]:
    """What one client in a loop waits for each of its answers."""
    loop = asyncio.get_running_loop()
    latencies = []
    while (asked := loop.time()) < until:
        await engine.answer(wanted, 0.3, tenant="one client", tokens=tokens)
        latencies.append(loop.time() - asked)
    return latencies


async def _flood(
    engine: FakeEngine, wanted: Recipe, *, tenant: str, until: float, served: Counter[str] | None = None
) -> None:
    while asyncio.get_running_loop().time() < until:
        await engine.answer(wanted, 0.3, tenant=tenant, tokens=30)
        if served is not None:
            served[tenant] += 1


def _p95(latencies: list[float]) -> float:
    return sorted(latencies)[int(0.95 * len(latencies))]
