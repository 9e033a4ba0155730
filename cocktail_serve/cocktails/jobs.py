"""The job behind a cocktail: queued, scoring, mixing, ready. Each step is on disk before anybody hears of it."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, Unpack

from cocktail_serve.cocktails.cocktail import Cocktail, CocktailChanges, Failure
from cocktail_serve.cocktails.cross_validation import PENDING
from cocktail_serve.cocktails.engine_use import EngineUse
from cocktail_serve.cocktails.options import CocktailOptions
from cocktail_serve.cocktails.registry import Registry
from cocktail_serve.cocktails.reports import PAUSE_S as REPORT_PAUSE_S
from cocktail_serve.cocktails.reports import Reports
from cocktail_serve.cocktails.scores import ScoreScope
from cocktail_serve.cocktails.store import Store
from cocktail_serve.cocktails.tasks import BackgroundTasks
from cocktail_serve.cocktails.warnings import warnings_of_losses
from cocktail_serve.cocktails.weighting_runner import WeightingRunner
from cocktail_serve.cocktails.weighting_steps import recipe_of
from cocktail_serve.engines.base import AnyEngine, Engine
from cocktail_serve.engines.engine_time import EngineTimeTotal
from cocktail_serve.errors import (
    CapacityError,
    CocktailError,
    ConflictError,
    InvalidRequestError,
    ServerError,
    StorageError,
    params_named,
)
from cocktail_serve.examples import ExampleSet
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe
from cocktail_serve.weighting.candidates import Candidate, mean

logger = logging.getLogger(__name__)

SCORED = 0.8
MIXED = 0.9
"""Progress once all models are scored, and once the mixture is in the engine; the rest is its own loss."""

PROGRESS_EVERY_S = 0.2
"""Progress alone is written no more often: each write is a transaction, and what is left out comes with the next."""

MAX_RUNNING = 32
"""Jobs of one pool at work at once; further ones stay queued. Enough for an engine to join their visits to an expert,
and apart by pool, so that an engine that is down holds up nobody else's jobs."""

_T = TypeVar("_T")
_S = TypeVar("_S")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a job bears with an engine that is down, busy or failing. Nobody's socket waits for it.

    Attributes:
        for_capacity_s: how long it waits for an engine that is starting, restarting or busy; seconds.
        for_store_s: how long it waits for a store that is gone or full; seconds.
        engine_failures: calls that may fail before the job does: an example may be what kills the engine.
        first_delay_s: pause after the first failure, doubled after each up to `max_delay_s`.
    """

    for_capacity_s: float = 900.0
    for_store_s: float = 300.0
    engine_failures: int = 3
    first_delay_s: float = 0.2
    max_delay_s: float = 10.0

    async def __call__(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """The result of a call, tried again while its error is retryable and time is left."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        failures = 0
        delay = self.first_delay_s
        while True:
            try:
                return await call()
            except (CapacityError, StorageError) as error:
                most_s = self.for_store_s if isinstance(error, StorageError) else self.for_capacity_s
                if loop.time() + delay > started + most_s:
                    raise
            except CocktailError as error:
                failures += 1
                if not error.retryable or failures >= self.engine_failures:
                    raise
                logger.warning("an engine call of a job failed (%d of %d)", failures, self.engine_failures)
            await asyncio.sleep(delay)
            delay = min(2 * delay, self.max_delay_s)


async def check_example_sets(engine: Engine, examples: ExampleSet | None, validation: ExampleSet | None) -> None:
    """Raises what would fail later, as `Engine.check_examples` does; `param` says which of the two."""
    if examples is not None:
        await engine.check_examples(examples)
    if validation is None:
        return
    with params_named(lambda _: "validation_examples"):
        await engine.check_examples(validation)


class _LostError(Exception):
    """The cocktail went while its job ran, or became another gateway's: there is nothing left to do here."""


