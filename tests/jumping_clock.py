"""An event loop under a clock of its own: its time jumps to the next timer instead of sleeping."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _JumpingSelector(selectors.DefaultSelector):
    """Where the loop would sleep until its next timer, time passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everybody waits, and for no timer: a deadlock")
            self.now += timeout
        return ready


class _JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a test to its end, from time 0."""
    with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
        runner.run(main)


async def pause(seconds: float) -> None:
    """Lets time pass."""
    await asyncio.sleep(seconds)
