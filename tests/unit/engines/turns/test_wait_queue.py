"""Who waits for which recipe, and what of it the operator is told."""

from __future__ import annotations

import asyncio

import pytest

from cocktail_serve.engines.line_place import LinePlace, RecalledError
from cocktail_serve.engines.scheduler_snapshot import Queue
from cocktail_serve.engines.turns.wait_queue import Claimant, Waiter, WaitQueues
from cocktail_serve.errors import ModelNotReadyError
from cocktail_serve.recipe import Recipe
from tests.jumping_clock import pause, run

A, B = (Recipe(base="base", coefficients=((name, 1.0),), dtype="float32") for name in ("a", "b"))


def waiting(
    queues: WaitQueues, recipe: Recipe, came: float, tenant: str = "t", claimant: Claimant = "tenant"
) -> Waiter:
    granted = asyncio.get_running_loop().create_future()
    waiter = Waiter(recipe=recipe, made_at=came, ranked_from=came, tenant=tenant, claimant=claimant, granted=granted)
    queues.holding(waiter).add(waiter)
    return waiter


async def test_the_operator_is_told_who_waits_and_for_how_long() -> None:
    queues = WaitQueues()
    assert not queues
    waiting(queues, A, 3.0)
    waiting(queues, A, 5.0)
    waiting(queues, B, 4.0)
    waiting(queues, B, 1.0, "", "background")
    assert queues
    assert queues.snapshot(10.0, reason=lambda digest: "pinned" if digest == A.digest else "mixing") == (
        Queue(B.digest, num_waiting=1, num_background=1, oldest_s=9.0, reason="mixing"),
        Queue(A.digest, num_waiting=2, num_background=0, oldest_s=7.0, reason="pinned"),
    )


async def test_the_first_of_each_tenant_for_each_recipe() -> None:
    queues = WaitQueues()
    requests = queues.requests
    first, second = waiting(queues, A, 1.0, "x"), waiting(queues, A, 2.0, "x")
    another, elsewhere = waiting(queues, A, 3.0, "y"), waiting(queues, B, 4.0, "x")
    assert requests.firsts_of(A.digest) == [first, another]
    assert requests.firsts(other_than=A.digest) == [elsewhere]
    assert requests.firsts(other_than=None) == [first, another, elsewhere]
    requests.discard(first)
    requests.discard(first)
    assert requests.firsts_of(A.digest) == [second, another]
    assert (len(requests), A.digest in requests) == (3, True)
    requests.discard(second)
    requests.discard(another)
    assert (list(requests), A.digest in requests) == ([elsewhere], False)


async def test_all_but_those_for_one_recipe_are_sent_away() -> None:
    queues = WaitQueues()
    kept, gone = waiting(queues, A, 1.0), waiting(queues, B, 2.0)
    queues.requests.fail_all(lambda: ModelNotReadyError("another is pinned"), but=A.digest)
    assert (kept.is_answered, list(queues.requests)) == (False, [kept])
    with pytest.raises(ModelNotReadyError, match="another is pinned"):
        await gone.lease()


async def test_a_cancellation_in_the_moment_of_being_sent_away_stays_one() -> None:
    queues = WaitQueues()
    waiter = waiting(queues, A, 1.0)
    task = asyncio.create_task(waiter.lease())
    await asyncio.sleep(0)
    queues.fail(waiter, ModelNotReadyError("it keeps failing"))
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


def never(waiter: Waiter, timeout_s: float) -> None:
    raise AssertionError("nobody waits that long here")


@pytest.mark.parametrize("background", [False, True])
def test_a_requests_time_in_other_lines_counts_and_a_visit_waits_anew(background: bool) -> None:
    async def scene() -> None:
        queues, place = WaitQueues(), LinePlace()
        place.num_lost_mixes = 1
        await pause(7)
        with queues.joined(
            A,
            tenant="t",
            num_tokens=0,
            background=background,
            now=7.0,
            delay_s=2.0,
            timeout_s=None,
            expire=never,
            place=place,
        ) as waiter:
            came = 7.0 if background else 0.0
            assert (waiter.made_at, waiter.ranked_from, waiter.num_lost_mixes) == (came, came + 2.0, 1)
            assert place.is_in_line
        assert (place.is_in_line, place.asked_at, place.let_in_at) == (False, 0.0, 7.0)

    run(scene())


def test_a_line_is_left_in_time_whatever_was_waited_elsewhere() -> None:
    async def scene() -> None:
        queues, place, expired = WaitQueues(), LinePlace(), list[float]()
        await pause(7)
        with queues.joined(
            A,
            tenant="t",
            num_tokens=0,
            background=False,
            now=7.0,
            timeout_s=10.0,
            expire=lambda _, timeout_s: expired.append(timeout_s),
            place=place,
        ):
            await pause(2.9)
            assert expired == []
            await pause(0.2)
            assert expired == [10.0]

    run(scene())


async def test_who_waits_is_called_away_and_who_is_answered_is_not() -> None:
    queues, place = WaitQueues(), LinePlace()
    place.recall()  # it is nowhere yet
    with queues.joined(
        A, tenant="t", num_tokens=0, background=False, now=0.0, timeout_s=None, expire=never, place=place
    ) as waiter:
        place.recall()
        with pytest.raises(RecalledError):
            await waiter.lease()
        assert len(queues.requests) == 0
    with queues.joined(
        A, tenant="t", num_tokens=0, background=False, now=0.0, timeout_s=None, expire=never, place=place
    ) as waiter:
        waiter.granted.set_exception(ModelNotReadyError("it was sent away"))
        place.recall()
        with pytest.raises(ModelNotReadyError):
            await waiter.lease()
