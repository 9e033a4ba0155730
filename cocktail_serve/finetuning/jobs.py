"""Fine-tuning jobs and their events in the database: each step is written in the transaction of its cocktail's."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, func, insert, select, update
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.cocktails.cocktail import Cocktail, Failure
from cocktail_serve.database import tables
from cocktail_serve.database.database import Database, page_of, shielded
from cocktail_serve.errors import InvalidRequestError, NotFoundError
from cocktail_serve.finetuning.job import (
    JOB_STATUS,
    UNFINISHED,
    Job,
    JobEvent,
    ListedEvent,
    events_between,
    failure_of,
    first_events,
)
from cocktail_serve.finetuning.request import JobRequest
from cocktail_serve.ids import Page, check_cursor, is_id, new_id

SAME_JOB_S = 600.0
"""How long an identical request of a tenant means the job that is there: clients repeat what they got no answer to."""

PREFIX = "ftjob"

_jobs, _events, _pairs = tables.fine_tuning_jobs, tables.fine_tuning_events, tables.fine_tuning_metadata


class JobStore:
    """The jobs of all tenants, in a database that is open. A hook of cocktails (`cocktails.store.ChangeHook`).

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def add(self, connection: AsyncConnection, request: JobRequest, cocktail: Cocktail) -> Job:
        """Writes a new job of a cocktail, in its transaction; or finds the identical one that another call made."""
        same = await self._recent(connection, cocktail.tenant, request.digest)
        if same is not None:
            return same
        now = self._clock()
        status = JOB_STATUS[cocktail.status]
        job = Job(
            id=new_id(PREFIX),
            tenant=cocktail.tenant,
            cocktail_id=cocktail.id,
            request=request,
            created_at=now,
            status=status,
            finished_at=None if status in UNFINISHED else now,
        )
        await connection.execute(insert(_jobs).values(_row(job, uid=cocktail.uid)))
        pairs = [{"job_id": job.id, "key": key, "value": value} for key, value in (request.metadata or {}).items()]
        if pairs:
            await connection.execute(insert(_pairs), pairs)
        await self._tell(connection, job.id, first_events(job, cocktail))
        return job

    async def changed(self, connection: AsyncConnection, before: Cocktail, after: Cocktail) -> None:
        """Tells a cocktail's unfinished jobs what happened to it."""
        for job_id in await self._of_cocktails(connection, [after.uid], _jobs.c.status.in_(UNFINISHED)):
            await self._tell(connection, job_id, events_between(before, after))
            if after.status != before.status:
                await connection.execute(
                    update(_jobs)
                    .where(_jobs.c.id == job_id)
                    .values(
                        status=JOB_STATUS[after.status],
                        finished_at=self._clock() if after.is_final else None,
                        error=_error_json(failure_of(after)),
                    )
                )

    async def deleted(self, connection: AsyncConnection, uids: Sequence[str]) -> None:
        """Cancels the unfinished jobs of cocktails, and removes what their events say about the examples."""
        for job_id in await self._of_cocktails(connection, uids, _jobs.c.status.in_(UNFINISHED)):
            await self._tell(connection, job_id, [JobEvent("The job was cancelled: its model was deleted", "warn")])
            cancelled = {"status": "cancelled", "finished_at": self._clock()}
            await connection.execute(update(_jobs).where(_jobs.c.id == job_id).values(cancelled))
        for job_id in await self._of_cocktails(connection, uids, _jobs.c.status == "succeeded"):
            await self._tell(connection, job_id, [JobEvent("The fine-tuned model was deleted", "warn")])
        job_ids = await self._of_cocktails(connection, uids)
        await connection.execute(delete(_events).where(_events.c.job_id.in_(job_ids), _events.c.is_metrics))
        await connection.execute(update(_jobs).where(_jobs.c.id.in_(job_ids)).values(uid=None))

    @shielded
    async def sweep(self, *, older_than_s: float) -> None:
        """Removes jobs that ended longer ago than that, with their events; what they made stays."""
        old = _jobs.c.finished_at <= self._clock() - older_than_s
        async with self._database.write() as connection:
            job_ids = select(_jobs.c.id).where(old).scalar_subquery()
            for table in (_events, _pairs):
                await connection.execute(delete(table).where(table.c.job_id.in_(job_ids)))
            found = await connection.execute(delete(_jobs).where(old))
        if found.rowcount:
            await self._database.truncate_wal()

    @shielded
    async def recent(self, tenant: str, digest: str) -> Job | None:
        """The tenant's job of an identical request, made in the last ten minutes; None where it failed, was cancelled,
        or its model has been deleted."""
        async with self._database.read() as connection:
            return await self._recent(connection, tenant, digest)

    @shielded
    async def get(self, tenant: str, job_id: str) -> Job:
        """A job of a tenant.

        Raises:
            NotFoundError: unknown, or another tenant's.
        """
        row = None
        if is_id(job_id, PREFIX):
            async with self._database.read() as connection:
                query = select(_jobs).where(_jobs.c.tenant == tenant, _jobs.c.id == job_id)
                row = (await connection.execute(query)).mappings().first()
        if row is None:
            raise NotFoundError(
                f"there is no fine-tuning job {job_id!r}; GET /v1/fine_tuning/jobs lists those there are",
                code="job_not_found",
            )
        return _job(row)

    @shielded
    async def list(
        self, tenant: str, *, after: str | None, limit: int, metadata: Mapping[str, str] | None = None
    ) -> Page[Job]:
        """The tenant's jobs, the newest first, from behind `after` on.

        Args:
            metadata: only jobs that have these pairs among theirs; empty: only those that have none; None: all.
        """
        check_cursor(after, PREFIX)
        query = page_of(select(_jobs).where(_jobs.c.tenant == tenant), _jobs.c.id, after=after, limit=limit)
        if metadata is not None and not metadata:
            query = query.where(~exists().where(_pairs.c.job_id == _jobs.c.id))
        for key, value in (metadata or {}).items():
            same = (_pairs.c.job_id == _jobs.c.id) & (_pairs.c.key == key) & (_pairs.c.value == value)
            query = query.where(exists().where(same))
        return Page.of([_job(row) for row in await self._database.rows(query)], limit)

    @shielded
    async def events(self, job: Job, *, after: str | None, limit: int) -> Page[ListedEvent]:
        """What happened to a job, the newest first, from behind `after` on.

        Raises:
            InvalidRequestError: `after` is not an event of this job.
        """
        position = None if after is None else _position(after, job.id)
        of_job = select(_events).where(_events.c.job_id == job.id)
        query = page_of(of_job, _events.c.position, after=position, limit=limit)
        return Page.of([_listed(row) for row in await self._database.rows(query)], limit)

    async def _recent(self, connection: AsyncConnection, tenant: str, digest: str) -> Job | None:
        query = select(_jobs).where(
            _jobs.c.tenant == tenant,
            _jobs.c.request_digest == digest,
            _jobs.c.created_at > self._clock() - SAME_JOB_S,
            _jobs.c.status.not_in(("failed", "cancelled")),
            _jobs.c.uid.is_not(None),
        )
        row = (await connection.execute(query.order_by(_jobs.c.id.desc()))).mappings().first()
        return None if row is None else _job(row)

    async def _of_cocktails(
        self, connection: AsyncConnection, uids: Sequence[str], *conditions: ColumnElement[bool]
    ) -> Sequence[str]:
        query = select(_jobs.c.id).where(_jobs.c.uid.in_(uids), *conditions)
        return (await connection.execute(query)).scalars().all()

    async def _tell(self, connection: AsyncConnection, job_id: str, events: Iterable[JobEvent]) -> None:
        events = list(events)
        if not events:
            return
        last = await connection.execute(select(func.max(_events.c.position)).where(_events.c.job_id == job_id))
        first = (last.scalar_one() or 0) + 1
        now = self._clock()
        await connection.execute(
            insert(_events),
            [
                {
                    "job_id": job_id,
                    "position": position,
                    "created_at": now,
                    "level": event.level,
                    "message": event.message,
                    "data": None if event.data is None else dict(event.data),
                    "is_metrics": event.is_metrics,
                }
                for position, event in enumerate(events, start=first)
            ],
        )


