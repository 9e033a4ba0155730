"""Puts together all that lives as long as the app does, in order; what was begun ends in the opposite order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from cocktail_serve.batches.runner import BatchRunner
from cocktail_serve.batches.service import Batches
from cocktail_serve.batches.store import BatchStore
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.cocktails.cluster_loop import Sweep
from cocktail_serve.cocktails.experts import Experts
from cocktail_serve.cocktails.service import CocktailService
from cocktail_serve.config import Settings
from cocktail_serve.database.database import Database
from cocktail_serve.database.registry_file import registry_url
from cocktail_serve.engines import build_engine
from cocktail_serve.engines.base import AnyEngine, Engine
from cocktail_serve.finetuning.files import Files
from cocktail_serve.finetuning.jobs import JobStore
from cocktail_serve.finetuning.service import FineTuning
from cocktail_serve.gateway.authentication import Authenticator
from cocktail_serve.gateway.gateway import Gateway
from cocktail_serve.gateway.lifecycle import Lifecycle
from cocktail_serve.gateway.metrics import GatewayMetrics
from cocktail_serve.gateway.run_dir import own_run_dir, place_of, trim_cache
from cocktail_serve.library_process import LibraryProcess
from cocktail_serve.pool import Pool
from cocktail_serve.tenants.keys import DEFAULT_TENANT
from cocktail_serve.tenants.limits import Limiter
from cocktail_serve.tenants.store import TenantStore
from cocktail_serve.tenants.tenants_cache import TenantsCache
from cocktail_serve.usage.audit import AuditLog
from cocktail_serve.usage.ledger import Ledger
from cocktail_serve.usage.store import UsageStore

logger = logging.getLogger(__name__)


def open_pools(settings: Settings) -> dict[str, Pool]:
    """Opens all pools of a configuration: resolves sources, checks that their models can be mixed. Blocking.

    Raises:
        ClientError: a model is missing, unreadable or does not fit its base; names it.
    """
    with LibraryProcess() as libraries:
        return {
            config.id: libraries.call(open_pool, config, cache_dir=settings.store.cache_dir)
            for config in settings.pools
        }


@asynccontextmanager
async def assembled(
    settings: Settings,
    opened: Mapping[str, Pool] | None,
    built: Mapping[str, AnyEngine] | None,
    metrics: GatewayMetrics,
    lifecycle: Lifecycle,
) -> AsyncIterator[Gateway]:
    """The gateway, with all its parts running.

    Args:
        opened: pools that are open already; None: opened from the configuration.
        built: one engine for each pool, not started yet; None: built from the configuration.
    """
    async with AsyncExitStack() as stack:
        # changed when experts are added or removed: all that reads it is given this one mapping
        pools = dict(await asyncio.to_thread(open_pools, settings) if opened is None else opened)
        engines, place = _engines(settings, pools, built, stack)
        database = await _database(settings, stack)
        experts = await _experts(settings, database, pools, engines)
        for engine in engines.values():
            await engine.start()
        tenants = TenantStore(database)
        await _warn_if_open(settings, tenants)
        tenants_cache = await _tenants_cache(settings, tenants, stack)
        usage = UsageStore(database)
        ledger = _ledger(usage, stack)
        fine_tuning_jobs = JobStore(database)
        files = Files(database, limits_of=tenants_cache.limits_of)
        audit = AuditLog(database)
        parse_executor = stack.enter_context(ThreadPoolExecutor(1, "cocktail-parse"))
        batch_store = BatchStore(database, files)
        batches = Batches(batch_store, files, BatchRunner(batch_store, files, parse_executor))
        service = CocktailService(
            settings,
            pools,
            engines,
            database=database,
            limits_of=tenants_cache.limits_of,
            place=place,
            sweeps=_sweeps(settings, files, fine_tuning_jobs, batch_store, audit),
            change_hooks=[fine_tuning_jobs],
            adopters=[batches.runner.adopt],
            ledger=ledger,
        )
        for engine in engines.values():
            engine.name_recipes(partial(service.catalog.names_of_recipe, engine.pool.id))
        stack.push_async_callback(service.stop)
        await service.start()
        stack.push_async_callback(experts.stop)
        experts.start(service.catalog)
        await asyncio.to_thread(trim_cache, settings)
        yield Gateway(
            settings=settings,
            database=database,
            pools=pools,
            engines=engines,
            service=service,
            experts=experts,
            files=files,
            fine_tuning=FineTuning(settings, pools, service, files, fine_tuning_jobs, parse_executor),
            batches=batches,
            parse_executor=parse_executor,
            metrics=metrics,
            lifecycle=lifecycle,
            tenants=tenants,
            tenants_cache=tenants_cache,
            ledger=ledger,
            usage=usage,
            audit=audit,
            limiter=Limiter(tenants_cache.limits_of),
            authenticator=_authenticator(settings, tenants, tenants_cache),
        )


def _engines(
    settings: Settings, pools: Mapping[str, Pool], built: Mapping[str, AnyEngine] | None, stack: AsyncExitStack
) -> tuple[dict[str, AnyEngine], str | None]:
    """The engines, not started yet, and the name of the folder they write to; None where others built them."""
    place = None
    engines: dict[str, AnyEngine]
    if built is None:
        run_dir = own_run_dir(settings, stack)
        place = place_of(run_dir)
        engines = {pool.id: build_engine(pools[pool.id], pool, run_dir=run_dir) for pool in settings.pools}
    else:
        engines = dict(built)
    stack.push_async_callback(_stop_all, engines.values())
    return engines, place


async def _database(settings: Settings, stack: AsyncExitStack) -> Database:
    database = Database(stack.enter_context(registry_url(settings.store)))
    stack.push_async_callback(database.close)
    await database.open()
    return database


async def _experts(
    settings: Settings, database: Database, pools: dict[str, Pool], engines: Mapping[str, Engine]
) -> Experts:
    """The experts that were added while a server ran: in the pools before the engines start."""
    experts = Experts(
        database,
        pools,
        engines,
        roots=settings.server.expert_roots,
        cache_dir=settings.store.cache_dir,
    )
    await experts.load()
    return experts


async def _tenants_cache(settings: Settings, tenants: TenantStore, stack: AsyncExitStack) -> TenantsCache:
    cache = TenantsCache(settings.limits, tenants)
    stack.push_async_callback(cache.stop)
    await cache.start()
    return cache


async def _warn_if_open(settings: Settings, tenants: TenantStore) -> None:
    """Says so where there are keys and nobody needs one."""
    reason = settings.server.reason_open
    if reason and any(key.is_valid(time.time()) for key in await tenants.keys()):
        logger.warning(
            "tenants have keys, and who sends none is answered too, as %r (%s): set server.auth: required",
            DEFAULT_TENANT,
            reason,
        )


def _ledger(usage: UsageStore, stack: AsyncExitStack) -> Ledger:
    ledger = Ledger(usage)
    stack.push_async_callback(ledger.stop)
    ledger.start()
    return ledger


def _authenticator(settings: Settings, tenants: TenantStore, cache: TenantsCache) -> Authenticator:
    key = settings.admin_key
    return Authenticator(
        tenants,
        server=settings.server,
        admin_key=None if key is None else key.get_secret_value(),
        pools_of=cache.pools_of,
    )


def _sweeps(settings: Settings, files: Files, jobs: JobStore, batches: BatchStore, audit: AuditLog) -> list[Sweep]:
    retention = settings.store.retention
    sweeps: list[Sweep] = [files.sweep]
    for sweep, days in (
        (jobs.sweep, retention.jobs_days),
        (batches.sweep, retention.jobs_days),
        (audit.sweep, retention.audit_days),
    ):
        if days is not None:
            sweeps.append(partial(sweep, older_than_s=days * 86_400))
    return sweeps


async def _stop_all(engines: Iterable[Engine]) -> None:
    await asyncio.gather(*(engine.stop() for engine in engines))
