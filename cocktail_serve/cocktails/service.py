"""The one door to cocktails: made, followed, pinned and deleted, each tenant its own; found in its `catalog`."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from cocktail_serve.cocktails.catalog import Catalog
from cocktail_serve.cocktails.cluster_loop import Adopt, ClusterLoop, Sweep
from cocktail_serve.cocktails.cocktail import Cocktail, ModelEntry, ServedModel, WeightingResult
from cocktail_serve.cocktails.engine_use import EngineUse
from cocktail_serve.cocktails.gateway_heartbeats import GatewayHeartbeats
from cocktail_serve.cocktails.jobs import Jobs, RetryPolicy, check_example_sets
from cocktail_serve.cocktails.options import CocktailRequest
from cocktail_serve.cocktails.registry import Registry
from cocktail_serve.cocktails.reports import Reports
from cocktail_serve.cocktails.score_store import ScoreStore
from cocktail_serve.cocktails.scores import Scores, ScoreScope, score_items
from cocktail_serve.cocktails.store import ChangeHook, ExtraWrites, Store
from cocktail_serve.cocktails.warnings import warnings_of_request
from cocktail_serve.cocktails.weighting_runner import WeightingRunner
from cocktail_serve.config import Settings
from cocktail_serve.database.database import Database
from cocktail_serve.database.shield import Shield
from cocktail_serve.engines.base import AnyEngine
from cocktail_serve.errors import CapacityError, ModelNotReadyError, NotFoundError, StorageError
from cocktail_serve.pool import Pool
from cocktail_serve.tenants.limits import LimitsOf, unlimited
from cocktail_serve.usage.actor import SERVER, Actor
from cocktail_serve.usage.ledger import Ledger

CHECK_TIMEOUT_S = 5.0
"""How long a creation waits to hear that its examples fit the model's context; after that its job hears it."""

REMOVALS_KEPT = 10_000
"""Changes for which the store knows what was removed; a gateway further behind reads everything anew."""

INLINE_TIMEOUT_S = 60.0
"""How long a request with an inline cocktail waits for it before it is told to come again."""


