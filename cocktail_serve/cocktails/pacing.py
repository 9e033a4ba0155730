"""Long loops on the event loop, in which others get their turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

_T = TypeVar("_T")


async def paced(values: Iterable[_T], *, every: int = 8) -> AsyncIterator[_T]:
    """The values one by one; after every few of them, whatever else waits for the event loop runs first."""
    for index, value in enumerate(values, start=1):
        yield value
        if index % every == 0:
            await asyncio.sleep(0)
