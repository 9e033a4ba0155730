"""Callers by their keys: found once, remembered for seconds, forgotten the moment this process changes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

import pytest

from cocktail_serve.config import ServerConfig
from cocktail_serve.database.database import Database
from cocktail_serve.errors import AuthenticationError, PermissionDeniedError
from cocktail_serve.gateway.authentication import CACHE_TTL_S, Authenticator
from cocktail_serve.tenants.keys import Key
from cocktail_serve.tenants.store import Tenant, TenantStore

Auth = Literal["auto", "required", "off"]


class CountingStore(TenantStore):
    looked_up = 0

    async def find(self, key_id: str) -> tuple[Key, Tenant] | None:
        self.looked_up += 1
        return await super().find(key_id)


@dataclass
class World:
    store: CountingStore
    now: float = 0.0
    pools: dict[str, frozenset[str]] = field(default_factory=dict)
    authenticator: Authenticator = field(init=False)

    def __post_init__(self) -> None:
        self.authenticator = self.made()

    def made(self, auth: Auth = "required", *, admin_key: str | None = "root") -> Authenticator:
        server = ServerConfig(auth=auth)
        return Authenticator(
            self.store, server=server, admin_key=admin_key, pools_of=self.pools.get, timer=lambda: self.now
        )

    async def tenant_of(self, secret: str) -> str:
        return (await self.authenticator.caller(f"Bearer {secret}")).tenant


@pytest.fixture
async def world() -> AsyncIterator[World]:
    database = Database("sqlite:///:memory:")
    await database.open()
    yield World(CountingStore(database))
    await database.close()


async def test_a_key_is_looked_up_once_in_a_while(world: World) -> None:
    _, secret = await world.store.create_key("acme", {"use"})
    callers = await asyncio.gather(*(world.tenant_of(secret) for _ in range(20)))
    assert set(callers) == {"acme"}
    assert world.store.looked_up == 1
    world.now += CACHE_TTL_S - 0.1
    await world.tenant_of(secret)
    assert world.store.looked_up == 1
    world.now += 0.1
    await world.tenant_of(secret)
    assert world.store.looked_up == 2


async def test_revoking_holds_at_once_here_and_soon_elsewhere(world: World) -> None:
    key, secret = await world.store.create_key("acme", {"use"})
    await world.tenant_of(secret)
    await world.store.revoke(key.id)  # as another process would
    assert await world.tenant_of(secret) == "acme"
    world.now += CACHE_TTL_S
    with pytest.raises(AuthenticationError):
        await world.tenant_of(secret)
    here, secret = await world.store.create_key("acme", {"use"})
    await world.tenant_of(secret)
    await world.store.revoke(here.id)
    world.authenticator.forget(here.id)
    with pytest.raises(AuthenticationError):
        await world.tenant_of(secret)


async def test_a_key_that_changes_while_it_is_looked_up_is_not_remembered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = await world.store.create_key("acme", {"use"})
    before = await world.store.find(key.id)
    found, looking = asyncio.Event(), asyncio.Event()

    async def find_slowly(key_id: str) -> tuple[Key, Tenant] | None:
        looking.set()
        await found.wait()
        return before

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "find", find_slowly)
        asking = asyncio.create_task(world.tenant_of(secret))
        await looking.wait()
        await world.store.revoke(key.id)
        world.authenticator.forget(key.id)
        found.set()
        await asking
    with pytest.raises(AuthenticationError):
        await world.tenant_of(secret)


async def test_a_look_up_whose_caller_left_serves_the_next(world: World) -> None:
    _, secret = await world.store.create_key("acme", {"use"})
    leaving = asyncio.create_task(world.tenant_of(secret))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert await world.tenant_of(secret) == "acme"
    assert world.store.looked_up == 1


async def test_a_remembered_key_still_expires(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    key, secret = await world.store.create_key("acme", {"use"}, lifetime_s=3600)
    await world.tenant_of(secret)
    assert key.expires_at is not None
    monkeypatch.setattr(world.authenticator, "_clock", lambda: key.expires_at)
    with pytest.raises(AuthenticationError):
        await world.tenant_of(secret)


async def test_what_is_no_key_of_ours(world: World) -> None:
    key, secret = await world.store.create_key("acme", {"use"})
    another = (await world.store.create_key("other", {"use"}))[1]
    await world.tenant_of(secret)
    forged = f"ck-{key.id}-{another.split('-', 2)[2]}"
    unknown = f"ck-{'0' * 12}-{'A' * 43}"
    messages = set()
    for header in (f"Bearer {forged}", f"Bearer {unknown}", f"Bearer {secret}x", f"Bearer {secret[:-1]}", "Bearer x"):
        with pytest.raises(AuthenticationError) as caught:
            await world.authenticator.caller(header)
        messages.add(caught.value.message)
    assert messages == {"the API key is not valid"}, "it does not tell which part was right"
    for header in ("", secret, f"Basic {secret}", "Bearer ", "Bearer"):
        with pytest.raises(AuthenticationError, match="an API key is required"):
            await world.authenticator.caller(header)


async def test_malformed_keys_cost_no_look_up(world: World) -> None:
    for presented in ("x", "sk-abc", "ck-12-34", "ck-" + "0" * 12 + "-short"):
        with pytest.raises(AuthenticationError):
            await world.tenant_of(presented)
    assert world.store.looked_up == 0


async def test_scopes(world: World) -> None:
    for scopes, allowed in (
        ({"use"}, {"use"}),
        ({"create"}, {"use", "create"}),
        ({"admin"}, {"admin"}),
        ({"use", "admin"}, {"use", "admin"}),
    ):
        _, secret = await world.store.create_key("acme", scopes)
        caller = await world.authenticator.caller(f"Bearer {secret}")
        for scope in ("use", "create", "admin"):
            if scope in allowed:
                caller.require(scope)
            else:
                with pytest.raises(PermissionDeniedError, match=f"lacks the scope '{scope}'"):
                    caller.require(scope)


async def test_admin_needs_a_key_even_where_nothing_else_does(world: World) -> None:
    _, tenants = await world.store.create_key("acme", {"use", "create"})
    _, admins = await world.store.create_key("ops", {"admin"})
    for authenticator in (
        world.made("off"),
        world.made("required"),
        world.made("auto", admin_key=None),
    ):
        with pytest.raises(AuthenticationError):
            await authenticator.admin("")
        with pytest.raises(PermissionDeniedError):
            await authenticator.admin(f"Bearer {tenants}")
        assert (await authenticator.admin(f"Bearer {admins}")).tenant == "ops"
    assert (await world.made("off").caller("")).tenant == "default"
    assert (await world.authenticator.admin("Bearer root")).key_id == "admin"


@pytest.mark.parametrize("auth", ["auto", "off"])
class TestOpen:
    """A server that asks for no key."""

    async def test_a_key_that_is_sent_is_honoured_or_refused(self, world: World, auth: Auth) -> None:
        authenticator = world.made(auth)
        key, secret = await world.store.create_key("acme", {"use"})
        caller = await authenticator.caller(f"Bearer {secret}")
        assert (caller.tenant, caller.scopes, caller.key_id) == ("acme", {"use"}, key.id)
        assert (await authenticator.caller("Bearer root")).key_id == "admin"
        await world.store.revoke(key.id)
        authenticator.forget(key.id)
        for header in (f"Bearer {secret}", "Bearer sk-wrong", f"Bearer {secret}x", "Bearer rooot", "bearer  a b"):
            with pytest.raises(AuthenticationError, match="this server asks for none: leave it out, or send 'none'"):
                await authenticator.caller(header)
        with pytest.raises(AuthenticationError, match="send the header 'Authorization: Bearer <key>'"):
            await authenticator.caller(secret)

    async def test_without_a_key_everybody_is_the_default_tenant(self, world: World, auth: Auth) -> None:
        authenticator = world.made(auth)
        for header in ("", "Bearer", "Bearer ", "Bearer none", "Bearer EMPTY", "Bearer x", "Basic cHJveHk6eA=="):
            caller = await authenticator.caller(header)
            assert (caller.tenant, caller.key_id, caller.pools) == ("default", None, None)
        assert world.store.looked_up == 0

    async def test_the_default_tenant_has_the_pools_that_the_operator_said(self, world: World, auth: Auth) -> None:
        authenticator = world.made(auth)
        world.pools["default"] = frozenset({"flan"})
        caller = await authenticator.caller("")
        assert [caller.sees(pool) for pool in ("flan", "bge")] == [True, False]


@pytest.mark.parametrize("name", ["forwarded", "x-forwarded-for", "x-forwarded-proto", "x-real-ip", "via"])
async def test_what_a_proxy_forwards_is_not_let_in_without_a_key(
    world: World, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["host", name, "accept"]
    authenticator = world.made("auto")
    for _ in range(3):
        with pytest.raises(PermissionDeniedError, match=rf"header '{name}' .*Set server\.auth: required"):
            await authenticator.caller("", header_names=names)
    assert len(caplog.records) == 1, "told once, not with every request"
    _, secret = await world.store.create_key("acme", {"use"})
    assert (await authenticator.caller(f"Bearer {secret}", header_names=names)).tenant == "acme"
    assert (await authenticator.caller("", header_names=["host", "x-request-id"])).tenant == "default"
    assert (await world.made("off").caller("", header_names=names)).tenant == "default"
