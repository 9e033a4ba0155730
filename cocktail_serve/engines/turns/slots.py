"""Slots of an engine: how many requests it holds at once, and whose they are.

A tenant alone may have all slots. While several use them, each has an equal share; a slot that gets free goes to the
tenant served least lately. Where every request slows those beside it, a tenant that floods may be held to fewer slots
still while the others ask for little. What a tenant was served is its `ServedTokens`, which several engines may share;
how many requests it has in flight, and when the last one ended, is of one engine.

Knows no clock and no event loop: `now` is any time that only goes forward, in seconds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from cocktail_serve.engines.fairness import HALF_LIFE_S, MAX_KEPT, ServedTokensByTenant
from cocktail_serve.engines.turns.wait_queue import Claim

C = TypeVar("C", bound=Claim)

RETURN_S = 0.25
"""Whoever asks again so soon after its answer asks one thing after the other, and is expected back so soon again."""


@dataclass(slots=True)
class Presence:
    """One tenant at one engine.

    Attributes:
        num_in_flight: slots it takes.
        left_at: when the last of its requests ended; minus infinity: never.
        returns: whether it came back within `RETURN_S` when it was last without requests in flight.
    """

    num_in_flight: int = 0
    left_at: float = -math.inf
    returns: bool = False

    def lasts(self, now: float, gap_s: float) -> bool:
        """Whether the tenant is served, or was until so many seconds ago."""
        return self.num_in_flight > 0 or now - self.left_at < gap_s

    def is_expected(self, now: float) -> bool:
        """Whether its next request is to come in a moment."""
        return self.returns and self.lasts(now, RETURN_S)


class Slots:
    """The slots of one engine.

    Args:
        served_tokens: what each tenant was served.
        max_in_flight: how many slots there are; None: no bound.
        gap_s: how long the share of a tenant without requests in flight is kept: one that asks again and again is
            between two requests only for a moment.
        num_unshared: while no more slots than these are taken, whoever comes has one: many tenants who ask now and then
            would keep shares for each other that nobody uses.
        max_beside: slots of a tenant while others have some, or are expected back in a moment; beyond these it may have
            one more than all others together. None: no bound but the shares.

    Attributes:
        max_in_flight: how many there are.
        num_taken: slots in use.
    """

    def __init__(
        self,
        served_tokens: ServedTokensByTenant,
        *,
        max_in_flight: int | None,
        gap_s: float,
        num_unshared: int = 0,
        max_beside: int | None = None,
    ) -> None:
        self.num_taken = 0
        self._num_unshared = num_unshared
        self._max_beside = max_beside or sys.maxsize
        self._served_tokens = served_tokens
        self.max_in_flight = max_in_flight or sys.maxsize
        self._gap_s = gap_s
        self._tenants: dict[str, Presence] = {}
        self._sharing: dict[str, Presence] = {}  # of those who have a share, or had one a moment ago

    def of(self, tenant: str) -> Presence:
        """How a tenant stands at this engine."""
        return self._tenants.get(tenant) or Presence()

    def served(self, tenant: str, now: float) -> float:
        """Tokens that a tenant was served lately."""
        return self._served_tokens.of(tenant, now).recent(now)

    def charge(self, tenant: str, num_tokens: float, now: float) -> None:
        """A tenant was served more, or less than was charged."""
        self._served_tokens.of(tenant, now).charge(num_tokens, now)

    def sharing(self, now: float, gap_s: float) -> dict[str, Presence]:
        """Those among whom the slots are shared out and who are served, or were until so many seconds ago."""
        return {tenant: presence for tenant, presence in self._sharing.items() if presence.lasts(now, gap_s)}

    def has_one_for(self, tenant: str, now: float) -> bool:
        """Whether a tenant may have one more request in the engine."""
        if self.num_taken >= self.max_in_flight:
            return False
        num_in_flight = self.of(tenant).num_in_flight
        if num_in_flight >= self._max_beside and self._crowds(tenant, now):
            return False
        if not num_in_flight or num_in_flight < self._slots_each or self.num_taken < self._num_unshared:
            return True
        self._sharing = self.sharing(now, self._gap_s)
        return num_in_flight < self._slots_each

    def first_in(self, claims: Iterable[C], now: float) -> C | None:
        """Whose is the next free slot: of the tenant served least lately, of those that may have one more."""
        admissible = [claim for claim in claims if self.has_one_for(claim.tenant, now)]
        return min(admissible, key=lambda claim: (self.served(claim.tenant, now), claim.ranked_from), default=None)

    def take(self, tenant: str, num_tokens: int, now: float) -> None:
        """A request of a tenant goes in.

        Args:
            num_tokens: what it is expected to take; charged.
        """
        presence = self._tenants.get(tenant)
        if presence is None:
            if len(self._tenants) >= MAX_KEPT:
                self._drop_idle(now)
            presence = self._tenants[tenant] = Presence()
        if not presence.num_in_flight:
            presence.returns = now - presence.left_at < RETURN_S
        presence.num_in_flight += 1
        self._sharing[tenant] = presence
        self.num_taken += 1
        self.charge(tenant, num_tokens, now)

    def leave(self, tenant: str, now: float) -> None:
        """A request of a tenant has ended."""
        presence = self._tenants[tenant]
        presence.num_in_flight -= 1
        presence.left_at = now
        self.num_taken -= 1

    def share_anew(self) -> None:
        """Another turn begins: whoever was served in the last one keeps no share for it."""
        self._sharing.clear()

    def _crowds(self, tenant: str, now: float) -> bool:
        """Whether a tenant has more slots than all others together, who want theirs."""
        num_of_others = self.num_taken - self.of(tenant).num_in_flight
        if self.of(tenant).num_in_flight <= num_of_others:
            return False
        return num_of_others > 0 or any(
            presence.is_expected(now) for other, presence in self._sharing.items() if other != tenant
        )

    @property
    def _slots_each(self) -> int:
        return self.max_in_flight // (len(self._sharing) or 1)

    def _drop_idle(self, now: float) -> None:
        self._tenants = {
            tenant: presence for tenant, presence in self._tenants.items() if presence.lasts(now, HALF_LIFE_S)
        }
