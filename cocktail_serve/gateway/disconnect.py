"""Stops work whose client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect
from starlette.types import Receive


@asynccontextmanager
async def ended_with_client(receive: Receive) -> AsyncIterator[None]:
    """Cancels the block when the client closes its connection, so that what it holds is released at once.

    The body of the request must have been read before: `receive` is consumed.

    Raises:
        ClientDisconnect: in place of the cancellation, once the block has unwound.
    """
    task = asyncio.current_task()
    assert task is not None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch(), name="client-watch")
    try:
        yield
    except asyncio.CancelledError:
        # a cancellation from elsewhere as well (shutdown) goes on
        if is_gone and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
