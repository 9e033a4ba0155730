"""What must survive a restart: cocktails, their examples and pins."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sqlalchemy import ColumnElement, delete, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.cocktails import audit_entries
from cocktail_serve.cocktails.cocktail import DIGEST8, Cocktail
from cocktail_serve.cocktails.pacing import paced
from cocktail_serve.cocktails.rows import from_row, to_row
from cocktail_serve.cocktails.score_store import forget_scores
from cocktail_serve.database import tables
from cocktail_serve.database.database import Database, chunks, insert_missing, shielded
from cocktail_serve.examples import ONE_SPACE, ExampleSet, parse_examples
from cocktail_serve.tenants.example_quota import check_example_bytes
from cocktail_serve.usage.actor import SERVER, Actor


class ChangeHook(Protocol):
    """Writes down what a change of a cocktail means elsewhere, in the transaction of the change: both or neither.

    Fine-tuning's `JobStore` is one: a job is a cocktail in other words.
    """

    async def changed(self, connection: AsyncConnection, before: Cocktail, after: Cocktail) -> None:
        """Called behind each change of a cocktail's row."""
        ...

    async def deleted(self, connection: AsyncConnection, uids: Sequence[str]) -> None:
        """Called before the rows of cocktails are deleted."""
        ...


ExtraWrites = Callable[[AsyncConnection, Cocktail], Awaitable[None]]
"""Writes rows that are to come with a cocktail, in the transaction that writes it."""


class StaleError(Exception):
    """Another gateway changed it first, and nothing was written: take the changes in, then decide again."""


@dataclass(frozen=True, slots=True)
class RemoteChanges:
    """What changed since a number.

    Attributes:
        last: the number up to which this goes.
        cocktails: as they are now.
        removed: uids of those that are gone; empty where `is_all`.
        pins: uid by (tenant, name), of the names of `cocktails`.
        is_all: these are all cocktails there are: removals so long ago are no longer known.
    """

    last: int
    cocktails: Sequence[Cocktail]
    removed: Sequence[str]
    pins: Mapping[tuple[str, str], str]
    is_all: bool = False


