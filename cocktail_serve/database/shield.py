"""Changes that end once begun, whoever stops waiting for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar
from weakref import WeakSet

_T = TypeVar("_T")

_shielded_tasks: WeakSet[asyncio.Task[Any]] = WeakSet()
"""Tasks that nobody cancels."""


class Shield:
    """Runs coroutines to their end though the caller is cancelled: a disconnect leaves nothing half done."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, change: Coroutine[Any, Any, _T]) -> _T:
        """Awaits a coroutine in a task of its own; cancelling the caller leaves that task running.

        A change that is part of another one is as unbroken as that, and needs no task.
        """
        if asyncio.current_task() in _shielded_tasks:
            return await change
        task = asyncio.get_running_loop().create_task(change)
        _shielded_tasks.add(task)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def until_done(self) -> None:
        """Waits until everything begun has ended."""
        while self._running:
            await asyncio.wait(self._running)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen here, since the caller may no longer be there to see it
