"""Who waits for an engine, and for which recipe."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from cocktail_serve.engines.line_place import LinePlace
from cocktail_serve.engines.scheduler_snapshot import Queue, WaitReason
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.errors import CocktailError, ModelNotReadyError
from cocktail_serve.recipe import Recipe

Claimant = Literal["tenant", "background", "operator"]
"""Whose a claim is: a request's; of scoring and mixing ahead, which are nobody's; the operator's, who pins a recipe."""


@dataclass(slots=True, eq=False, kw_only=True)
class Claim:
    """What somebody wants of an engine.

    Attributes:
        made_at: when it was made.
        ranked_from: time in line counts from here; for background work later than it came.
        tenant: whose request it is; empty for other claimants.
        num_tokens: what its answer is expected to take.
        num_lost_mixes: times that the engine was lost while it mixed the recipe for this claim.
    """

    recipe: Recipe
    made_at: float
    ranked_from: float
    claimant: Claimant = "tenant"
    tenant: str = ""
    num_tokens: int = 0
    num_lost_mixes: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class Waiter(Claim):
    """One who waits in line, and is given a lease or an error.

    Attributes:
        granted: what it is given.
        place: by which it can be called away; None: it waits for this engine alone.
    """

    granted: asyncio.Future[Lease]
    place: LinePlace | None = None

    @property
    def is_answered(self) -> bool:
        """Whether it waits for nothing any more: admitted, sent away or cancelled, though it may not know yet."""
        return self.granted.done()

    async def lease(self) -> Lease:
        """Waits for the lease, and gives it back if the caller is cancelled before it could wake up.

        Raises:
            CocktailError: it was sent away, or its lease ended after it was granted and before it woke up.
        """
        try:
            lease = await self.granted
        except asyncio.CancelledError:
            if self.granted.done() and not self.granted.cancelled() and self.granted.exception() is None:
                self.granted.result().release()
            raise
        lease.raise_if_ended()
        return lease


class WaitQueue:
    """Those of one kind who wait, by recipe and tenant, each in order of arrival."""

    def __init__(self) -> None:
        self._by_recipe: dict[str, dict[str, dict[Waiter, None]]] = {}

    def add(self, waiter: Waiter) -> None:
        by_tenant = self._by_recipe.setdefault(waiter.recipe.digest, {})
        by_tenant.setdefault(waiter.tenant, {})[waiter] = None

    def discard(self, waiter: Waiter) -> None:
        digest, tenant = waiter.recipe.digest, waiter.tenant
        by_tenant = self._by_recipe.get(digest, {})
        waiters = by_tenant.get(tenant)
        if waiters is not None and waiter in waiters:
            del waiters[waiter]
            if not waiters:
                del by_tenant[tenant]
            if not by_tenant:
                del self._by_recipe[digest]

    def fail(self, waiter: Waiter, error: Exception) -> None:
        """Sends one away."""
        self.discard(waiter)
        if not waiter.is_answered:
            waiter.granted.set_exception(error)

    def fail_all(self, error: Callable[[], CocktailError], *, but: str | None = None) -> None:
        """Sends everybody away, or all but those who wait for one recipe."""
        for waiter in list(self):
            if waiter.recipe.digest != but:
                self.fail(waiter, error())

    def of(self, digest: str) -> list[Waiter]:
        """All who wait for a recipe."""
        return [waiter for waiters in self._by_recipe.get(digest, {}).values() for waiter in waiters]

    def firsts_of(self, digest: str) -> list[Waiter]:
        """The first in line of each tenant for a recipe."""
        return [next(iter(waiters)) for waiters in self._by_recipe.get(digest, {}).values()]

    def num_by_recipe(self) -> dict[str, int]:
        """How many wait for each recipe that anybody waits for."""
        return {digest: sum(map(len, by_tenant.values())) for digest, by_tenant in self._by_recipe.items()}

    def firsts(self, *, other_than: str | None) -> list[Waiter]:
        """The first in line of each tenant for each recipe but one."""
        return [waiter for digest in self._by_recipe if digest != other_than for waiter in self.firsts_of(digest)]

    def firsts_of_tenants(self) -> list[Waiter]:
        """The first in line of each tenant, whatever its recipe."""
        firsts: dict[str, Waiter] = {}
        for by_tenant in self._by_recipe.values():
            for tenant, waiters in by_tenant.items():
                first = next(iter(waiters))
                if tenant not in firsts or first.made_at < firsts[tenant].made_at:
                    firsts[tenant] = first
        return list(firsts.values())

    def __contains__(self, digest: str) -> bool:
        return digest in self._by_recipe

    def __iter__(self) -> Iterator[Waiter]:
        for digest in self._by_recipe:
            yield from self.of(digest)

    def __len__(self) -> int:
        return sum(len(waiters) for by_tenant in self._by_recipe.values() for waiters in by_tenant.values())

    def __bool__(self) -> bool:
        return bool(self._by_recipe)