class Store:
    """The tables of cocktails in a database that is open, beside other gateways that change them.

    Changes of cocktails are numbered in the order in which they are committed, so that who has seen one has seen all
    before it. A write names the change that it goes back to, and does nothing if there was another since.

    Every write is on disk when its coroutine returns. Every method raises StorageError when the database refuses.
    """

    def __init__(self, database: Database, *, change_hooks: Sequence[ChangeHook] = ()) -> None:
        self._database = database
        self._change_hooks = change_hooks

    @shielded
    async def load(self) -> RemoteChanges:
        """All cocktails in the order they were asked for."""
        async with self._database.read() as connection:
            last = (await connection.execute(select(tables.changes.c.last))).scalar_one()
            return RemoteChanges(last, await _cocktails(connection), (), await _pins(connection), is_all=True)

    @shielded
    async def changes_since(self, seen: int) -> RemoteChanges | None:
        """What changed after a number; None: nothing."""
        async with self._database.read() as connection:
            # first the number, then the rows: who commits in between is told again next time
            row = (await connection.execute(select(tables.changes.c.last, tables.changes.c.forgotten))).one()
            if row.last == seen:
                return None
            if row.forgotten <= seen:
                cocktails = await _cocktails(connection, tables.cocktails.c.change > seen)
                names = list({(cocktail.tenant, cocktail.name) for cocktail in cocktails})
                pins: dict[tuple[str, str], str] = {}
                for some in chunks(names):
                    pins |= await _pins(connection, tuple_(tables.pins.c.tenant, tables.pins.c.name).in_(some))
                gone = select(tables.removals.c.uid).where(tables.removals.c.change > seen)
                removed = list((await connection.execute(gone)).scalars())
                return RemoteChanges(row.last, cocktails, removed, pins)
        return await self.load()

    @shielded
    async def forget_removals(self, *, keep: int) -> None:
        """Drops what only says that cocktails are gone, but for the last `keep` changes."""
        async with self._database.write() as connection:
            last = (await connection.execute(select(tables.changes.c.last))).scalar_one()
            old = tables.removals.c.change <= last - keep
            if (await connection.execute(delete(tables.removals).where(old))).rowcount:
                await connection.execute(update(tables.changes).values(forgotten=last - keep))

    @shielded
    async def add(
        self,
        cocktail: Cocktail,
        examples: ExampleSet | None,
        score_items: Sequence[str],
        *,
        actor: Actor = SERVER,
        validation: ExampleSet | None = None,
        max_example_bytes: int | None = None,
        extra_writes: ExtraWrites | None = None,
    ) -> Cocktail:
        """Writes a new cocktail with its examples, and what its scores will be kept for.

        Args:
            max_example_bytes: of all that its tenant keeps; None: no limit.

        Returns:
            The cocktail, which knows its place in the order of changes and the size of its examples.

        Raises:
            StaleError: there is one of its id.
            QuotaExceededError: the tenant would keep more bytes than that; nothing was written.
        """
        rows_of = {
            table: [
                {"uid": cocktail.uid, "position": position, "body": body}
                for position, body in enumerate(given.to_json())
            ]
            for table, given in ((tables.examples, examples), (tables.validation_examples, validation))
            if given is not None
        }
        # as the database's driver writes them
        num_bytes = sum(len(json.dumps(row["body"])) for rows in rows_of.values() for row in rows)
        async with self._database.write() as connection:
            change = await _number(connection)
            cocktail = replace(cocktail, change=change, sequence=change, example_bytes=num_bytes)
            same = select(tables.cocktails.c.uid).where(
                tables.cocktails.c.tenant == cocktail.tenant,
                tables.cocktails.c.name == cocktail.name,
                tables.cocktails.c.digest.startswith(cocktail.digest[:DIGEST8]),
            )
            if (await connection.execute(same)).first() is not None:
                raise StaleError
            await check_example_bytes(
                connection, cocktail.tenant, num_bytes, max_example_bytes, now=cocktail.created_at
            )
            await connection.execute(insert(tables.cocktails).values(to_row(cocktail)))
            for table, rows in rows_of.items():
                await connection.execute(insert(table), rows)
            if score_items:
                await connection.execute(
                    insert(tables.items), [{"uid": cocktail.uid, "item": item} for item in dict.fromkeys(score_items)]
                )
            await audit_entries.made(connection, cocktail, actor)
            if extra_writes is not None:
                await extra_writes(connection, cocktail)
        return cocktail

    @shielded
    async def update(
        self,
        cocktail: Cocktail,
        *,
        before: Cocktail,
        extra_writes: ExtraWrites | None = None,
        newest: bool = False,
    ) -> Cocktail:
        """Overwrites a cocktail's row; the audit log and the change hooks hear of it.

        Args:
            before: what it was.
            newest: it was asked for again, and comes behind all others in the order of asking.

        Returns:
            The cocktail, which knows its place in the order of changes.

        Raises:
            StaleError: since `cocktail.change` it was changed or deleted.
        """
        async with self._database.write() as connection:
            changed = await _overwrite(connection, cocktail, newest=newest)
            await audit_entries.changed(connection, before, changed)
            for hook in self._change_hooks:
                await hook.changed(connection, before, changed)
            if extra_writes is not None:
                await extra_writes(connection, changed)
        return changed

    @shielded
    async def keep_cross_validation(self, cocktail: Cocktail) -> Cocktail:
        """Overwrites the row of a cocktail of which only the cross-validation is new; nobody else need hear of it.

        Returns, and raises, as `update`.
        """
        async with self._database.write() as connection:
            return await _overwrite(connection, cocktail)

    @shielded
    async def touch(self, used_at: Mapping[str, float]) -> None:
        """Writes when cocktails were last used, by uid."""
        async with self._database.write() as connection:
            for uid, moment in used_at.items():
                await connection.execute(
                    update(tables.cocktails).where(tables.cocktails.c.uid == uid).values(used_at=moment)
                )

    @shielded
    async def pin(self, tenant: str, name: str, uid: str | None, *, actor: Actor = SERVER) -> None:
        """Pins a name to a version, or removes the pin.

        Raises:
            StaleError: that version is gone.
        """
        async with self._database.write() as connection:
            change = await _number(connection)
            # whoever reads one of the name's versions anew reads its pin too
            news = update(tables.cocktails).where(tables.cocktails.c.tenant == tenant, tables.cocktails.c.name == name)
            if uid is not None:
                news = news.where(tables.cocktails.c.uid == uid)
            if not (await connection.execute(news.values(change=change))).rowcount and uid is not None:
                raise StaleError
            await connection.execute(
                delete(tables.pins).where(tables.pins.c.tenant == tenant, tables.pins.c.name == name)
            )
            digest = None
            if uid is not None:
                await connection.execute(insert(tables.pins).values(tenant=tenant, name=name, uid=uid))
                of_version = select(tables.cocktails.c.digest).where(tables.cocktails.c.uid == uid)
                digest = (await connection.execute(of_version)).scalar_one()
            await audit_entries.pinned(connection, tenant, name, digest, actor)

    @shielded
    async def delete(self, tenant: str, uids: Sequence[str], *, actor: Actor = SERVER) -> None:
        """Deletes cocktails of a tenant with their examples, and the scores that no other of its cocktails needs."""
        async with self._database.write() as connection:
            change = await _number(connection)
            for some in chunks(uids):
                names = select(tables.cocktails.c.name, tables.cocktails.c.digest)
                rows = await connection.execute(names.where(tables.cocktails.c.uid.in_(some)).with_for_update())
                await audit_entries.deleted(connection, tenant, [(row.name, row.digest) for row in rows], actor)
                removals = [{"uid": uid, "change": change} for uid in some]
                await connection.execute(insert_missing(connection, tables.removals), removals)
                for hook in self._change_hooks:
                    await hook.deleted(connection, some)
                await forget_scores(connection, tenant, some)
                for table in (
                    tables.pins,
                    tables.items,
                    tables.examples,
                    tables.validation_examples,
                    tables.cocktails,
                ):
                    await connection.execute(delete(table).where(table.c.uid.in_(some)))
        await self._database.truncate_wal()

    @shielded
    async def examples(self, uid: str, *, validation: bool = False) -> list[dict[str, Any]]:
        """The examples of a cocktail as JSON rows, in order; empty where there are none.

        Args:
            validation: those of its validation.
        """
        table = tables.validation_examples if validation else tables.examples
        query = select(table.c.body).where(table.c.uid == uid).order_by(table.c.position)
        async with self._database.read() as connection:
            return list((await connection.execute(query)).scalars())

    async def example_set(self, cocktail: Cocktail, *, validation: bool = False) -> ExampleSet | None:
        """What a cocktail was made from, or is validated on; None where it has none.

        Raises:
            InvalidExamplesError: this release does not read them.
        """
        options = cocktail.options
        if (options.validation_digest if validation else options.examples_digest) is None:
            return None
        rows = await self.examples(cocktail.uid, validation=validation)
        # a row that is kept says itself what joins it: the reference's space where it says nothing, whatever the pool's
        return parse_examples(rows, cocktail.kind, max_examples=len(rows), separator=ONE_SPACE)


