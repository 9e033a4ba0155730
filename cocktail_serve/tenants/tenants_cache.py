"""What the operator said of each tenant: its limits, over the configuration's, and its pools. Kept in memory."""

from __future__ import annotations

import asyncio
import logging

from cocktail_serve.config import Limits
from cocktail_serve.errors import StorageError
from cocktail_serve.tenants.limits import merged
from cocktail_serve.tenants.store import Tenant, TenantStore

logger = logging.getLogger(__name__)

REFRESH_S = 5.0
"""How often the store is read: what another process changes (another gateway) holds here after at most this time."""


class TenantsCache:
    """The limits and pools of all tenants. Reading is synchronous; a store that is gone leaves the last known in force.

    Args:
        defaults: the configuration's limits.
    """

    def __init__(self, defaults: Limits, store: TenantStore) -> None:
        self._defaults = defaults
        self._store = store
        self._limits: dict[str, Limits] = {}
        self._pools: dict[str, frozenset[str]] = {}
        self._num_changes = 0
        self._refreshing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads the store, and goes on reading it now and then.

        Raises:
            StorageError: it cannot be read.
        """
        await self._refresh()
        self._refreshing = asyncio.create_task(self._keep_fresh(), name="tenants")

    async def stop(self) -> None:
        """Stops reading. May be called twice."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)

    def limits_of(self, tenant: str) -> Limits:
        """The limits of a tenant now."""
        return self._limits.get(tenant, self._defaults)

    def pools_of(self, tenant: str) -> frozenset[str] | None:
        """Ids of the pools that are there for a tenant now; None: all."""
        return self._pools.get(tenant)

    def set(self, tenant: Tenant) -> None:
        """Holds at once here what the store was just told."""
        self._num_changes += 1
        self._limits.pop(tenant.name, None)
        self._pools.pop(tenant.name, None)
        self._keep(tenant)

    def _keep(self, tenant: Tenant) -> None:
        if tenant.limits:
            self._limits[tenant.name] = merged(self._defaults, tenant.limits)
        if tenant.pools is not None:
            self._pools[tenant.name] = tenant.pools

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self._refresh()
            except StorageError as error:
                logger.warning("what tenants may use could not be read, the last known holds: %s", error.message)

    async def _refresh(self) -> None:
        num_changes = self._num_changes
        tenants = await self._store.tenants()
        if num_changes != self._num_changes:
            return  # what was read may be older than what was set
        self._limits, self._pools = {}, {}
        for tenant in tenants:
            self._keep(tenant)
