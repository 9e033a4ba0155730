"""Tenants and keys in the database, of either kind: what opens, what no longer does, and what is never written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import pytest
from sqlalchemy import select

from cocktail_serve.database import tables
from cocktail_serve.database.database import Database
from cocktail_serve.errors import ConflictError, InvalidRequestError, NotFoundError
from cocktail_serve.tenants.keys import check_scopes, id_of
from cocktail_serve.tenants.store import TenantStore

DAY_S = 86400.0


@dataclass
class World:
    database: Database
    now: float = 1_700_000_000.0
    store: TenantStore = field(init=False)

    def __post_init__(self) -> None:
        self.store = TenantStore(self.database, clock=lambda: self.now)

    async def is_valid(self, key_id: str) -> bool:
        found = await self.store.find(key_id)
        assert found is not None
        return found[0].is_valid(self.now)


@pytest.fixture
async def world(database: Database) -> World:
    return World(database)


async def test_only_a_digest_of_a_key_is_kept(world: World) -> None:
    key, secret = await world.store.create_key("acme", {"use"})
    prefix, key_id, random = secret.split("-", 2)
    assert (prefix, key_id) == ("ck", key.id)
    assert len(random) == 43, "256 bits in base64"
    async with world.database.read() as connection:
        row = dict((await connection.execute(select(tables.keys))).mappings().one())
    assert row["digest"] == hashlib.sha256(secret.encode()).hexdigest()
    assert random not in repr(row)
    assert random not in repr(key)
    assert row["digest"] not in repr(key)


async def test_a_key_matches_itself_alone(world: World) -> None:
    made = [await world.store.create_key("acme", {"use"}) for _ in range(2)]
    assert len({secret for _, secret in made}) == 2
    for key, secret in made:
        found = await world.store.find(key.id)
        assert found is not None
        assert found[0] == key
        assert [found[0].matches(other) for _, other in made] == [other == secret for _, other in made]


async def test_a_key_ends_when_it_was_made_to(world: World) -> None:
    key, _ = await world.store.create_key("acme", {"use"}, lifetime_s=90 * DAY_S)
    world.now += 90 * DAY_S - 1
    assert await world.is_valid(key.id)
    world.now += 1
    assert not await world.is_valid(key.id)


async def test_revoking(world: World) -> None:
    key, _ = await world.store.create_key("acme", {"use"})
    with pytest.raises(NotFoundError):
        await world.store.revoke(key.id, tenant="other")
    assert await world.is_valid(key.id)
    revoked = await world.store.revoke(key.id)
    assert not await world.is_valid(key.id)
    world.now += 5
    assert await world.store.revoke(key.id) == revoked, "again changes nothing"
    with pytest.raises(NotFoundError, match="no key 'abc'"):
        await world.store.revoke("abc")


async def test_rotation_leaves_the_old_key_an_overlap(world: World) -> None:
    old, _ = await world.store.create_key("acme", {"use", "admin"}, lifetime_s=90 * DAY_S)
    world.now += 30 * DAY_S
    new, secret = await world.store.rotate(old.id, overlap_s=DAY_S)
    assert new.id == id_of(secret) != old.id
    assert (new.tenant, new.scopes) == (old.tenant, old.scopes)
    assert new.expires_at == world.now + 90 * DAY_S
    world.now += DAY_S - 1
    assert (await world.is_valid(old.id), await world.is_valid(new.id)) == (True, True)
    world.now += 1
    assert (await world.is_valid(old.id), await world.is_valid(new.id)) == (False, True)
    with pytest.raises(ConflictError, match="has ended"):
        await world.store.rotate(old.id, overlap_s=DAY_S)


async def test_rotation_lengthens_no_life_and_may_end_at_once(world: World) -> None:
    short, _ = await world.store.create_key("acme", {"use"}, lifetime_s=10.0)
    await world.store.rotate(short.id, overlap_s=DAY_S)
    world.now += 10
    assert not await world.is_valid(short.id)
    leaked, _ = await world.store.create_key("acme", {"use"})
    await world.store.rotate(leaked.id, overlap_s=0)
    assert not await world.is_valid(leaked.id)


async def test_lists_show_a_tenants_own(world: World) -> None:
    acme, _ = await world.store.create_key("acme", {"use"})
    world.now += 1
    other, _ = await world.store.create_key("other", {"create"})
    assert await world.store.keys() == [acme, other]
    assert await world.store.keys("other") == [other]
    assert [tenant.name for tenant in await world.store.tenants()] == ["acme", "other"]


async def test_pools_of_a_tenant_come_with_its_keys(world: World) -> None:
    key, _ = await world.store.create_key("acme", {"use"})
    found = await world.store.find(key.id)
    assert found is not None
    assert found[1].pools is None
    for pools in (frozenset({"flan", "bge"}), frozenset(), None):
        await world.store.change_tenant("acme", pools=pools)
        found = await world.store.find(key.id)
        assert found is not None
        assert found[1].pools == pools


@pytest.mark.parametrize("name", ["", "Acme", "a/b", "a b", "x" * 65, "../x"])
async def test_a_name_that_is_none(world: World, name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await world.store.create_key(name, {"use"})
    assert caught.value.param == "tenant"


@pytest.mark.parametrize("scopes", [[], ["use", "root"], ["USE"]])
def test_scopes_that_are_none(scopes: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_scopes(scopes)
    assert caught.value.param == "scopes"


async def test_limits_are_changed_as_they_stand(world: World) -> None:
    await world.store.change_tenant("acme", limits={"cocktails": 3})
    changed = await world.store.change_limits("acme", lambda own: {**own, "scoring_jobs": None})
    assert changed.limits == {"cocktails": 3, "scoring_jobs": None}
    cleared = await world.store.change_limits("acme", lambda own: {})
    assert cleared.limits is None
    assert (await world.store.change_limits("new", lambda own: {**own, "cocktails": 1})).limits == {"cocktails": 1}
