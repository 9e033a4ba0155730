"""The app: routes, errors, documentation and middlewares around what `assembly` puts together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

import cocktail_serve
from cocktail_serve.config import Settings
from cocktail_serve.engines.base import AnyEngine
from cocktail_serve.gateway.assembly import assembled
from cocktail_serve.gateway.batch_lines import ask_line
from cocktail_serve.gateway.direct_route import DirectRouting
from cocktail_serve.gateway.error_handlers import add_error_handlers
from cocktail_serve.gateway.lifecycle import Lifecycle
from cocktail_serve.gateway.metrics import GatewayMetrics
from cocktail_serve.gateway.middleware import BodyLimit, ContentDecoding, HeadAsGet, RequestBoundary
from cocktail_serve.gateway.openapi import add_openapi
from cocktail_serve.gateway.routes import (
    admin,
    batches,
    cocktails,
    decisions,
    docs_page,
    embeddings,
    files,
    fine_tuning,
    generation,
    models,
    probes,
    reranking,
    responses,
    tokenization,
)
from cocktail_serve.gateway.routes import engines as engines_routes
from cocktail_serve.gateway.routes import pools as pools_routes
from cocktail_serve.gateway.routes import usage as usage_routes
from cocktail_serve.pool import Pool

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    settings: Settings,
    *,
    pools: Mapping[str, Pool] | None = None,
    engines: Mapping[str, AnyEngine] | None = None,
    lifecycle: Lifecycle | None = None,
) -> FastAPI:
    """The gateway as an ASGI app. Engines start and stop with its lifespan.

    Args:
        pools: opened already; None: opened when the app starts, from the configuration.
        engines: one for each pool, not started yet; None: built from the configuration.
        lifecycle: of the server around it; None: one of its own.

    Raises:
        ConfigError: a key is required and none is set, or no engine serves a pool.
    """
    settings.check_servable()
    metrics, lifecycle = GatewayMetrics(), lifecycle or Lifecycle()
    app = FastAPI(
        title="cocktail-serve",
        version=cocktail_serve.__version__,
        summary="Task models mixed from fine-tuned models you own, behind the OpenAI API.",
        lifespan=_lifespan(settings, pools, engines, metrics, lifecycle),
        docs_url=None,  # `docs_page`, which asks no other host
        redoc_url=None,
        redirect_slashes=False,  # a path that is not there gets the error that every other gets
    )
    for family in (
        generation,
        responses,
        decisions,
        embeddings,
        reranking,
        tokenization,
        models,
        cocktails,
        files,
        fine_tuning,
        batches,
        usage_routes,
        pools_routes,
        admin,
        engines_routes,
        probes,
        docs_page,
    ):
        app.include_router(family.router)
    app.include_router(responses.stored)
    add_error_handlers(app)
    add_openapi(app)
    # the last added is the outermost
    app.add_middleware(HeadAsGet)
    app.add_middleware(DirectRouting, routes=app.routes)
    app.add_middleware(ContentDecoding, max_bytes=settings.server.max_request_bytes)
    app.add_middleware(BodyLimit, max_bytes=settings.server.max_request_bytes)
    app.add_middleware(RequestBoundary, metrics=metrics, lifecycle=lifecycle)
    if settings.server.cors_origins:
        _let_browsers_in(app, settings.server.cors_origins)
    return app


def _let_browsers_in(app: FastAPI, origins: list[str]) -> None:
    """Tells browsers that pages of these origins may ask, and read every answer: around all else, so errors too.

    Keys go in a header, which any page may set, so credentials that browsers add by themselves are never asked for.
    """
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["DELETE", "GET", "HEAD", "PATCH", "POST", "PUT"],
        allow_headers=["*"],  # OpenAI's clients send a dozen of their own
        expose_headers=["*"],
        # browsers that ask before a page of the internet reaches a private address hear yes only for a named origin
        allow_private_network="*" not in origins,
    )


def _lifespan(
    settings: Settings,
    pools: Mapping[str, Pool] | None,
    engines: Mapping[str, AnyEngine] | None,
    metrics: GatewayMetrics,
    lifecycle: Lifecycle,
) -> Lifespan:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with assembled(settings, pools, engines, metrics, lifecycle) as gateway:
            app.state.gateway = gateway
            gateway.batches.runner.start(partial(ask_line, app))
            try:
                yield
            finally:
                await gateway.batches.runner.stop()

    return lifespan
