"""The ledger's table: batches that add, and sums over it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Literal, get_args

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.database import tables
from cocktail_serve.database.database import Database, insert_or, shielded
from cocktail_serve.usage.amounts import UsageAccount, UsageAmount

Group = Literal["day", "tenant", "key", "model", "pool"]
"""What sums can be kept apart by."""

GROUPS: tuple[Group, ...] = get_args(Group)

AMOUNTS = ("requests", "tokens_in", "tokens_out", "scoring_s", "mixing_s")

WRITER_KEPT_S = 86400.0
"""How long the number of a writer's last batch is kept after it fell silent: no batch is sent again for so long."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """A sum. What it was not kept apart by is None."""

    use: UsageAmount
    day: date | None = None
    tenant: str | None = None
    key: str | None = None
    model: str | None = None
    pool: str | None = None


class UsageStore:
    """The table of usage in a database that is open. Several processes may add to it at once.

    Every write is on disk when its coroutine returns. Every method raises StorageError when the database refuses.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    @shielded
    async def write(self, writer: str, number: int, batch: Mapping[UsageAccount, UsageAmount]) -> None:
        """Adds a batch, unless it was added before.

        Args:
            writer: whose numbers these are.
            number: of the batch: one more than of the last.
        """
        # in one order, so that two writers never wait for each other's rows
        accounts = sorted(batch, key=lambda account: (account.tenant, account.day, account.key_id, account.model))
        rows = [asdict(account) | asdict(batch[account]) for account in accounts]
        async with self._database.write() as connection:
            if await self._is_new(connection, writer, number):
                await connection.execute(_adding(connection), rows)

    @shielded
    async def leave(self, writer: str) -> None:
        """A writer that sends nothing more is forgotten."""
        async with self._database.write() as connection:
            await connection.execute(delete(tables.usage_writers).where(tables.usage_writers.c.writer == writer))

    @shielded
    async def sums(
        self, start: date, end: date, *, group_by: Sequence[Group], tenant: str | None = None
    ) -> list[UsageRow]:
        """Sums from one day to another, both included, in the order of what they are kept apart by.

        Args:
            tenant: whose; None: of all.
        """
        usage = tables.usage
        names = dict.fromkeys(group_by)
        columns = [usage.c.key_id.label("key") if name == "key" else usage.c[name] for name in names]
        sums = [func.sum(usage.c[amount]).label(amount) for amount in AMOUNTS]
        query = select(*columns, *sums).where(usage.c.day >= start, usage.c.day <= end)
        if tenant is not None:
            query = query.where(usage.c.tenant == tenant)
        query = query.group_by(*columns).order_by(*columns).having(func.count() > 0)
        return [
            UsageRow(
                UsageAmount(
                    requests=int(row["requests"]),
                    tokens_in=int(row["tokens_in"]),
                    tokens_out=int(row["tokens_out"]),
                    scoring_s=row["scoring_s"],
                    mixing_s=row["mixing_s"],
                ),
                **{group: row[group] for group in group_by},
            )
            for row in await self._database.rows(query)
        ]

    async def _is_new(self, connection: AsyncConnection, writer: str, number: int) -> bool:
        writers = tables.usage_writers
        query = select(writers.c.last).where(writers.c.writer == writer)
        known = (await connection.execute(query)).scalar_one_or_none()
        if known is not None and known >= number:
            return False
        now = self._clock()
        if known is None:
            await connection.execute(delete(writers).where(writers.c.written_at < now - WRITER_KEPT_S))
            await connection.execute(insert(writers).values(writer=writer, last=number, written_at=now))
        else:
            await connection.execute(
                update(writers).where(writers.c.writer == writer).values(last=number, written_at=now)
            )
        return True


def _adding(connection: AsyncConnection) -> postgresql.Insert | sqlite.Insert:
    adding = insert_or(connection, tables.usage)
    added = {amount: tables.usage.c[amount] + adding.excluded[amount] for amount in AMOUNTS}
    return adding.on_conflict_do_update(index_elements=tables.usage.primary_key.columns, set_=added)
