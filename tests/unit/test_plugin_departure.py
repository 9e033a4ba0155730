"""Work whose client leaves is cancelled, and no other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vllm_cocktail.departure import unless_gone


class Client:
    """Receives nothing more until it leaves."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def test_the_result_of_a_client_that_stays() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await unless_gone(Client().receive, work()) == 7


async def test_a_client_that_leaves_has_its_work_cancelled() -> None:
    client, ended = Client(), asyncio.Event()

    async def work() -> int:
        client.gone.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return 7

    assert await unless_gone(client.receive, work()) is None
    assert ended.is_set(), "the work has unwound"


async def test_an_error_is_raised() -> None:
    async def work() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await unless_gone(Client().receive, work())


async def test_who_is_cancelled_cancels_the_work() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(unless_gone(Client().receive, work()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
