"""Who has been served how much lately: what turns and passes are shared out by between tenants."""

from __future__ import annotations

import math

HALF_LIFE_S = 30.0
"""After this long a token counts half: whoever was idle is owed what it missed lately, not what it missed all day."""

MAX_KEPT = 1024
"""Tenants kept before those with nothing left to remember are dropped."""


class ServedTokens:
    """What one tenant was served."""

    __slots__ = ("_charged_at", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._charged_at = 0.0

    def recent(self, now: float) -> float:
        """Tokens served, each halved for every `HALF_LIFE_S` since."""
        return self._tokens * math.exp2((self._charged_at - now) / HALF_LIFE_S)

    def charge(self, num_tokens: float, now: float) -> None:
        """Adds tokens; fewer than none where an estimate was too high."""
        self._tokens = max(0.0, self.recent(now) + num_tokens)
        self._charged_at = now


class ServedTokensByTenant:
    """What each tenant was served. Engines that have one in common treat a tenant alike.

    Knows no clock: `now` is any that only goes forward, in seconds, the same for all engines.
    """

    def __init__(self) -> None:
        self._by_tenant: dict[str, ServedTokens] = {}

    def of(self, tenant: str, now: float) -> ServedTokens:
        """What a tenant was served."""
        served = self._by_tenant.get(tenant)
        if served is None:
            if len(self._by_tenant) >= MAX_KEPT:
                self._drop_idle(now)
            served = self._by_tenant[tenant] = ServedTokens()
        return served

    def _drop_idle(self, now: float) -> None:
        self._by_tenant = {tenant: served for tenant, served in self._by_tenant.items() if served.recent(now) >= 1.0}
