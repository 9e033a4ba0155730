"""Puts the app together: pools and engines opened, the service started, routes, errors and middlewares in place."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import cast

from fastapi import FastAPI
from filelock import FileLock, Timeout

import cocktail_serve
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.cocktails.experts import Experts
from cocktail_serve.cocktails.following import Sweep
from cocktail_serve.cocktails.request import CocktailBody
from cocktail_serve.cocktails.service import CocktailService
from cocktail_serve.config import Settings
from cocktail_serve.database.database import Database
from cocktail_serve.engines import build_engine
from cocktail_serve.engines.base import Engine, OperatedEngine
from cocktail_serve.engines.server import sweep_sockets
from cocktail_serve.errors import ConfigError
from cocktail_serve.finetuning.files import Files
from cocktail_serve.finetuning.jobs import JobStore
from cocktail_serve.finetuning.request import JobBody
from cocktail_serve.finetuning.service import FineTuning
from cocktail_serve.gateway.authentication import Authenticator
from cocktail_serve.gateway.direct_route import DirectRouting
from cocktail_serve.gateway.error_handlers import add_error_handlers
from cocktail_serve.gateway.lifecycle import Lifecycle
from cocktail_serve.gateway.metering import Meter
from cocktail_serve.gateway.metrics import GatewayMetrics
from cocktail_serve.gateway.middleware import BodyLimit, RequestBoundary
from cocktail_serve.gateway.openapi import add_openapi
from cocktail_serve.gateway.routes import (
    admin,
    cocktails,
    embeddings,
    files,
    fine_tuning,
    generation,
    models,
    operating,
    operations,
    reranking,
)
from cocktail_serve.gateway.routes import pools as pools_routes
from cocktail_serve.gateway.routes import usage as usage_routes
from cocktail_serve.gateway.schemas.admin import KeyBody, RotationBody, TenantBody
from cocktail_serve.gateway.schemas.cocktails import CurrentVersion
from cocktail_serve.gateway.schemas.embeddings import EmbeddingRequest
from cocktail_serve.gateway.schemas.files import FileUpload
from cocktail_serve.gateway.schemas.generation import ChatCompletionRequest, CompletionRequest
from cocktail_serve.gateway.schemas.operating import EngineBody, ExpertBody
from cocktail_serve.gateway.schemas.reranking import RerankRequest
from cocktail_serve.gateway.state import Gateway
from cocktail_serve.pool import Pool
from cocktail_serve.tenants.limit_book import LimitBook
from cocktail_serve.tenants.limits import Limiter
from cocktail_serve.tenants.store import TenantStore
from cocktail_serve.usage.audit import AuditLog
from cocktail_serve.usage.ledger import Ledger
from cocktail_serve.usage.store import UsageStore

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    settings: Settings, *, pools: Mapping[str, Pool] | None = None, engines: Mapping[str, Engine] | None = None
) -> FastAPI:
    """The gateway as an ASGI app. Engines start and stop with its lifespan.

    Args:
        pools: opened already; None: opened when the app starts, from the configuration.
        engines: one for each pool, not started yet; None: built from the configuration.

    Raises:
        ConfigError: a key is required and none is set, or no engine serves a pool.
    """
    settings.check_servable()
    if settings.server.requires_key and settings.admin_key is None:
        raise ConfigError(
            f"with server.auth {settings.server.auth!r} and server.host {settings.server.host!r} requests need a key, "
            "and none is set: set COCKTAIL_ADMIN_KEY, or listen on 127.0.0.1",
            param="server.auth",
        )
    metrics, lifecycle = GatewayMetrics(), Lifecycle()
    app = FastAPI(
        title="cocktail-serve",
        version=cocktail_serve.__version__,
        summary="Task models mixed from fine-tuned models you own, behind the OpenAI API.",
        lifespan=_lifespan(settings, pools, engines, metrics, lifecycle),
        redoc_url=None,
        redirect_slashes=False,  # a path that is not there gets the error that every other gets
    )
    for family in (
        generation,
        embeddings,
        reranking,
        models,
        cocktails,
        files,
        fine_tuning,
        usage_routes,
        pools_routes,
        admin,
        operating,
        operations,
    ):
        app.include_router(family.router)
    add_error_handlers(app)
    add_openapi(
        app,
        bodies=(
            ChatCompletionRequest,
            CompletionRequest,
            EmbeddingRequest,
            RerankRequest,
            CocktailBody,
            CurrentVersion,
            FileUpload,
            EngineBody,
            ExpertBody,
            JobBody,
            KeyBody,
            RotationBody,
            TenantBody,
        ),
    )
    # the last added is the outermost
    app.add_middleware(DirectRouting, routes=app.routes)
    app.add_middleware(BodyLimit, max_bytes=settings.server.max_request_bytes)
    app.add_middleware(RequestBoundary, metrics=metrics, lifecycle=lifecycle)
    app.state.lifecycle = lifecycle
    return app


def open_pools(settings: Settings) -> dict[str, Pool]:
    """Opens all pools of a configuration: resolves sources, checks that their models can be mixed. Blocking.

    Raises:
        ClientError: a model is missing, unreadable or does not fit its base; names it.
    """
    return {config.id: open_pool(config, cache_dir=settings.store.cache_dir) for config in settings.pools}


def _lifespan(
    settings: Settings,
    opened: Mapping[str, Pool] | None,
    built: Mapping[str, Engine] | None,
    metrics: GatewayMetrics,
    lifecycle: Lifecycle,
) -> Lifespan:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            # changed when experts are added or removed: all that reads it is given this one mapping
            pools = dict(await asyncio.to_thread(open_pools, settings) if opened is None else opened)
            place = None
            if built is None:
                run_dir = _own_run_dir(settings, stack)
                place = place_of(run_dir)
                engines = {pool.id: build_engine(pools[pool.id], pool, run_dir=run_dir) for pool in settings.pools}
            else:
                engines = dict(built)
            stack.push_async_callback(_stop_all, engines.values())
            database = Database(settings.store.database_url)
            stack.push_async_callback(database.close)
            await database.open()
            experts = Experts(
                database,
                pools,
                cast("Mapping[str, OperatedEngine]", engines),
                roots=settings.server.expert_roots,
                cache_dir=settings.store.cache_dir,
            )
            await experts.load()
            for pool_id, engine in engines.items():
                await engine.start()
                metrics.watch_engine(pool_id, engine)
            tenants = TenantStore(database)
            limits = LimitBook(settings.limits, tenants)
            stack.push_async_callback(limits.stop)
            await limits.start()
            usage = UsageStore(database)
            ledger = Ledger(usage)
            stack.push_async_callback(ledger.stop)
            ledger.start()
            jobs = JobStore(database)
            files = Files(database, limits_of=limits.of)
            audit = AuditLog(database)
            service = CocktailService(
                settings,
                pools,
                engines,
                database=database,
                limits_of=limits.of,
                place=place,
                sweeps=_sweeps(settings, files, jobs, audit),
                witnesses=[jobs],
                ledger=ledger,
            )
            stack.push_async_callback(service.stop)
            await service.start()
            parsing = stack.enter_context(ThreadPoolExecutor(1, "cocktail-parse"))
            stack.push_async_callback(experts.stop)
            experts.start(service)
            admin_key = settings.admin_key
            gateway = Gateway(
                settings=settings,
                pools=pools,
                engines=engines,
                service=service,
                experts=experts,
                files=files,
                fine_tuning=FineTuning(settings, pools, service, files, jobs, parsing),
                parsing=parsing,
                metrics=metrics,
                lifecycle=lifecycle,
                tenants=tenants,
                limits=limits,
                ledger=ledger,
                usage=usage,
                audit=audit,
                meter=Meter(Limiter(limits.of), ledger, metrics),
                authenticator=Authenticator(
                    tenants,
                    required=settings.server.requires_key,
                    admin_key=None if admin_key is None else admin_key.get_secret_value(),
                ),
            )
            app.state.gateway = gateway
            yield

    return lifespan


def _sweeps(settings: Settings, files: Files, jobs: JobStore, audit: AuditLog) -> list[Sweep]:
    retention = settings.store.retention
    sweeps: list[Sweep] = [files.sweep]
    for sweep, days in ((jobs.sweep, retention.jobs_days), (audit.sweep, retention.audit_days)):
        if days is not None:
            sweeps.append(partial(sweep, older_than_s=days * 86_400))
    return sweeps


async def _stop_all(engines: Iterable[Engine]) -> None:
    await asyncio.gather(*(engine.stop() for engine in engines))


def _own_run_dir(settings: Settings, stack: AsyncExitStack) -> Path:
    """The folder that engines write to: this process's alone. It outlives them: their logs tell why they ended.

    Raises:
        ConfigError: another server uses the folder.
    """
    run_dir = settings.store.cache_dir / "engines"
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(run_dir / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another server keeps its engines' files in {run_dir}; give each server a cache_dir of its own",
            param="store.cache_dir",
        ) from None
    stack.callback(lock.release)
    sweep_sockets(run_dir)
    return run_dir


def place_of(run_dir: Path) -> str:
    """The name of a folder that one process at a time holds, made on first use; it moves with the folder."""
    file = run_dir / "place"
    if not file.exists():
        temporary = run_dir / "place.tmp"
        temporary.write_text(uuid.uuid4().hex)
        temporary.replace(file)
    return file.read_text()
