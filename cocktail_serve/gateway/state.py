"""What routes work with, and who is asking."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from cocktail_serve.cocktails.request import CocktailRequest, parse_inline, parse_request
from cocktail_serve.cocktails.service import CocktailService
from cocktail_serve.config import PoolConfig, Settings
from cocktail_serve.engines.base import EmbeddingEngine, Engine, GenerationEngine, RerankingEngine
from cocktail_serve.errors import AuthenticationError
from cocktail_serve.finetuning.files import Files
from cocktail_serve.gateway.metrics import GatewayMetrics
from cocktail_serve.pool import Pool

DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Gateway:
    """All that lives as long as the app does.

    Attributes:
        required_key: what requests must carry; None: they need no key (`create_app` refuses a key that is not set).
        parsing: one thread for bodies that may be megabytes: the checks of cocktail requests, answers of embeddings.
    """

    settings: Settings
    pools: Mapping[str, Pool]
    engines: Mapping[str, Engine]
    service: CocktailService
    files: Files
    metrics: GatewayMetrics
    pool_configs: Mapping[str, PoolConfig] = field(init=False)
    required_key: bytes | None = field(init=False, repr=False)
    parsing: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "cocktail-parse"), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool_configs", {pool.id: pool for pool in self.settings.pools})
        key = self.settings.admin_key if self.settings.server.requires_key else None
        object.__setattr__(self, "required_key", None if key is None else key.get_secret_value().encode())

    async def parse_cocktail(self, body: Mapping[str, Any]) -> CocktailRequest:
        """The body of `POST /v1/cocktails`, checked; raises as `parse_request` does."""
        parse = partial(parse_request, body, settings=self.settings, pools=self.pools)
        return await asyncio.get_running_loop().run_in_executor(self.parsing, parse)

    async def parse_inline(self, cocktail: Any, pool: Pool) -> CocktailRequest:
        """The `cocktail` of a generation, embedding or rerank request, checked; raises as `parse_inline` does."""
        parse = partial(parse_inline, cocktail, pool=pool, settings=self.settings)
        return await asyncio.get_running_loop().run_in_executor(self.parsing, parse)

    def generation_engine(self, pool_id: str) -> GenerationEngine:
        """The engine of a decoder pool; the configuration has checked that it is one."""
        return cast(GenerationEngine, self.engines[pool_id])

    def embedding_engine(self, pool_id: str) -> EmbeddingEngine:
        """The engine of an encoder pool; the configuration has checked that it is one."""
        return cast(EmbeddingEngine, self.engines[pool_id])

    def reranking_engine(self, pool_id: str) -> RerankingEngine:
        """The engine of a reranker pool; the configuration has checked that it is one."""
        return cast(RerankingEngine, self.engines[pool_id])


async def gateway_of(request: Request) -> Gateway:
    """The gateway of the app that the request came to."""
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayDep = Annotated[Gateway, Depends(gateway_of)]


async def tenant_of(request: Request) -> str:
    """Whose request it is.

    Raises:
        AuthenticationError: a key is required, and there is none or another.
    """
    gateway = await gateway_of(request)
    if gateway.required_key is None:
        return DEFAULT_TENANT
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise AuthenticationError("an API key is required: send the header 'Authorization: Bearer <key>'")
    # headers are latin-1 on the wire; compare_digest takes as long wherever the keys differ
    if not hmac.compare_digest(key.strip().encode("latin-1"), gateway.required_key):
        raise AuthenticationError("the API key is not valid")
    return DEFAULT_TENANT


TenantDep = Annotated[str, Depends(tenant_of)]
