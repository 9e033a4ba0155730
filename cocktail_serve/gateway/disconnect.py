"""Stops work whose client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect
from starlette.types import Receive

WATCH_AFTER_S = 0.05
"""When a client begins to be watched. Embeddings and short answers are there before, and a task for each of them would
be a good part of what they cost here."""


@asynccontextmanager
async def ended_with_client(receive: Receive) -> AsyncIterator[None]:
    """Cancels the block when the client closes its connection, so that what it holds is released at once.

    A departure in the first `WATCH_AFTER_S` is noticed at their end. The body of the request must have been read
    before: `receive` is consumed.

    Raises:
        ClientDisconnect: in place of the cancellation, once the block has unwound.
    """
    task = asyncio.current_task()
    assert task is not None
    watcher: asyncio.Task[None] | None = None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    def begin() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch(), name="client-watch")

    timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, begin)
    try:
        yield
    except asyncio.CancelledError:
        # a cancellation from elsewhere as well (shutdown) goes on
        if is_gone and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()
