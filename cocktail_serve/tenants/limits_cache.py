"""Which limits each tenant has: the configuration's, and over them what the operator said for it. Kept in memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from cocktail_serve.config import Limits
from cocktail_serve.errors import StorageError
from cocktail_serve.tenants.limits import merged
from cocktail_serve.tenants.store import TenantStore

logger = logging.getLogger(__name__)

REFRESH_S = 5.0
"""How often the store is read: what another process changes (another gateway) holds here after at most this time."""


class LimitsCache:
    """The limits of all tenants. Reading is synchronous; a store that is gone leaves the last known in force.

    Args:
        defaults: the configuration's.
    """

    def __init__(self, defaults: Limits, store: TenantStore) -> None:
        self._defaults = defaults
        self._store = store
        self._by_tenant: dict[str, Limits] = {}
        self._num_changes = 0
        self._refreshing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads the store, and goes on reading it now and then.

        Raises:
            StorageError: it cannot be read.
        """
        await self._refresh()
        self._refreshing = asyncio.create_task(self._keep_fresh(), name="limits")

    async def stop(self) -> None:
        """Stops reading. May be called twice."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)

    def of(self, tenant: str) -> Limits:
        """The limits of a tenant now."""
        return self._by_tenant.get(tenant, self._defaults)

    def set(self, tenant: str, changed: Mapping[str, int | None] | None) -> None:
        """Holds at once here what the store was just told; None: the configuration's."""
        self._num_changes += 1
        self._by_tenant.pop(tenant, None)
        if changed:
            self._by_tenant[tenant] = merged(self._defaults, changed)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self._refresh()
            except StorageError as error:
                logger.warning("the limits of tenants could not be read, the last known hold: %s", error.message)

    async def _refresh(self) -> None:
        num_changes = self._num_changes
        changed = {tenant.name: tenant.limits for tenant in await self._store.tenants() if tenant.limits}
        if num_changes == self._num_changes:  # else what was read may be older than what was set
            self._by_tenant = {tenant: merged(self._defaults, limits) for tenant, limits in changed.items()}
