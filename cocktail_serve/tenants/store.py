"""Tenants and keys in the database: made, listed, ended. Several processes may do so at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import insert, select, update
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.database import tables
from cocktail_serve.database.database import Database, shielded
from cocktail_serve.errors import ConflictError, NotFoundError
from cocktail_serve.tenants.keys import Key, Scope, check_tenant, key_digest, make_key
from cocktail_serve.usage.actor import SERVER, Actor
from cocktail_serve.usage.audit import Action, record


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody with cocktails of their own.

    Attributes:
        pools: ids of the pools it may use; None: all.
        created_at: seconds since the epoch.
        limits: where its limits are not the configuration's, by name; a limit of None: it has none.
    """

    name: str
    pools: frozenset[str] | None
    created_at: float
    limits: Mapping[str, int | None] | None = None


Unchanged = Literal["unchanged"]


class TenantStore:
    """The tables of tenants and keys in a database that is open.

    Every write is on disk when its coroutine returns. Every method raises StorageError when the database refuses.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    @shielded
    async def create_key(
        self, tenant: str, scopes: Iterable[Scope], *, lifetime_s: float | None = None, actor: Actor = SERVER
    ) -> tuple[Key, str]:
        """Makes a key, and its tenant if there is none of that name.

        Returns:
            What is kept, and the key itself, which can never be shown again.

        Raises:
            InvalidRequestError: not a tenant's name.
        """
        check_tenant(tenant)
        now = self._clock()
        async with self._database.write() as connection:
            await self._ensure_tenant(connection, tenant, now)
            made = await self._add(connection, tenant, scopes, now, lifetime_s)
            await _record(connection, actor, "key.created", made[0])
        return made

    @shielded
    async def keys(self, tenant: str | None = None) -> Sequence[Key]:
        """All keys, of one tenant if given, the oldest first; those that ended too."""
        query = select(tables.keys).order_by(tables.keys.c.created_at, tables.keys.c.id)
        if tenant is not None:
            query = query.where(tables.keys.c.tenant == tenant)
        return [_key(row) for row in await self._database.rows(query)]

    @shielded
    async def find(self, key_id: str) -> tuple[Key, Tenant] | None:
        """A key and its tenant, or None."""
        both = select(tables.keys, tables.tenants.c.pools, tables.tenants.c.created_at.label("tenant_created_at"))
        query = both.join(tables.tenants, tables.tenants.c.name == tables.keys.c.tenant)
        async with self._database.read() as connection:
            row = (await connection.execute(query.where(tables.keys.c.id == key_id))).mappings().one_or_none()
        if row is None:
            return None
        return _key(row), Tenant(row["tenant"], _pools(row["pools"]), row["tenant_created_at"])

    @shielded
    async def revoke(self, key_id: str, *, tenant: str | None = None, actor: Actor = SERVER) -> Key:
        """Ends a key now; one that has ended stays as it is.

        Args:
            tenant: whose it must be, if given.

        Raises:
            NotFoundError: no such key.
        """
        async with self._database.write() as connection:
            key = await self._get(connection, key_id, tenant)
            if key.revoked_at is not None:
                return key
            await _record(connection, actor, "key.revoked", key)
            return await self._end(connection, key, revoked_at=self._clock())

    @shielded
    async def rotate(
        self, key_id: str, *, overlap_s: float, tenant: str | None = None, actor: Actor = SERVER
    ) -> tuple[Key, str]:
        """Makes a key like another, which ends after `overlap_s`, so that clients can change over.

        The new one has an id of its own, and lives as long from now on as the other was made to.

        Raises:
            NotFoundError: no such key.
            ConflictError: it has ended.
        """
        now = self._clock()
        async with self._database.write() as connection:
            old = await self._get(connection, key_id, tenant)
            if not old.is_valid(now):
                raise ConflictError(f"the key {key_id!r} has ended; create another", code="key_ended")
            lifetime_s = None if old.expires_at is None else old.expires_at - old.created_at
            made = await self._add(connection, old.tenant, old.scopes, now, lifetime_s)
            if overlap_s <= 0:
                await self._end(connection, old, revoked_at=now)
            else:
                ends_at = now + overlap_s if old.expires_at is None else min(old.expires_at, now + overlap_s)
                await self._end(connection, old, expires_at=ends_at)
            await _record(connection, actor, "key.rotated", made[0], replaces=old.id, overlap_s=overlap_s)
        return made

    @shielded
    async def tenants(self) -> Sequence[Tenant]:
        """All tenants by name."""
        return [
            _tenant(row) for row in await self._database.rows(select(tables.tenants).order_by(tables.tenants.c.name))
        ]

    @shielded
    async def change_tenant(
        self,
        name: str,
        *,
        pools: Iterable[str] | Unchanged | None = "unchanged",
        limits: Mapping[str, int | None] | Unchanged | None = "unchanged",
        actor: Actor = SERVER,
    ) -> Tenant:
        """Changes what a tenant may use; makes the tenant if there is none of that name.

        Args:
            pools: ids of the pools that are there for it; None: all.
            limits: those that are not the configuration's, by name; None: all are.

        Raises:
            InvalidRequestError: not a tenant's name.
        """
        check_tenant(name)
        changes: dict[str, Any] = {}
        if pools != "unchanged":
            changes["pools"] = None if pools is None else sorted(set(pools))
        if limits != "unchanged":
            changes["limits"] = dict(limits) if limits else None
        async with self._database.write() as connection:
            await self._ensure_tenant(connection, name, self._clock())
            return await self._change(connection, actor, name, changes)

    @shielded
    async def change_limits(
        self,
        name: str,
        changed: Callable[[Mapping[str, int | None]], Mapping[str, int | None]],
        *,
        actor: Actor = SERVER,
    ) -> Tenant:
        """Changes the limits that a tenant has of its own, as they stand; makes the tenant if there is none.

        Args:
            changed: from those that are there to those that are to be, by name.

        Raises:
            InvalidRequestError: not a tenant's name.
        """
        check_tenant(name)
        async with self._database.write() as connection:
            await self._ensure_tenant(connection, name, self._clock())
            query = select(tables.tenants.c.limits).where(tables.tenants.c.name == name).with_for_update()
            own = (await connection.execute(query)).scalar_one()
            return await self._change(connection, actor, name, {"limits": dict(changed(own or {})) or None})

    async def _change(self, connection: AsyncConnection, actor: Actor, name: str, changes: Mapping[str, Any]) -> Tenant:
        of_name = tables.tenants.c.name == name
        if changes:
            await connection.execute(update(tables.tenants).where(of_name).values(changes))
            await record(connection, "tenant.changed", name, actor=actor, tenant=name, detail=changes)
        return _tenant((await connection.execute(select(tables.tenants).where(of_name))).mappings().one())

    async def _ensure_tenant(self, connection: AsyncConnection, name: str, now: float) -> None:
        query = select(tables.tenants.c.name).where(tables.tenants.c.name == name)
        if (await connection.execute(query)).first() is None:
            await connection.execute(insert(tables.tenants).values(name=name, created_at=now))

    async def _add(
        self, connection: AsyncConnection, tenant: str, scopes: Iterable[Scope], now: float, lifetime_s: float | None
    ) -> tuple[Key, str]:
        key_id, secret = make_key()
        key = Key(
            id=key_id,
            tenant=tenant,
            scopes=frozenset(scopes),
            digest=key_digest(secret.encode()),
            created_at=now,
            expires_at=None if lifetime_s is None else now + lifetime_s,
        )
        await connection.execute(
            insert(tables.keys).values(
                id=key.id,
                tenant=key.tenant,
                scopes=sorted(key.scopes),
                digest=key.digest,
                created_at=key.created_at,
                expires_at=key.expires_at,
            )
        )
        return key, secret

    async def _get(self, connection: AsyncConnection, key_id: str, tenant: str | None) -> Key:
        query = select(tables.keys).where(tables.keys.c.id == key_id)
        row = (await connection.execute(query)).mappings().one_or_none()
        if row is None or tenant not in (None, row["tenant"]):
            of_tenant = "" if tenant is None else f" of tenant {tenant!r}"
            raise NotFoundError(f"there is no key {key_id!r}{of_tenant}", code="key_not_found")
        return _key(row)

    async def _end(self, connection: AsyncConnection, key: Key, **ends: float) -> Key:
        await connection.execute(update(tables.keys).where(tables.keys.c.id == key.id).values(**ends))
        return replace(key, **ends)  # type: ignore[arg-type]  # the two moments of a key


async def _record(connection: AsyncConnection, actor: Actor, action: Action, key: Key, **detail: Any) -> None:
    told = {"scopes": sorted(key.scopes), "expires_at": key.expires_at, **detail}
    await record(connection, action, key.id, actor=actor, tenant=key.tenant, detail=told)


def _key(row: RowMapping) -> Key:
    return Key(
        id=row["id"],
        tenant=row["tenant"],
        scopes=frozenset(row["scopes"]),
        digest=row["digest"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
    )


def _tenant(row: RowMapping) -> Tenant:
    return Tenant(row["name"], _pools(row["pools"]), row["created_at"], row["limits"])


def _pools(pools: Iterable[str] | None) -> frozenset[str] | None:
    return None if pools is None else frozenset(pools)