class Jobs:
    """The running jobs, one task each. They end with the process and go on in the next one, or in another gateway.

    Args:
        reports: begun with a cocktail that is ready; None: when somebody asks for its report.
        engine_use: counts what jobs take of the engines.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        runner: WeightingRunner,
        pools: Mapping[str, Pool],
        engines: Mapping[str, AnyEngine],
        *,
        retry_policy: RetryPolicy,
        reports: Reports | None,
        engine_use: EngineUse,
    ) -> None:
        self._registry = registry
        self._store = store
        self._runner = runner
        self._pools = pools
        self._engines = engines
        self._retry = retry_policy
        self._reports = reports
        self._engine_use = engine_use
        self._running: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(MAX_RUNNING))
        self._tasks = BackgroundTasks("cocktail")

    def submit(self, cocktail: Cocktail, examples: ExampleSet | None, validation: ExampleSet | None) -> None:
        """Starts the job of a cocktail that is not final."""
        previous = self._tasks.cancel(cocktail.uid)
        self._tasks.start(cocktail, self._run(previous, cocktail, examples, validation))

    async def resume(self, cocktail: Cocktail) -> None:
        """Goes on with a job that another process left; one whose examples no longer read ends as failed."""
        try:
            examples = await self._store.example_set(cocktail)
            validation = await self._store.example_set(cocktail, validation=True)
        except InvalidRequestError as error:
            await self._fail(cocktail, error)
        else:
            self.submit(cocktail, examples, validation)

    def is_running(self, uid: str) -> bool:
        """Whether there is a job for a cocktail here."""
        return uid in self._tasks

    def changed_remotely(self, cocktail: Cocktail) -> None:
        """Ends the job of a cocktail that another gateway ended, or took over."""
        if cocktail.is_final or self._tasks.epoch_of(cocktail.uid) != cocktail.epoch:
            self.cancel(cocktail.uid)

    def cancel(self, uid: str) -> None:
        """Ends a job, if there is one; its cocktail is deleted or cancelled already."""
        self._tasks.cancel(uid)

    async def stop(self) -> None:
        """Ends all jobs where they are: their cocktails stay unfinished on disk."""
        await self._tasks.stop()

    async def _run(
        self,
        previous: asyncio.Task[None] | None,
        cocktail: Cocktail,
        examples: ExampleSet | None,
        validation: ExampleSet | None,
    ) -> None:
        """A job, once the one that was cancelled before it has left its engine."""
        if previous is not None:
            await asyncio.wait([previous])
        async with self._running[cocktail.pool_id]:
            try:
                with self._engine_use.counted_for(cocktail) as spent:
                    await self._make(cocktail, examples, validation, spent)
            except _LostError:
                return
            except CocktailError as error:
                logger.warning("cocktail %s failed: %s", cocktail.id, error.code)
                await self._fail(cocktail, error)
            except Exception:
                # a fault of ours in one job must neither end the server nor leave callers waiting
                logger.exception("cocktail %s failed by a fault of the server", cocktail.id)
                await self._fail(cocktail, ServerError("the job failed by a fault of the server; its log says more"))

    async def _make(
        self, cocktail: Cocktail, examples: ExampleSet | None, validation: ExampleSet | None, spent: EngineTimeTotal
    ) -> None:
        options = cocktail.options
        pool = self._pools.get(cocktail.pool_id)
        if pool is None or not options.fits(pool):
            raise ConflictError(
                f"pool {cocktail.pool_id!r} changed before the cocktail was ready; make it again", code="pool_changed"
            )
        engine = self._engines[pool.id]
        score_scope = ScoreScope(tenant=cocktail.tenant, uid=cocktail.uid, spent=spent, retry=self._retry)
        if examples is not None:
            await self._update(cocktail, status="scoring", progress=0.0)
        await self._retry(lambda: check_example_sets(engine, examples, validation))

        clock = asyncio.get_running_loop().time
        written_at = clock()

        async def on_progress(losses: Mapping[str, float], share: float) -> None:
            nonlocal written_at
            if share < 1.0 and clock() - written_at >= PROGRESS_EVERY_S:
                written_at = clock()
                await self._update(cocktail, losses=losses, progress=SCORED * share)

        weighting = await self._runner.weigh(engine, options, examples, score_scope, on_progress=on_progress)
        recipe = recipe_of(options, pool, weighting.merging_weights, dtype=engine.dtype)
        changes: CocktailChanges = {
            "status": "mixing",
            "progress": SCORED,
            "losses": weighting.losses,
            "merging_weights": weighting.merging_weights,
            "entropy": weighting.entropy,
            "recipe": recipe,
            "candidates": weighting.candidates,
        }
        if pool.mode == "merged":
            await self._update(cocktail, **changes)
            await self._retry(lambda: spent.of(engine.mix_ahead(recipe)))
            await self._update(cocktail, progress=MIXED)
            mixed_loss = await self._mixed_loss(engine, recipe, examples, score_scope)
        elif examples is None:  # nothing is left to do: it is ready with the next write
            await self._retry(lambda: spent.of(engine.mix_ahead(recipe)))
            mixed_loss = None
        else:  # nothing is mixed: the engine need not wait for the write
            mixed_loss, _ = await _side_by_side(
                self._mixed_loss(engine, recipe, examples, score_scope), self._update(cocktail, **changes)
            )
        of_losses = warnings_of_losses(options, weighting.losses, weighting.merging_weights, mixed_loss)
        changes |= {
            "status": "ready",
            "progress": 1.0,
            "mixed_loss": mixed_loss,
            "validation_loss": await self._mixed_loss(engine, recipe, validation, score_scope),
            "candidates": _judged(options, weighting.candidates, mixed_loss),
            "warnings": (*cocktail.warnings, *of_losses),
            "cross_validation": None if cocktail.inline or self._reports is None else PENDING,
            "ready_at": self._registry.catalog.now(),
        }
        ready = await self._update(cocktail, **changes)
        if self._reports is not None and not cocktail.inline:
            self._reports.submit(ready, pause_s=REPORT_PAUSE_S)

    async def _mixed_loss(
        self, engine: AnyEngine, recipe: Recipe, examples: ExampleSet | None, score_scope: ScoreScope
    ) -> float | None:
        if examples is None:
            return None
        return mean(await self._runner.scores.mixture_losses(engine, recipe, examples, score_scope))

    async def _update(self, cocktail: Cocktail, **changes: Unpack[CocktailChanges]) -> Cocktail:
        update = self._registry.update
        updated = await self._retry(lambda: update(cocktail.uid, of_epoch=cocktail.epoch, **changes))
        if updated is None:
            raise _LostError
        return updated

    async def _fail(self, cocktail: Cocktail, error: CocktailError) -> None:
        failure = Failure.of(error)
        try:
            await self._registry.update(cocktail.uid, of_epoch=cocktail.epoch, status="failed", error=failure)
        except StorageError:
            logger.exception("the failure of cocktail %s could not be kept", cocktail.id)
            self._registry.fail_in_memory(cocktail.uid, failure)


async def _side_by_side(one: Coroutine[Any, Any, _T], other: Coroutine[Any, Any, _S]) -> tuple[_T, _S]:
    """Both results; where one fails, the other is ended, and the error is that one's own."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = group.create_task(one), group.create_task(other)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return tasks[0].result(), tasks[1].result()


def _judged(
    options: CocktailOptions, candidates: tuple[Candidate, ...], mixed_loss: float | None
) -> tuple[Candidate, ...]:
    """Where nothing was searched, the one candidate is the mixture, and its loss the mixture's."""
    if options.searches:
        return candidates
    return tuple(replace(candidate, loss=mixed_loss) for candidate in candidates)
