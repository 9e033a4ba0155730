"""Where a request waits that could wait elsewhere: in the line of one engine, until it is let in or called away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class RecalledError(Exception):
    """A request left its line before it was let in, for the line of another engine. No caller sees it."""


class LinePlace:
    """The place of one request in a line; of one line after the other, if it is called away.

    Lives on one event loop, which gives the time.

    Attributes:
        asked_at: since when it waits; what it waited in lines that it left counts.
        let_in_at: when it left the last line, in which it need not have waited.
        num_lost_mixes: engines that were lost while they mixed the recipe for it, in any line.
    """

    __slots__ = ("_leave", "asked_at", "let_in_at", "num_lost_mixes")

    def __init__(self) -> None:
        self.asked_at = self.let_in_at = asyncio.get_running_loop().time()
        self.num_lost_mixes = 0
        self._leave: Callable[[RecalledError], object] | None = None

    @property
    def is_in_line(self) -> bool:
        return self._leave is not None

    def recall(self) -> None:
        """Has whoever waits get `RecalledError`, unless it is let in already."""
        if self._leave is not None:
            self._leave(RecalledError())

    @contextmanager
    def held(self, leave: Callable[[RecalledError], object]) -> Iterator[None]:
        """It is in a line inside the block; for the owner of the line.

        Args:
            leave: is to send it out of the line with this error; does nothing where it was let in meanwhile.
        """
        self._leave = leave
        try:
            yield
        finally:
            self._leave = None
            self.let_in_at = asyncio.get_running_loop().time()
