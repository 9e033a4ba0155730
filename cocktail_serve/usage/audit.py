"""Who changed what: written in the transaction of the change, so that both are there or neither.

Never a key, an example or metadata is in it: ids, digests, names of models and numbers only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.database import tables
from cocktail_serve.database.database import Database, page_of, shielded
from cocktail_serve.ids import Order, Page, check_cursor, new_id
from cocktail_serve.usage.actor import SERVER, Actor

Action = Literal[
    "cocktail.created",
    "cocktail.ready",
    "cocktail.pinned",
    "cocktail.deleted",
    "key.created",
    "key.revoked",
    "key.rotated",
    "tenant.changed",
    "expert.added",
    "expert.removed",
    "batch.created",
    "batch.cancelled",
]


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One change.

    Attributes:
        at: seconds since the epoch.
        tenant: whom it concerns; None: all.
        subject: id of what was changed: a version, a name, a key, a tenant, an expert.
        detail: what tells more, by action.
    """

    id: str
    at: float
    actor: Actor
    action: Action
    tenant: str | None
    subject: str
    detail: Mapping[str, Any]


async def record(
    connection: AsyncConnection,
    action: Action,
    subject: str,
    *,
    actor: Actor,
    tenant: str | None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Writes a change down, in the transaction that it is made in."""
    await connection.execute(
        insert(tables.audit).values(
            id=new_id("audit"),
            at=time.time(),
            actor_tenant=actor.tenant,
            actor_key=actor.key_id,
            action=action,
            tenant=tenant,
            subject=subject,
            detail=dict(detail or {}),
        )
    )


class AuditLog:
    """The log in a database that is open. Every method raises StorageError when the database refuses.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    @shielded
    async def record(
        self,
        action: Action,
        subject: str,
        *,
        actor: Actor = SERVER,
        tenant: str | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes down a change that is made elsewhere than in the database, before it is announced."""
        async with self._database.write() as connection:
            await record(connection, action, subject, actor=actor, tenant=tenant, detail=detail)

    @shielded
    async def sweep(self, *, older_than_s: float) -> None:
        """Removes what happened longer ago than that."""
        async with self._database.write() as connection:
            await connection.execute(delete(tables.audit).where(tables.audit.c.at <= self._clock() - older_than_s))

    @shielded
    async def list(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        order: Order = "desc",
        tenant: str | None = None,
        action: Action | None = None,
    ) -> Page[AuditEvent]:
        """Events by the moment they happened, from behind `after` on.

        Args:
            tenant: only those that concern it.
            action: only those.

        Raises:
            InvalidRequestError: `after` is no id of an event.
        """
        check_cursor(after, "audit")
        audit = tables.audit
        query = page_of(select(audit), audit.c.id, after=after, limit=limit, order=order)
        if tenant is not None:
            query = query.where(audit.c.tenant == tenant)
        if action is not None:
            query = query.where(audit.c.action == action)
        return Page.of(
            [
                AuditEvent(
                    id=row["id"],
                    at=row["at"],
                    actor=Actor(row["actor_tenant"], row["actor_key"]),
                    action=row["action"],
                    tenant=row["tenant"],
                    subject=row["subject"],
                    detail=row["detail"],
                )
                for row in await self._database.rows(query)
            ],
            limit,
        )
