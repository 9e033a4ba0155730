"""One task for each cocktail: begun, replaced, ended."""

from __future__ import annotations

import asyncio

import pytest

from cocktail_serve.cocktails.tasks import BackgroundTasks
from tests.cocktails import queued_cocktail


async def for_ever() -> None:
    await asyncio.Event().wait()


async def at_once() -> None:
    return


async def test_a_task_is_known_until_it_ends() -> None:
    tasks = BackgroundTasks("job")
    tasks.start(queued_cocktail("1", epoch=3), at_once())
    assert "1" in tasks
    assert (tasks.epoch_of("1"), tasks.epoch_of("2")) == (3, None)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert "1" not in tasks
    assert tasks.cancel("1") is None


async def test_the_end_of_the_task_before_leaves_the_one_that_replaced_it() -> None:
    tasks = BackgroundTasks("job")
    tasks.start(queued_cocktail("1", epoch=1), for_ever())
    previous = tasks.cancel("1")
    assert previous is not None
    tasks.start(queued_cocktail("1", epoch=2), for_ever())
    with pytest.raises(asyncio.CancelledError):
        await previous
    await asyncio.sleep(0)
    assert tasks.epoch_of("1") == 2
    await tasks.stop()


async def test_stopping_ends_all_and_waits_for_them() -> None:
    ended = []

    async def slow_to_leave(uid: str) -> None:
        try:
            await for_ever()
        finally:
            await asyncio.sleep(0)
            ended.append(uid)

    tasks = BackgroundTasks("job")
    for uid in ("1", "2"):
        tasks.start(queued_cocktail(uid), slow_to_leave(uid))
    await asyncio.sleep(0)
    await tasks.stop()
    assert ended == ["1", "2"]
    assert "1" not in tasks
