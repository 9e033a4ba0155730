"""Who waits for an engine, and for which recipe."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.recipe import Recipe


class Waiter:
    """One who waits for a recipe's turn.

    Attributes:
        tenant: whose request it is; empty for background work, which is nobody's.
        num_tokens: what its answer is expected to take.
        arrived: time in line counts from here; for background work later than it really came.
        num_lost_mixes: times that the engine was lost while it mixed this recipe for the waiter.
    """

    __slots__ = (
        "arrived",
        "came",
        "is_background",
        "lease",
        "num_lost_mixes",
        "num_tokens",
        "recipe",
        "tenant",
        "timer",
    )

    def __init__(
        self,
        recipe: Recipe,
        lease: asyncio.Future[Lease],
        *,
        came: float,
        delay_s: float | None,
        tenant: str = "",
        num_tokens: int = 0,
    ) -> None:
        self.recipe = recipe
        self.lease = lease
        self.tenant = tenant
        self.num_tokens = num_tokens
        self.came = came
        self.is_background = delay_s is not None
        self.arrived = came + (delay_s or 0.0)
        self.num_lost_mixes = 0
        self.timer: asyncio.TimerHandle | None = None


class Line:
    """Who waits, by recipe and tenant, each in order of arrival."""

    def __init__(self) -> None:
        self._by_recipe: dict[str, dict[str, dict[Waiter, None]]] = {}

    def add(self, waiter: Waiter) -> None:
        of_recipe = self._by_recipe.setdefault(waiter.recipe.digest, {})
        of_recipe.setdefault(waiter.tenant, {})[waiter] = None

    def discard(self, waiter: Waiter) -> None:
        digest, tenant = waiter.recipe.digest, waiter.tenant
        of_recipe = self._by_recipe.get(digest, {})
        of_tenant = of_recipe.get(tenant)
        if of_tenant is not None and waiter in of_tenant:
            del of_tenant[waiter]
            if not of_tenant:
                del of_recipe[tenant]
            if not of_recipe:
                del self._by_recipe[digest]

    def of(self, digest: str) -> list[Waiter]:
        """All who wait for a recipe."""
        return [waiter for of_tenant in self._by_recipe.get(digest, {}).values() for waiter in of_tenant]

    def firsts_of(self, digest: str) -> list[Waiter]:
        """The first in line of each tenant for a recipe."""
        return [next(iter(of_tenant)) for of_tenant in self._by_recipe.get(digest, {}).values()]

    def firsts(self, *, other_than: str | None) -> Iterator[Waiter]:
        """The first in line of each tenant for each recipe but one."""
        for digest in self._by_recipe:
            if digest != other_than:
                yield from self.firsts_of(digest)

    def oldest(self, *, other_than: str | None) -> Waiter | None:
        """Who waited longest, for any recipe but one."""
        return min(self.firsts(other_than=other_than), key=lambda waiter: waiter.arrived, default=None)

    def __contains__(self, digest: str) -> bool:
        return digest in self._by_recipe

    def __iter__(self) -> Iterator[Waiter]:
        for digest in self._by_recipe:
            yield from self.of(digest)

    def __len__(self) -> int:
        return sum(len(of_tenant) for of_recipe in self._by_recipe.values() for of_tenant in of_recipe.values())

    def __bool__(self) -> bool:
        return bool(self._by_recipe)