def _row(job: Job, *, uid: str) -> dict[str, Any]:
    return {
        "id": job.id,
        "tenant": job.tenant,
        "uid": uid,
        "cocktail_id": job.cocktail_id,
        "request": job.request.to_json(),
        "request_digest": job.request.digest,
        "created_at": job.created_at,
        "status": job.status,
        "finished_at": job.finished_at,
        "error": _error_json(job.error),
    }


def _job(row: RowMapping) -> Job:
    return Job(
        id=row["id"],
        tenant=row["tenant"],
        cocktail_id=row["cocktail_id"],
        request=JobRequest(**row["request"]),
        created_at=row["created_at"],
        status=row["status"],
        finished_at=row["finished_at"],
        error=None if row["error"] is None else Failure(**row["error"]),
    )


def _error_json(error: Failure | None) -> dict[str, str | None] | None:
    return None if error is None else error.to_json()


def _listed(row: RowMapping) -> ListedEvent:
    return ListedEvent(
        id=f"ftevent-{row['job_id'].removeprefix(f'{PREFIX}-')}-{row['position']}",
        created_at=row["created_at"],
        event=JobEvent(row["message"], row["level"], row["data"], row["is_metrics"]),
    )


def _position(event_id: str, job_id: str) -> int:
    found = re.fullmatch(rf"ftevent-{job_id.removeprefix(f'{PREFIX}-')}-(\d{{1,9}})", event_id, re.ASCII)
    if found is None:
        raise InvalidRequestError(
            f"after: {event_id!r} is not an event of this job; give the last one you got", param="after"
        )
    return int(found[1])
