"""Which limits and pools a tenant has: what the operator said of it, and what holds when the store is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from cocktail_serve.config import Limits
from cocktail_serve.database.database import Database
from cocktail_serve.errors import StorageError
from cocktail_serve.tenants import tenants_cache
from cocktail_serve.tenants.store import Tenant, TenantStore
from cocktail_serve.tenants.tenants_cache import TenantsCache

DEFAULTS = Limits(requests_per_minute=60, cocktails=3)


@pytest.fixture
async def store(database: Database) -> TenantStore:
    return TenantStore(database)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what changes tells nobody
            await asyncio.sleep(0.001)


async def test_the_configurations_unless_the_operator_said_otherwise(store: TenantStore) -> None:
    await store.change_tenant("acme", limits={"requests_per_minute": None, "scoring_jobs": 0})
    await store.change_tenant("other", pools=["flan"])
    cache = TenantsCache(DEFAULTS, store)
    await cache.start()
    assert cache.limits_of("acme") == Limits(cocktails=3, scoring_jobs=0)
    assert cache.limits_of("other") == cache.limits_of("never-seen") == DEFAULTS
    await cache.stop()


async def test_changing_pools_leaves_limits_and_the_other_way_round(store: TenantStore) -> None:
    await store.change_tenant("acme", limits={"cocktails": 7})
    assert (await store.change_tenant("acme", pools=["flan"])).limits == {"cocktails": 7}
    assert (await store.change_tenant("acme", limits=None)).pools == frozenset({"flan"})
    assert (await store.tenants())[0].limits is None


async def test_a_change_holds_at_once_here_and_soon_elsewhere(
    store: TenantStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants_cache, "REFRESH_S", 0.01)
    here, elsewhere = TenantsCache(DEFAULTS, store), TenantsCache(DEFAULTS, store)
    await here.start()
    await elsewhere.start()
    here.set(await store.change_tenant("acme", limits={"cocktails": 7}, pools=["flan"]))
    assert here.limits_of("acme").cocktails == 7
    assert here.pools_of("acme") == {"flan"}
    await eventually(lambda: elsewhere.limits_of("acme").cocktails == 7)
    assert elsewhere.pools_of("acme") == {"flan"}
    here.set(await store.change_tenant("acme", limits=None, pools=None))
    assert here.limits_of("acme") == DEFAULTS
    assert here.pools_of("acme") is None
    await eventually(lambda: elsewhere.pools_of("acme") is None)
    await here.stop()
    await elsewhere.stop()


async def test_a_store_that_is_gone_leaves_the_last_known_in_force(
    store: TenantStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants_cache, "REFRESH_S", 0.001)
    await store.change_tenant("acme", limits={"cocktails": 7})
    cache = TenantsCache(DEFAULTS, store)
    await cache.start()
    failures = 0

    async def gone() -> None:
        nonlocal failures
        failures += 1
        raise StorageError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(store, "tenants", gone)
        await eventually(lambda: failures >= 3)
        assert cache.limits_of("acme").cocktails == 7
    await store.change_tenant("acme", limits={"cocktails": 8})
    await eventually(lambda: cache.limits_of("acme").cocktails == 8)
    await cache.stop()


async def test_what_was_read_before_a_change_does_not_undo_it(
    store: TenantStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TenantsCache(DEFAULTS, store)
    read, go_on = asyncio.Event(), asyncio.Event()
    tenants = store.tenants

    async def slowly() -> object:
        found = await tenants()
        read.set()
        await go_on.wait()
        return found

    monkeypatch.setattr(store, "tenants", slowly)
    refreshing = asyncio.create_task(cache._refresh())
    await read.wait()
    cache.set(Tenant("acme", None, 0.0, {"cocktails": 9}))
    go_on.set()
    await refreshing
    assert cache.limits_of("acme").cocktails == 9
