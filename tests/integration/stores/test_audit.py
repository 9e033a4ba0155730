"""The audit log on both kinds of database: who did what, in order, page by page, and nothing that is secret."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from sqlalchemy import select

from cocktail_serve.database import tables
from cocktail_serve.database.database import Database
from cocktail_serve.errors import ConflictError, InvalidRequestError
from cocktail_serve.tenants.store import TenantStore
from cocktail_serve.usage.actor import CLI, SERVER, Actor
from cocktail_serve.usage.audit import AuditLog

ALICE = Actor("acme", "0123456789ab")


@dataclass
class World:
    database: Database
    log: AuditLog = field(init=False)
    tenants: TenantStore = field(init=False)

    def __post_init__(self) -> None:
        self.log = AuditLog(self.database)
        self.tenants = TenantStore(self.database)


@pytest.fixture
async def world(database: Database) -> World:
    return World(database)


async def test_who_did_what(world: World) -> None:
    await world.log.record("expert.added", "flan/new", detail={"fingerprint": "f"})
    await world.log.record("cocktail.pinned", "films", actor=ALICE, tenant="acme")
    pinned, added = (await world.log.list()).data
    assert (added.actor, added.action, added.tenant, added.subject) == (SERVER, "expert.added", None, "flan/new")
    assert added.detail == {"fingerprint": "f"}
    assert (pinned.actor, pinned.tenant) == (ALICE, "acme")
    assert added.at <= pinned.at


async def test_pages(world: World) -> None:
    for number in range(5):
        await world.log.record("cocktail.created", f"n{number}", tenant="acme" if number % 2 else "other")
    first = await world.log.list(limit=2)
    assert [event.subject for event in first.data] == ["n4", "n3"]
    assert first.has_more
    rest = await world.log.list(limit=10, after=first.data[-1].id)
    assert [event.subject for event in rest.data] == ["n2", "n1", "n0"]
    assert not rest.has_more
    assert [event.subject for event in (await world.log.list(order="asc", limit=1)).data] == ["n0"]
    assert [event.subject for event in (await world.log.list(tenant="acme")).data] == ["n3", "n1"]
    assert (await world.log.list(action="key.created")).data == []
    with pytest.raises(InvalidRequestError):
        await world.log.list(after="nonsense")


async def test_keys_and_tenants_are_written_down_with_their_changes(world: World) -> None:
    key, secret = await world.tenants.create_key("acme", {"use"}, actor=CLI)
    rotated, other_secret = await world.tenants.rotate(key.id, overlap_s=0, actor=CLI)
    await world.tenants.revoke(rotated.id, actor=CLI)
    await world.tenants.revoke(rotated.id, actor=CLI)
    await world.tenants.change_tenant("acme", pools=["flan"], limits={"cocktails": 3}, actor=CLI)
    events = (await world.log.list(order="asc")).data
    assert [(event.action, event.subject) for event in events] == [
        ("key.created", key.id),
        ("key.rotated", rotated.id),
        ("key.revoked", rotated.id),
        ("tenant.changed", "acme"),
    ], "revoking what has ended changes nothing"
    assert {event.actor for event in events} == {CLI}
    assert events[1].detail["replaces"] == key.id
    assert events[3].detail == {"pools": ["flan"], "limits": {"cocktails": 3}}
    async with world.database.read() as connection:
        written = repr((await connection.execute(select(tables.audit))).all())
    for kept_secret in (secret.split("-", 2)[2], other_secret.split("-", 2)[2], key.digest):
        assert kept_secret not in written


async def test_what_was_not_done_is_not_written(world: World) -> None:
    key, _ = await world.tenants.create_key("acme", {"use"})
    await world.tenants.revoke(key.id)
    with pytest.raises(ConflictError):
        await world.tenants.rotate(key.id, overlap_s=0)
    assert [event.action for event in (await world.log.list()).data] == ["key.revoked", "key.created"]


async def test_a_sweep_removes_what_happened_long_ago(world: World) -> None:
    await world.log.record("cocktail.created", "old", tenant="acme")
    (event,) = (await world.log.list()).data
    later = AuditLog(world.database, clock=lambda: event.at + 3600)
    await later.sweep(older_than_s=3601)
    assert len((await world.log.list()).data) == 1
    await later.sweep(older_than_s=3600)
    assert not (await world.log.list()).data