@dataclass(frozen=True, slots=True)
class WaitQueues:
    """All who wait for one engine.

    Attributes:
        requests: who waits for tenants.
        background: scoring and mixing ahead.
    """

    requests: WaitQueue = field(default_factory=WaitQueue)
    background: WaitQueue = field(default_factory=WaitQueue)

    @contextmanager
    def joined(
        self,
        recipe: Recipe,
        *,
        tenant: str,
        num_tokens: int,
        background: bool,
        now: float,
        delay_s: float = 0.0,
        timeout_s: float | None,
        expire: Callable[[Waiter, float], None],
        place: LinePlace | None = None,
    ) -> Iterator[Waiter]:
        """One more in line, until the block ends.

        Args:
            tenant: not read for background work.
            delay_s: how much later than now its time in line counts from.
            timeout_s: None: waits as long as it takes.
            expire: is to send it away, told how long it has waited.
            place: where it waits, if it could wait elsewhere. A request's time in line began with that; background
                work, which comes back for one turn after the other, waits for each anew.
        """
        loop = asyncio.get_running_loop()
        made_at = now if place is None or background else place.asked_at
        waiter = Waiter(
            recipe=recipe,
            made_at=made_at,
            ranked_from=made_at + delay_s,
            claimant="background" if background else "tenant",
            tenant="" if background else tenant,
            num_tokens=num_tokens,
            granted=loop.create_future(),
            place=place,
            num_lost_mixes=0 if place is None else place.num_lost_mixes,
        )
        queue = self.holding(waiter)
        queue.add(waiter)
        timer = None if timeout_s is None else loop.call_at(made_at + timeout_s, expire, waiter, timeout_s)
        may_leave = nullcontext() if place is None else place.held(partial(self.fail, waiter))
        try:
            with may_leave:
                yield waiter
        finally:
            queue.discard(waiter)
            if timer is not None:
                timer.cancel()

    def holding(self, waiter: Waiter) -> WaitQueue:
        """The queue that a waiter belongs in."""
        return self.background if waiter.claimant == "background" else self.requests

    def of(self, digest: str) -> list[Waiter]:
        """All who wait for a recipe."""
        return [*self.requests.of(digest), *self.background.of(digest)]

    def fail(self, waiter: Waiter, error: Exception) -> None:
        """Sends one away."""
        self.holding(waiter).fail(waiter, error)

    def fail_all(self, error: Callable[[], CocktailError]) -> None:
        """Sends everybody away."""
        self.requests.fail_all(error)
        self.background.fail_all(error)

    def snapshot(self, now: float, *, reason: Callable[[str], WaitReason]) -> tuple[Queue, ...]:
        """The queues of each recipe, the longest waiting first.

        Args:
            reason: why the requests for a recipe, named by its digest, wait.
        """
        digests = {waiter.recipe.digest: None for waiter in [*self.requests, *self.background]}
        queues = [
            Queue(
                recipe_digest=digest,
                num_waiting=len(self.requests.of(digest)),
                num_background=len(self.background.of(digest)),
                oldest_s=now - min(waiter.made_at for waiter in self.of(digest)),
                reason=reason(digest),
            )
            for digest in digests
        ]
        return tuple(sorted(queues, key=lambda queue: -queue.oldest_s))

    def __bool__(self) -> bool:
        return bool(self.requests) or bool(self.background)


def not_ready_error(waited_s: float) -> ModelNotReadyError:
    return ModelNotReadyError(f"the engine is starting or restarting and was not ready within {waited_s:g} s")