async def _number(connection: AsyncConnection) -> int:
    """The number of the change that this transaction makes. Until it ends, no other can get one: so whoever sees a
    number sees all changes up to it."""
    following = update(tables.changes).values(last=tables.changes.c.last + 1).returning(tables.changes.c.last)
    number: int = (await connection.execute(following)).scalar_one()
    return number


async def _overwrite(connection: AsyncConnection, cocktail: Cocktail, *, newest: bool = False) -> Cocktail:
    change = await _number(connection)
    changed = replace(cocktail, change=change, sequence=change if newest else cocktail.sequence)
    row = to_row(changed)
    updated = await connection.execute(
        update(tables.cocktails)
        .where(tables.cocktails.c.uid == row.pop("uid"), tables.cocktails.c.change == cocktail.change)
        .values(row)
    )
    if not updated.rowcount:
        raise StaleError
    return changed


async def _cocktails(connection: AsyncConnection, *conditions: ColumnElement[bool]) -> list[Cocktail]:
    query = select(tables.cocktails).where(*conditions).order_by(tables.cocktails.c.sequence)
    return [from_row(row) async for row in paced((await connection.execute(query)).mappings())]


async def _pins(connection: AsyncConnection, *conditions: ColumnElement[bool]) -> dict[tuple[str, str], str]:
    rows = await connection.execute(select(tables.pins).where(*conditions))
    return {(pin.tenant, pin.name): pin.uid for pin in rows}
