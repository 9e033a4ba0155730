"""One gateway beside others on a store: it learns what they do, takes over from the dead, and sweeps for all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from math import inf

from cocktail_serve.cocktails.cocktail import Cocktail
from cocktail_serve.cocktails.gateway_heartbeats import GatewayHeartbeats
from cocktail_serve.cocktails.jobs import Jobs
from cocktail_serve.cocktails.pacing import paced
from cocktail_serve.cocktails.registry import Registry
from cocktail_serve.database.database import Database
from cocktail_serve.errors import StorageError
from cocktail_serve.pool import Pool

logger = logging.getLogger(__name__)

Sweep = Callable[[], Awaitable[object]]
"""Removes what has been kept long enough."""

Adopt = Callable[[str, frozenset[str]], Awaitable[object]]
"""Goes on with other work that nobody does, given the id of this gateway and those of all that are there."""

SWEEP_S = 600.0
"""Between two sweeps of all that is kept for a time only."""


class ClusterLoop:
    """What a gateway does again and again because it may not be alone.

    Args:
        report: begins the report of a ready cocktail, where there is none yet.
        sweep: done now and then by one of the gateways.
        adopters: what else is taken over from the dead.
        poll_s: between two looks for what others changed.
    """

    def __init__(
        self,
        database: Database,
        heartbeats: GatewayHeartbeats,
        registry: Registry,
        jobs: Jobs,
        pools: Mapping[str, Pool],
        *,
        report: Callable[[Cocktail], None],
        sweep: Sweep,
        poll_s: float,
        adopters: Sequence[Adopt] = (),
    ) -> None:
        self._database = database
        self._heartbeats = heartbeats
        self._registry = registry
        self._jobs = jobs
        self._pools = pools
        self._report = report
        self._sweep = sweep
        self._adopters = adopters
        self._poll_s = poll_s
        self._swept_at = -inf
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Joins the others, reads the registry, and goes on with the jobs that nobody works on.

        Raises:
            StorageError: the store cannot be read.
        """
        await self._join()
        await self._registry.load()
        await self._adopt(await self._heartbeats.alive())
        self._task = asyncio.create_task(self._follow(), name="other gateways")

    async def pause(self) -> None:
        """Ends following; the others take this gateway for dead after a while. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def leave(self) -> None:
        """Tells the others that this gateway ends, so that they go on with its jobs at once."""
        try:
            await self._registry.flush()
            await self._heartbeats.leave()
        except StorageError as error:
            logger.warning("the store was not told that this gateway ends: %s", error.message)

    async def beat(self) -> None:
        """Tells the others that this gateway is there, and does for all what one has to do."""
        await self._database.hold()
        if not await self._heartbeats.beat():
            logger.warning("this gateway gave no sign of life for too long; others may have taken its jobs over")
            await self._join()
        await self._registry.sync()
        # whoever is an owner by now joined before it became one, so it is among these
        alive = await self._heartbeats.alive()
        await self._adopt(alive)
        await self._registry.flush()
        now = asyncio.get_running_loop().time()
        # two may think so for a moment, and then both sweep: the second finds nothing
        if self._heartbeats.me == min(alive) and now - self._swept_at >= SWEEP_S:
            self._swept_at = now
            await self._sweep()

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        beat_at = loop.time()
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                if loop.time() >= beat_at:
                    beat_at = loop.time() + self._heartbeats.beat_s
                    await self.beat()
                else:
                    await self._registry.sync()
            except StorageError:
                # said in the log by the database; the store may be gone for a while
                await asyncio.sleep(self._heartbeats.beat_s)
            except Exception:
                logger.exception("following the other gateways failed")
                await asyncio.sleep(self._heartbeats.beat_s)

    async def _join(self) -> None:
        await self._heartbeats.join()
        self._registry.join_as(self._heartbeats.me)

    async def _adopt(self, alive: frozenset[str]) -> None:
        """Goes on with the jobs whose gateway is gone."""
        async for cocktail in paced(self._registry.catalog.unfinished(), every=500):
            if cocktail.owner in alive and (
                cocktail.owner != self._heartbeats.me or self._jobs.is_running(cocktail.uid)
            ):
                continue
            pool = self._pools.get(cocktail.pool_id)
            if (pool is None or not cocktail.options.fits(pool)) and len(alive) > 1:
                continue  # another gateway may have the pool as it was
            claimed = await self._registry.claim(cocktail.uid)
            if claimed is not None:
                await self._jobs.resume(claimed)
        async for cocktail in paced(self._registry.catalog.unreported(), every=500):
            if cocktail.owner not in alive or cocktail.owner == self._heartbeats.me:
                self._report(cocktail)
        for adopt in self._adopters:
            await adopt(self._heartbeats.me, alive)
