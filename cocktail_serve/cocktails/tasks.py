"""What is being done for cocktails in this process: at most one task for each."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from cocktail_serve.cocktails.cocktail import Cocktail


@dataclass(frozen=True, slots=True)
class _Running:
    task: asyncio.Task[None]
    epoch: int


class BackgroundTasks:
    """Running tasks by the uid of their cocktail.

    Args:
        what: they are, for their names.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._running: dict[str, _Running] = {}

    def __contains__(self, uid: str) -> bool:
        return uid in self._running

    def epoch_of(self, uid: str) -> int | None:
        """The epoch of the cocktail when its task began; None: there is no task."""
        running = self._running.get(uid)
        return None if running is None else running.epoch

    def start(self, cocktail: Cocktail, work: Coroutine[Any, Any, None]) -> None:
        """Begins with a cocktail; a task that it has is no longer its task, but goes on."""
        task = asyncio.get_running_loop().create_task(work, name=f"{self._what} {cocktail.id}")
        running = self._running[cocktail.uid] = _Running(task, cocktail.epoch)
        task.add_done_callback(lambda _: self._ended(cocktail.uid, running))

    def cancel(self, uid: str) -> asyncio.Task[None] | None:
        """Ends a task, if there is one, and returns it: it may still be leaving an engine."""
        running = self._running.get(uid)
        if running is None:
            return None
        running.task.cancel()
        return running.task

    async def stop(self) -> None:
        """Ends all where they are."""
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, uid: str, running: _Running) -> None:
        if self._running.get(uid) is running:
            del self._running[uid]
