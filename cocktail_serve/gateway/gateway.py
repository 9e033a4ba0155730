"""All that lives as long as the app does, and what routes ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

from cocktail_serve.batches.service import Batches
from cocktail_serve.cocktails.experts import Experts
from cocktail_serve.cocktails.options import CocktailRequest
from cocktail_serve.cocktails.parsing import parse_inline, parse_request
from cocktail_serve.cocktails.service import CocktailService
from cocktail_serve.config import Settings
from cocktail_serve.database.database import Database
from cocktail_serve.engines.base import AnyEngine, EmbeddingEngine, GenerationEngine, RerankingEngine
from cocktail_serve.errors import NotFoundError
from cocktail_serve.finetuning.files import Files
from cocktail_serve.finetuning.service import FineTuning
from cocktail_serve.gateway.authentication import Authenticator, Caller
from cocktail_serve.gateway.lifecycle import Lifecycle
from cocktail_serve.gateway.metrics import GatewayMetrics
from cocktail_serve.pool import Pool
from cocktail_serve.suggestions import did_you_mean
from cocktail_serve.tenants.limits import Limiter
from cocktail_serve.tenants.store import TenantStore
from cocktail_serve.tenants.tenants_cache import TenantsCache
from cocktail_serve.usage.audit import AuditLog
from cocktail_serve.usage.ledger import Ledger
from cocktail_serve.usage.store import UsageStore

_T = TypeVar("_T")


@dataclass(frozen=True)
class Gateway:
    """All that lives as long as the app does.

    Attributes:
        engines: one for each pool, as long as the app lives.
        parse_executor: one thread for bodies that may be megabytes; see `off_loop`.
    """

    settings: Settings
    database: Database
    pools: Mapping[str, Pool]
    engines: Mapping[str, AnyEngine]
    service: CocktailService
    experts: Experts
    files: Files
    fine_tuning: FineTuning
    batches: Batches
    metrics: GatewayMetrics
    lifecycle: Lifecycle
    tenants: TenantStore
    authenticator: Authenticator
    tenants_cache: TenantsCache
    ledger: Ledger
    usage: UsageStore
    audit: AuditLog
    limiter: Limiter
    parse_executor: Executor

    @cached_property
    def decoders(self) -> Mapping[str, GenerationEngine]:
        """Engines of decoder pools."""
        return {pool_id: engine for pool_id, engine in self.engines.items() if engine.kind == "decoder"}

    @cached_property
    def encoders(self) -> Mapping[str, EmbeddingEngine]:
        """Engines of encoder pools."""
        return {pool_id: engine for pool_id, engine in self.engines.items() if engine.kind == "encoder"}

    @cached_property
    def rerankers(self) -> Mapping[str, RerankingEngine]:
        """Engines of reranker pools."""
        return {pool_id: engine for pool_id, engine in self.engines.items() if engine.kind == "reranker"}

    async def parse_cocktail(self, body: Mapping[str, Any], caller: Caller) -> CocktailRequest:
        """The body of `POST /v1/cocktails`, checked; raises as `parse_request` does."""
        parse = partial(parse_request, body, settings=self.settings, pools=self.pools, visible=caller.pools)
        return await self.off_loop(parse)

    async def parse_inline(self, cocktail: Any, pool: Pool) -> CocktailRequest:
        """The `cocktail` of a generation, embedding or rerank request, checked; raises as `parse_inline` does."""
        parse = partial(parse_inline, cocktail, pool=pool, settings=self.settings)
        return await self.off_loop(parse)

    async def off_loop(self, work: Callable[[], _T]) -> _T:
        """The result of work on what may be megabytes, away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.parse_executor, work)

    def engine(self, pool_id: str) -> AnyEngine:
        """Any pool's engine.

        Raises:
            NotFoundError: no such pool.
        """
        if pool_id not in self.engines:
            known, meant = ", ".join(sorted(self.engines)), did_you_mean(pool_id, self.engines)
            raise NotFoundError(f"there is no engine {pool_id!r}; there are: {known}{meant}", code="engine_not_found")
        return self.engines[pool_id]
