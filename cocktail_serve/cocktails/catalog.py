"""Cocktails as they are asked for: resolved, found, listed, each tenant its own. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from cocktail_serve.cocktails.cocktail import Cocktail, ModelEntry, Served, Status
from cocktail_serve.cocktails.registry import Registry
from cocktail_serve.cocktails.store import Store
from cocktail_serve.errors import ModelNotReadyError, NotFoundError, StorageError
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.pool import Member


class Catalog:
    """What there is, from memory where that is enough, and from the store where another gateway may know more."""

    def __init__(self, registry: Registry, store: Store) -> None:
        self._registry = registry
        self._store = store

    def resolve(self, tenant: str, model_id: str) -> Served:
        """What a model id means now. Synchronous: the hot path of every request.

        Raises:
            NotFoundError: `model_not_found`: unknown, another tenant's, failed or deleted.
            ModelNotReadyError: its job has not ended.
        """
        return self._registry.resolve(tenant, model_id)

    async def learn(self) -> None:
        """Brings what other gateways have done before this call into memory.

        Raises:
            StorageError: the store cannot be asked.
        """
        await self._registry.learn()

    async def find(self, tenant: str, model_id: str) -> Served:
        """As `resolve`, and where that finds nothing to serve, looks for what another gateway has made just now.

        Raises:
            StorageError: it is not known here, and the store cannot be asked.
        """
        try:
            return self._registry.resolve(tenant, model_id)
        except (NotFoundError, ModelNotReadyError):
            await self._registry.learn()
        return self._registry.resolve(tenant, model_id)

    async def look_up(self, tenant: str, ref: str) -> Cocktail:
        """As `get`, with what other gateways have done just now.

        Raises:
            StorageError: it is not known here, and the store cannot be asked.
        """
        try:
            await self._registry.learn()
        except StorageError:
            with suppress(NotFoundError):
                return self._registry.get(tenant, ref)
            raise
        return self._registry.get(tenant, ref)

    def get(self, tenant: str, ref: str) -> Cocktail:
        """A snapshot by `name@digest8`, or by name: the current version, else the newest.

        Raises:
            NotFoundError: unknown, or another tenant's.
        """
        return self._registry.get(tenant, ref)

    def list(self, tenant: str, name: str | None = None) -> Sequence[Cocktail]:
        """The tenant's cocktails, newest first, inline ones left out; of one name if given."""
        return self._registry.of_tenant(tenant, name)

    def models(self, tenant: str) -> Sequence[ModelEntry]:
        """The model list of a tenant, sorted by id."""
        return self._registry.models(tenant)

    def statuses(self) -> Counter[Status]:
        """How many cocktails of all tenants, inline ones included, are in each state."""
        return self._registry.statuses()

    def named(self, pool_id: str, recipe_digests: Collection[str]) -> Mapping[str, Sequence[tuple[str | None, str]]]:
        """Tenant (None: a model of the pool itself) and model id of all that each recipe is served as."""
        return self._registry.named(pool_id, recipe_digests)

    def made_of(self, pool_id: str, member: Member) -> Sequence[Cocktail]:
        """Cocktails of all tenants that a model of a pool is in, or may be in once their jobs end."""
        return self._registry.made_of(pool_id, member)

    async def examples(self, tenant: str, ref: str) -> Sequence[Mapping[str, Any]]:
        """The examples a cocktail was made from, as JSON rows; empty where it was made without."""
        return await self._store.examples((await self.look_up(tenant, ref)).uid)

    async def _kept_examples(self, cocktail: Cocktail) -> tuple[ExampleSet | None, ExampleSet | None]:
        """What a cocktail was made from, and what it is validated on."""

        async def read(*, validation: bool) -> ExampleSet:
            rows = await self._store.examples(cocktail.uid, validation=validation)
            return parse_examples(rows, cocktail.kind, max_examples=len(rows))

        options = cocktail.request
        return (
            None if options.examples_digest is None else await read(validation=False),
            None if options.validation_digest is None else await read(validation=True),
        )
