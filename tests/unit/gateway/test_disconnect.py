"""Work that ends with its client."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from cocktail_serve.gateway import disconnect
from cocktail_serve.gateway.disconnect import ended_with_client


class Client:
    """One who stays until `leave`."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.asked = asyncio.Event()
        self._left = asyncio.Event()

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> Message:
        self.num_asked += 1
        self.asked.set()
        await self._left.wait()
        return {"type": "http.disconnect"}


async def test_a_client_that_leaves_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnect, "WATCH_AFTER_S", 0.0)
    client, released = Client(), asyncio.Event()

    async def work() -> None:
        async with ended_with_client(client.receive):
            client.leave()
            try:
                await asyncio.Event().wait()
            finally:
                released.set()

    with pytest.raises(ClientDisconnect):
        await work()
    assert released.is_set()
    await asyncio.sleep(0)  # the cancellation was used up: this task goes on


async def test_one_who_left_before_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnect, "WATCH_AFTER_S", 0.01)
    client = Client()
    client.leave()
    with pytest.raises(ClientDisconnect):
        async with ended_with_client(client.receive):
            await asyncio.Event().wait()


async def test_short_work_is_not_watched() -> None:
    client = Client()
    async with ended_with_client(client.receive):
        await asyncio.sleep(0)
    assert client.num_asked == 0


async def test_the_watch_ends_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnect, "WATCH_AFTER_S", 0.0)
    client = Client()
    async with ended_with_client(client.receive):
        while not client.num_asked:  # noqa: ASYNC110 # what is waited for is a call
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1
    client.leave()
    await asyncio.sleep(0)


async def test_a_cancellation_from_elsewhere_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnect, "WATCH_AFTER_S", 0.0)
    client = Client()

    async def work() -> None:
        async with ended_with_client(client.receive):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await client.asked.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
