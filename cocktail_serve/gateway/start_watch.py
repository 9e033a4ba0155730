"""Says when each engine becomes ready for the first time: what whoever has started a server waits for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from cocktail_serve.engines.base import Engine

logger = logging.getLogger(__name__)

POLL_S = 0.25
_DEADLINE_S = 5.0


async def until_all_ready(engines: Mapping[str, Engine], *, url: str) -> None:
    """Returns once every engine was ready, with a line in the log for each; may be cancelled at any time.

    One that has failed is asked on: its next start may go better. Why it failed it says itself.

    Args:
        engines: by pool; they have been told to start.
        url: of the server, for the log.
    """
    started = time.monotonic()
    waiting = dict(engines)
    while waiting:
        for pool_id, engine in list(waiting.items()):
            if (await engine.snapshot(deadline_s=_DEADLINE_S)).state == "ready":
                del waiting[pool_id]
                logger.info("pool %s is ready after %.1f s: %s/v1", pool_id, time.monotonic() - started, url)
        await asyncio.sleep(POLL_S if waiting else 0)
