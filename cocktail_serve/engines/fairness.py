"""Who has been served how much lately: what turns and passes are shared out by between tenants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

HALF_LIFE_S = 30.0
"""After this long a token counts half: whoever was idle is owed what it missed lately, not what it missed all day."""

MAX_KEPT = 1024
"""Tenants kept before those with nothing left to remember are dropped."""


class Account:
    """One tenant.

    Attributes:
        num_in_flight: requests that are being served.
        left_at: when the last of its requests ended; minus infinity: never.
    """

    __slots__ = ("_charged_at", "_tokens", "left_at", "num_in_flight")

    def __init__(self) -> None:
        self.num_in_flight = 0
        self.left_at = -math.inf
        self._tokens = 0.0
        self._charged_at = 0.0

    def recent(self, now: float) -> float:
        """Tokens served, each halved for every `HALF_LIFE_S` since."""
        return self._tokens * math.exp2((self._charged_at - now) / HALF_LIFE_S)

    def charge(self, num_tokens: float, now: float) -> None:
        """Adds tokens; fewer than none where an estimate was too high."""
        self._tokens = max(0.0, self.recent(now) + num_tokens)
        self._charged_at = now


class Accounts:
    """Accounts by tenant, made as they are asked for. Knows no clock: `now` is any that only goes forward, seconds."""

    def __init__(self) -> None:
        self._by_tenant: dict[str, Account] = {}

    def of(self, tenant: str, now: float) -> Account:
        """The account of a tenant."""
        account = self._by_tenant.get(tenant)
        if account is None:
            if len(self._by_tenant) >= MAX_KEPT:
                self._drop_idle(now)
            account = self._by_tenant[tenant] = Account()
        return account

    def __iter__(self) -> Iterator[Account]:
        return iter(self._by_tenant.values())

    def items(self) -> Iterable[tuple[str, Account]]:
        """Tenants with their accounts."""
        return self._by_tenant.items()

    def _drop_idle(self, now: float) -> None:
        self._by_tenant = {
            tenant: account
            for tenant, account in self._by_tenant.items()
            if account.num_in_flight or account.recent(now) >= 1.0
        }
