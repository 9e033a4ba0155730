"""Changes that end once begun, however they are put together."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cocktail_serve.database.shield import Shield


async def test_a_change_within_a_change_is_part_of_its_task() -> None:
    """Of a registry's change, say, the store's: two owners of unbroken changes, one task."""
    outer, inner = Shield(), Shield()
    tasks: list[asyncio.Task[Any] | None] = []

    async def write() -> str:
        tasks.append(asyncio.current_task())
        return "written"

    async def change() -> str:
        tasks.append(asyncio.current_task())
        return await inner.run(write())

    assert await outer.run(change()) == "written"
    assert tasks[0] is tasks[1]
    assert tasks[0] is not asyncio.current_task()


async def test_both_end_though_the_caller_leaves() -> None:
    outer, inner = Shield(), Shield()
    begun, may_end, done = asyncio.Event(), asyncio.Event(), []

    async def write() -> None:
        begun.set()
        await may_end.wait()
        done.append("written")

    async def change() -> None:
        await inner.run(write())
        done.append("shown")

    caller = asyncio.create_task(outer.run(change()))
    await begun.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    may_end.set()
    await outer.until_done()
    assert done == ["written", "shown"]


async def test_a_task_begun_within_a_change_is_not_part_of_it() -> None:
    """It can be cancelled, so what it changes is seen to the end by a task of its own."""
    unbroken = Shield()
    begun, may_end, done = asyncio.Event(), asyncio.Event(), []

    async def write() -> None:
        begun.set()
        await may_end.wait()
        done.append("written")

    async def change() -> asyncio.Task[None]:
        return asyncio.create_task(unbroken.run(write()))

    job = await unbroken.run(change())
    await begun.wait()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    may_end.set()
    await unbroken.until_done()
    assert done == ["written"]