class CocktailService:
    """Cocktails of all tenants over the operator's pools.

    Args:
        pools: opened pools by id.
        engines: the engine of each pool, by the same ids; the service neither starts nor stops them.
        database: open while the service runs; the service neither opens nor closes it.
        limits_of: limits of a tenant.
        retry_policy: how long jobs bear with failing engines.
        change_hooks: write down what changes of cocktails mean elsewhere.
        adopters: as of `ClusterLoop`.
        ledger: counts what jobs use; None: nobody does.

    Attributes:
        catalog: which cocktails and models there are, to read: what is in memory, and other gateways may have more.
    """

    def __init__(
        self,
        settings: Settings,
        pools: Mapping[str, Pool],
        engines: Mapping[str, AnyEngine],
        *,
        database: Database,
        limits_of: LimitsOf = unlimited,
        retry_policy: RetryPolicy | None = None,
        place: str | None = None,
        sweeps: Sequence[Sweep] = (),
        change_hooks: Sequence[ChangeHook] = (),
        adopters: Sequence[Adopt] = (),
        ledger: Ledger | None = None,
    ) -> None:
        self._store = Store(database, change_hooks=change_hooks)
        self.catalog = Catalog(pools, {pool_id: engine.dtype for pool_id, engine in engines.items()})
        self._registry = Registry(
            self.catalog,
            self._store,
            max_inline=settings.max_inline_cocktails,
            on_change=self._changed,  # first called by `start`, once jobs and reports are there
        )
        self._engine_use = EngineUse(ledger)
        self._settings = settings
        self._pools = pools
        self._engines = engines
        self._limits_of = limits_of
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cocktail-scores")
        scores = Scores(
            ScoreStore(database), self._executor, truncate={pool.id: pool.truncate for pool in settings.pools}
        )
        self._runner = WeightingRunner(scores, self._executor, self.catalog)
        retry_policy = retry_policy or RetryPolicy()
        self._reports = Reports(
            self._registry, self._store, self._runner, engines, retry=retry_policy, engine_use=self._engine_use
        )
        self._jobs = Jobs(
            self._registry,
            self._store,
            self._runner,
            pools,
            engines,
            retry_policy=retry_policy,
            reports=self._reports if settings.reports else None,
            engine_use=self._engine_use,
        )
        self._shield = Shield()
        self._sweeps = sweeps
        self._cluster_loop = ClusterLoop(
            database,
            GatewayHeartbeats(database, place=place, lease_s=settings.store.lease_s),
            self._registry,
            self._jobs,
            pools,
            report=self._reports.submit,
            sweep=self._sweep,
            poll_s=settings.store.poll_s,
            adopters=adopters,
        )

    async def start(self) -> None:
        """Reads the registry, goes on with the jobs that nobody works on, and follows what other gateways do.

        Raises:
            StorageError: the registry cannot be read.
        """
        await self._cluster_loop.start()

    async def stop(self) -> None:
        """Ends jobs where they are; engines are not touched. May be called twice."""
        await self._cluster_loop.pause()
        await self._shield.until_done()
        await self._jobs.stop()
        await self._reports.stop()
        await self._cluster_loop.leave()
        self._executor.shutdown()

    async def create(
        self,
        tenant: str,
        request: CocktailRequest,
        *,
        actor: Actor = SERVER,
        extra_writes: ExtraWrites | None = None,
    ) -> tuple[Cocktail, bool]:
        """Makes a cocktail, or finds the one that the same request made.

        The version found becomes current (if no pin stands). One that failed or was cancelled is tried again, and
        counts as new.

        Args:
            actor: who asks for it: what its job uses is counted under the actor's key.
            extra_writes: writes rows of its own in the transaction that this is done in; both are there or neither.

        Returns:
            A snapshot, and whether the version existed. It is durable; follow it with `wait`.

        Raises:
            ContextLengthError: an example is longer than the model's context; nothing is kept.
            ConflictError: another request has the same id.
            QuotaExceededError, RateLimitError: over a limit of the tenant; nothing is kept.
            StorageError: nothing was kept.
        """
        known = self.catalog.find_version(
            tenant, request
        )  # a guess: examples are checked before the registry is locked
        if known is None or known.cocktail.status in ("failed", "cancelled"):
            await self._check_examples(request)
        return await self._shield.run(self._create(tenant, request, actor, extra_writes))

    async def find_served_model(
        self, tenant: str, model_id: str, *, visible: Collection[str] | None = None
    ) -> ServedModel:
        """As `Catalog.resolve`, and where that finds nothing to serve, with what another gateway has made just now.

        Raises:
            StorageError: it is not known here, and the store cannot be asked.
        """
        try:
            return self.catalog.resolve(tenant, model_id, visible=visible)
        except (NotFoundError, ModelNotReadyError):
            await self._registry.sync()
        return self.catalog.resolve(tenant, model_id, visible=visible)

    async def find_model_entry(self, tenant: str, model_id: str) -> ModelEntry | None:
        """A line of the model list, though another gateway has made it just now; None: there is none.

        Raises:
            StorageError: as `find_served_model`.
        """
        entry = self.catalog.models(tenant).get(model_id)
        if entry is None:
            await self._registry.sync()
            entry = self.catalog.models(tenant).get(model_id)
        return entry

    async def find_cocktail(self, tenant: str, ref: str) -> Cocktail:
        """As `Catalog.get`, with what other gateways have done just now.

        Raises:
            StorageError: it is not known here, and the store cannot be asked.
        """
        try:
            await self._registry.sync()
        except StorageError:
            with suppress(NotFoundError):
                return self.catalog.get(tenant, ref)
            raise
        return self.catalog.get(tenant, ref)

    async def examples(self, tenant: str, ref: str) -> Sequence[Mapping[str, Any]]:
        """The examples a cocktail was made from, as JSON rows; empty where it was made without."""
        return await self._store.examples((await self.find_cocktail(tenant, ref)).uid)

    async def wait(self, tenant: str, ref: str, timeout_s: float) -> Cocktail:
        """The snapshot at the moment it becomes ready, failed or cancelled, or the one after `timeout_s`.

        Raises:
            NotFoundError: unknown, or another tenant's.
        """
        cocktail = self.catalog.get(tenant, ref)
        ended = await self.catalog.until(cocktail.uid, lambda now: now.is_final, timeout_s)
        return ended or replace(cocktail, status="cancelled", current=False)

    async def wait_for_change(self, tenant: str, ref: str, timeout_s: float) -> Cocktail:
        """The snapshot at the moment its status or progress changes, or the one after `timeout_s`.

        One that is ready, failed or cancelled changes no more by itself, and is not waited for.

        Raises:
            NotFoundError: unknown, another tenant's, or deleted meanwhile.
            StorageError: as `find_cocktail`.
        """
        before = await self.find_cocktail(tenant, ref)

        def has_changed(now: Cocktail) -> bool:
            return now.is_final or (now.status, now.progress) != (before.status, before.progress)

        changed = await self.catalog.until(before.uid, has_changed, timeout_s)
        if changed is None:
            raise self.catalog.no_cocktail(tenant, ref)
        return changed

    async def dry_run(self, tenant: str, request: CocktailRequest, *, actor: Actor = SERVER) -> WeightingResult:
        """Losses and weights only. Kept scores are used, but nothing is kept: no deletion could ever purge it.

        Raises:
            CapacityError, EngineError: from the engine, at once.
            RateLimitError: as many jobs of the tenant as may be have not ended.
        """
        async with self._registry.dry_run(tenant, self._limits_of(tenant)):
            await self._check_examples(request)
            pool_id = request.options.pool
            with self._engine_use.counted(tenant, actor.key_id, model=pool_id, pool_id=pool_id) as spent:
                score_scope = ScoreScope(tenant=tenant, uid=None, spent=spent)
                return await self._runner.weigh(self._engines[pool_id], request.options, request.examples, score_scope)

    async def inline(
        self,
        tenant: str,
        request: CocktailRequest,
        *,
        actor: Actor = SERVER,
        timeout_s: float = INLINE_TIMEOUT_S,
    ) -> ServedModel:
        """What a request with a `cocktail` of its own is answered by: mixed now, or found by digest.

        Raises:
            ModelNotReadyError: not ready within `timeout_s`; its job goes on, a retry finds it.
            CocktailError: why its job failed.
        """
        known = self.catalog.find_version(tenant, request)
        if known is not None and known.cocktail.status == "ready":
            return self.catalog.resolve(tenant, known.cocktail.id)
        created, _ = await self.create(tenant, request, actor=actor)
        made = await self.wait(tenant, created.id, timeout_s)
        if made.status == "failed" and made.error is not None:
            raise made.error.exception()
        # from the snapshot: under load the least recently used may be gone again by now
        return self.catalog.pool_models.served_model(made)

    async def report(self, tenant: str, ref: str) -> Cocktail:
        """As `find_cocktail`; of a ready cocktail the cross-validation is there or in the making.

        Raises:
            NotFoundError: unknown, or another tenant's.
            StorageError: as `find_cocktail`.
        """
        return await self._shield.run(self._reports.ask(await self.find_cocktail(tenant, ref)))

    async def set_current(self, tenant: str, name: str, ref: str | None, *, actor: Actor = SERVER) -> Cocktail:
        """Pins a name to a ready version; None removes the pin. Returns what the name means then.

        Raises:
            NotFoundError: no such name, or no such version of it.
            ConflictError: the version is not ready.
        """
        return await self._shield.run(self._registry.pin(tenant, name, ref, actor=actor))

    async def cancel(self, tenant: str, ref: str) -> Cocktail:
        """Ends an unfinished job and keeps the cocktail as cancelled; leaves a finished one as it is."""
        return await self._shield.run(self._cancel(await self.find_cocktail(tenant, ref)))

    async def delete(self, tenant: str, ref: str, *, actor: Actor = SERVER) -> Sequence[Cocktail]:
        """Deletes a version, or all versions of a name, with their examples and scores.

        New calls find nothing from here on, those in flight finish, an unfinished job is cancelled.

        Returns:
            The last snapshots.

        Raises:
            NotFoundError: unknown, or another tenant's.
            PermissionDeniedError: a pool or an expert.
        """
        return await self._shield.run(self._registry.remove(tenant, ref, actor=actor))

    async def _create(
        self, tenant: str, request: CocktailRequest, actor: Actor, extra_writes: ExtraWrites | None
    ) -> tuple[Cocktail, bool]:
        pool = self._pools[request.options.pool]
        items = score_items(request.examples, pool.kind) + score_items(request.validation, pool.kind)
        cocktail, outcome = await self._registry.find_or_add(
            tenant,
            request,
            score_items=items,
            warnings=warnings_of_request(request, pool),
            limits=self._limits_of(tenant),
            actor=actor,
            extra_writes=extra_writes,
        )
        if outcome != "existing":
            self._jobs.submit(cocktail, request.examples, request.validation)
        return cocktail, outcome == "existing"

    async def _sweep(self) -> None:
        """Removes what has been kept as long as `store.retention` says."""
        await self._store.forget_removals(keep=REMOVALS_KEPT)
        days = self._settings.store.retention.failed_days
        if days is not None:
            await self._registry.remove_failed(older_than_s=days * 86_400)
        for sweep in self._sweeps:
            await sweep()

    def _changed(self, changed: Sequence[Cocktail], removed: Sequence[Cocktail]) -> None:
        for cocktail in changed:
            self._jobs.changed_remotely(cocktail)
        for cocktail in removed:
            self._jobs.cancel(cocktail.uid)
            self._reports.cancel(cocktail.uid)
            engine = self._engines.get(cocktail.pool_id)
            if engine is None or cocktail.recipe is None:
                continue
            if not self.catalog.uses(cocktail.pool_id, cocktail.recipe.digest):
                engine.forget(cocktail.recipe.digest)

    async def _cancel(self, cocktail: Cocktail) -> Cocktail:
        cancelled = await self._registry.update(cocktail.uid, status="cancelled")
        self._jobs.cancel(cocktail.uid)
        return cancelled or self.catalog.by_uid(cocktail.uid) or cocktail

    async def _check_examples(self, request: CocktailRequest) -> None:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await check_example_sets(self._engines[request.options.pool], request.examples, request.validation)
        except (CapacityError, TimeoutError):
            return  # an engine that is still starting says it later, to the job
