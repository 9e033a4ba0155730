"""Who waits for which recipe, and what of it the operator is told."""

from __future__ import annotations

import asyncio

import pytest

from cocktail_serve.engines.scheduler_snapshot import Queue
from cocktail_serve.engines.turns.wait_queue import Claimant, Waiter, WaitQueues
from cocktail_serve.errors import ModelNotReadyError
from cocktail_serve.recipe import Recipe

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
