"""Finds out in the background what ready cocktails can be expected to do: one at a time on each engine.

Each fold's mixture is a background turn of its own, so traffic goes first and other jobs in between. What is pending
when the process ends is made in the next one. Inline cocktails are looked into when somebody asks for the report.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping

from cocktail_serve.cocktails.cocktail import Cocktail, CrossValidation
from cocktail_serve.cocktails.cross_validation import PENDING, no_findings
from cocktail_serve.cocktails.engine_use import EngineUse
from cocktail_serve.cocktails.registry import Registry
from cocktail_serve.cocktails.scores import Retrying, ScoreScope
from cocktail_serve.cocktails.store import Store
from cocktail_serve.cocktails.tasks import BackgroundTasks
from cocktail_serve.cocktails.weighting_runner import WeightingRunner
from cocktail_serve.engines.base import AnyEngine
from cocktail_serve.engines.engine_time import EngineTimeTotal
from cocktail_serve.errors import CapacityError, CocktailError, StorageError

logger = logging.getLogger(__name__)

PAUSE_S = 0.5
"""Between a cocktail that is ready and its report: whoever waited for it asks it first."""


class Reports:
    """The running investigations, one task each.

    Args:
        retry: how often a call to an engine is tried.
        engine_use: counts what reports take of the engines.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        runner: WeightingRunner,
        engines: Mapping[str, AnyEngine],
        *,
        retry: Retrying,
        engine_use: EngineUse,
    ) -> None:
        self._registry = registry
        self._store = store
        self._runner = runner
        self._engines = engines
        self._retry = retry
        self._engine_use = engine_use
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks = BackgroundTasks("report")

    def submit(self, cocktail: Cocktail, *, pause_s: float = 0.0) -> None:
        """Begins with a ready cocktail so many seconds from now, unless it has begun."""
        if cocktail.uid not in self._tasks:
            self._tasks.start(cocktail, self._run(cocktail, pause_s))

    async def ask(self, cocktail: Cocktail) -> Cocktail:
        """A ready cocktail with its cross-validation, pending at least: begins with one that was never looked into."""
        if cocktail.status != "ready" or (
            cocktail.cross_validation is not None and cocktail.cross_validation.status == "ready"
        ):
            return cocktail
        if cocktail.cross_validation is None:
            cocktail = await self._registry.keep_cross_validation(cocktail.uid, PENDING) or cocktail
            self.submit(cocktail)
        return cocktail

    def cancel(self, uid: str) -> None:
        """Ends the investigation of a cocktail that is deleted."""
        self._tasks.cancel(uid)

    async def stop(self) -> None:
        """Ends all where they are: they stay pending on disk."""
        await self._tasks.stop()

    async def _run(self, cocktail: Cocktail, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        async with self._locks[cocktail.pool_id]:
            try:
                with self._engine_use.counted_for(cocktail) as spent:
                    found = await self._cross_validate(cocktail, spent)
                await self._registry.keep_cross_validation(cocktail.uid, found)
            except CapacityError:
                logger.warning("the report of %s waits: its engine is not available", cocktail.id)
            except StorageError:
                logger.exception("the report of %s could not be kept", cocktail.id)
            except Exception:
                # a fault of ours in a report must not end the server; the report stays pending
                logger.exception("the report of %s failed by a fault of the server", cocktail.id)

    async def _cross_validate(self, cocktail: Cocktail, spent: EngineTimeTotal) -> CrossValidation:
        engine = self._engines.get(cocktail.pool_id)
        if engine is None or not cocktail.options.fits(engine.pool):
            return no_findings("the pool's models are no longer those it was made from")
        try:
            return await self._runner.cross_validate(
                engine,
                cocktail.options,
                cocktail.chosen,
                await self._store.example_set(cocktail),
                ScoreScope(tenant=cocktail.tenant, uid=cocktail.uid, spent=spent, retry=self._retry),
            )
        except CapacityError:
            raise
        except CocktailError as error:
            return no_findings(error.message)
