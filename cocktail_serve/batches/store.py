"""Batches and their lines in the database: what was answered is on disk before the next line is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Delete, Insert, delete, func, insert, select, update
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.batches.batch import (
    ENDED_AT,
    UNFINISHED,
    Batch,
    BatchError,
    BatchLine,
    BatchStatus,
    LineAnswer,
)
from cocktail_serve.batches.request import WINDOW_S, BatchBody
from cocktail_serve.database import tables
from cocktail_serve.database.database import Database, page_of, shielded
from cocktail_serve.errors import ConflictError, NotFoundError, RateLimitError
from cocktail_serve.finetuning.files import Files, content_digest
from cocktail_serve.ids import Page, check_cursor, is_id, new_id
from cocktail_serve.usage.actor import Actor
from cocktail_serve.usage.audit import record

PREFIX = "batch"

MAX_UNFINISHED = 16
"""Batches of one tenant that wait or are worked on."""

_ROWS = 1000
"""Lines of one transaction: others write in between."""

_batches, _lines = tables.batches, tables.batch_lines


class BatchStore:
    """The batches of all tenants, in a database that is open. Every method raises StorageError when it refuses.

    What a gateway writes of a batch names the epoch in which it took it: once another has taken it over, that changes
    nothing, and the method says so.

    Args:
        files: of inputs and outputs.
        clock: seconds since the epoch.
    """

    def __init__(self, database: Database, files: Files, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._files = files
        self.clock = clock

    @shielded
    async def add(self, tenant: str, body: BatchBody, *, owner: str, actor: Actor) -> Batch:
        """Writes a new batch down, whose file has not been read yet.

        Raises:
            RateLimitError: the tenant has too many that are unfinished.
            QuotaExceededError: it keeps as many bytes of examples and files as it may.
        """
        now = self.clock()
        batch = Batch(
            id=new_id(PREFIX),
            tenant=tenant,
            key_id=actor.key_id,
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            metadata=body.metadata,
            output_expires_after_s=None if body.output_expires_after is None else body.output_expires_after.seconds,
            status="validating",
            created_at=now,
            expires_at=now + WINDOW_S,
            owner=owner,
        )
        async with self._database.write() as connection:
            mine = select(func.count()).where(_batches.c.tenant == tenant, _batches.c.status.in_(UNFINISHED))
            if (await connection.execute(mine)).scalar_one() >= MAX_UNFINISHED:
                raise RateLimitError(
                    f"{MAX_UNFINISHED} batches are unfinished, which is the most at once; wait for one to end, or "
                    "cancel it",
                    retry_after_s=60.0,
                )
            await self._files.check_room(connection, tenant)
            row = {column.name: getattr(batch, column.name) for column in _batches.columns}
            await connection.execute(insert(_batches).values({**row, "errors": None}))
            await record(
                connection,
                "batch.created",
                batch.id,
                actor=actor,
                tenant=tenant,
                detail={"endpoint": batch.endpoint, "input_file_id": batch.input_file_id},
            )
        return batch

    @shielded
    async def get(self, tenant: str, batch_id: str) -> Batch:
        """A batch of a tenant.

        Raises:
            NotFoundError: unknown, or another tenant's.
        """
        found = None
        if is_id(batch_id, PREFIX):
            found = await self._find(_batches.c.tenant == tenant, _batches.c.id == batch_id)
        if found is None:
            raise NotFoundError(
                f"there is no batch {batch_id!r}; GET /v1/batches lists those there are", code="batch_not_found"
            )
        return found

    @shielded
    async def list(self, tenant: str, *, after: str | None, limit: int) -> Page[Batch]:
        """The tenant's batches, the newest first, from behind `after` on."""
        check_cursor(after, PREFIX)
        query = page_of(select(_batches).where(_batches.c.tenant == tenant), _batches.c.id, after=after, limit=limit)
        return Page.of([_batch(row) for row in await self._database.rows(query)], limit)

    @shielded
    async def unfinished(self) -> Sequence[Batch]:
        """All that wait or are worked on, whoever does."""
        query = select(_batches).where(_batches.c.status.in_(UNFINISHED)).order_by(_batches.c.id)
        return [_batch(row) for row in await self._database.rows(query)]

    @shielded
    async def claim(self, batch: Batch, owner: str) -> Batch | None:
        """The batch as this gateway takes it over; None: another one did, or it has ended."""
        return await self._change(batch, _batches.c.status.in_(UNFINISHED), owner=owner, epoch=batch.epoch + 1)

    @shielded
    async def cancel(self, tenant: str, batch_id: str, *, actor: Actor) -> Batch:
        """Says that no more of it is wanted; whoever works on it ends it.

        Raises:
            NotFoundError: as `get`.
            ConflictError: it has ended already.
        """
        batch = await self.get(tenant, batch_id)
        async with self._database.write() as connection:
            open_ = (_batches.c.id == batch.id, _batches.c.status.in_(("validating", "in_progress")))
            values = {"status": "cancelling", "cancelling_at": self.clock()}
            changed = await connection.execute(update(_batches).where(*open_).values(values))
            if changed.rowcount:
                await record(connection, "batch.cancelled", batch.id, actor=actor, tenant=tenant)
        batch = await self.get(tenant, batch_id)
        if batch.status not in ("cancelling", "cancelled"):
            raise ConflictError(
                f"{batch.id} is {batch.status}; what is finished cannot be cancelled", code="batch_finished"
            )
        return batch

    @shielded
    async def fail(self, batch: Batch, errors: Sequence[BatchError]) -> None:
        """Ends a batch whose file is of no use."""
        told = [error.to_json() for error in errors]
        await self._change(
            batch, _batches.c.status == "validating", status="failed", failed_at=self.clock(), errors=told
        )

    async def begin(self, batch: Batch, lines: Sequence[BatchLine], models: Sequence[str]) -> Batch | None:
        """Writes down what its file asks, and that it is in progress.

        Args:
            models: what each line's model is told apart by.

        Returns:
            The batch; None: it is not this gateway's to begin any more.
        """
        if not await self._write_lines(batch, delete(_lines).where(_lines.c.batch_id == batch.id)):
            return None
        rows = [
            {"batch_id": batch.id, "position": line.position, "model": model, "request": line.content}
            for line, model in zip(lines, models, strict=True)
        ]
        for start in range(0, len(rows), _ROWS):
            if not await self._write_lines(batch, insert(_lines), rows[start : start + _ROWS]):
                return None
        return await self._begin(batch, len(rows))

    @shielded
    async def pending(self, batch: Batch) -> tuple[Sequence[int], int]:
        """Positions of the lines without an answer, those of one model together; and the bytes of all answers."""
        of_batch = _lines.c.batch_id == batch.id
        query = select(_lines.c.position).where(of_batch, _lines.c.answer.is_(None))
        async with self._database.read() as connection:
            positions = (await connection.execute(query.order_by(_lines.c.model, _lines.c.position))).scalars().all()
            size = select(func.coalesce(func.sum(func.length(_lines.c.answer)), 0)).where(of_batch)
            return positions, int((await connection.execute(size)).scalar_one())

    @shielded
    async def line(self, batch: Batch, position: int) -> BatchLine | None:
        """A line that has no answer; None: it has one, or the batch was deleted."""
        query = select(_lines.c.request).where(_lines.c.batch_id == batch.id, _lines.c.position == position)
        async with self._database.read() as connection:
            content = (await connection.execute(query)).scalar_one_or_none()
        return None if content is None else BatchLine(position, bytes(content))

    @shielded
    async def answered(self, batch: Batch, answer: LineAnswer) -> bool:
        """Keeps what became of a line; False: the batch is in progress no more, or is another gateway's."""
        count = _batches.c.num_failed if answer.is_error else _batches.c.num_completed
        async with self._database.write() as connection:
            mine = (_batches.c.id == batch.id, _batches.c.epoch == batch.epoch, _batches.c.status == "in_progress")
            counted = await connection.execute(update(_batches).where(*mine).values({count.name: count + 1}))
            if not counted.rowcount:
                return False
            line = (_lines.c.batch_id == batch.id, _lines.c.position == answer.position)
            values = {"answer": answer.content, "is_error": answer.is_error, "request": None}
            await connection.execute(update(_lines).where(*line).values(values))
        return True

    @shielded
    async def finish(self, batch: Batch, status: BatchStatus, unanswered: Callable[[BatchLine], LineAnswer]) -> None:
        """Ends a batch: what was answered, and what was not, goes into files.

        Args:
            status: of the end.
            unanswered: what is said of a line that was not; called in a thread.
        """
        if status in ("completed", "expired"):  # an answer that comes from now on is not counted
            finalizing = {"status": "finalizing", "finalizing_at": self.clock()}
            await self._change(batch, _batches.c.status.in_(("in_progress", "finalizing")), **finalizing)
        async with self._database.read() as connection:
            answers = await self._answers(connection, batch, is_error=False)
            errors = await self._answers(connection, batch, is_error=True)
            left = select(_lines.c.position, _lines.c.request).where(
                _lines.c.batch_id == batch.id, _lines.c.answer.is_(None)
            )
            found = (await connection.execute(left)).all()

        def contents_of_files() -> dict[str, tuple[bytes, str]]:
            for position, request in found:
                errors[position] = unanswered(BatchLine(position, bytes(request))).content
            contents = {
                name: b"".join(line + b"\n" for _, line in sorted(lines.items()))
                for name, lines in (("output", answers), ("error", errors))
                if lines
            }
            return {name: (content, content_digest(content)) for name, content in contents.items()}

        num_unanswered = len(found)
        contents = await asyncio.to_thread(contents_of_files)  # up to 50,000 lines, away from the event loop
        async with self._database.write() as connection:
            mine = (_batches.c.id == batch.id, _batches.c.epoch == batch.epoch, _batches.c.status.in_(UNFINISHED))
            values: dict[str, Any] = {"status": status, ENDED_AT[status]: self.clock()}
            values["num_failed"] = _batches.c.num_failed + num_unanswered
            if not batch.num_total:
                values["num_total"] = num_unanswered  # it was cancelled while its file was read
            if not (await connection.execute(update(_batches).where(*mine).values(values))).rowcount:
                return
            ids: dict[str, str] = {}
            for name, (content, digest) in contents.items():
                file = await self._files.write(
                    connection,
                    batch.tenant,
                    f"{batch.id}_{name}.jsonl",
                    content,
                    digest,
                    expires_after_s=batch.output_expires_after_s,
                    purpose="batch_output",
                )
                ids[f"{name}_file_id"] = file.id
            if ids:
                await connection.execute(update(_batches).where(_batches.c.id == batch.id).values(ids))
            await connection.execute(delete(_lines).where(_lines.c.batch_id == batch.id))
        await self._database.truncate_wal()

    @shielded
    async def sweep(self, *, older_than_s: float) -> None:
        """Removes batches that ended longer ago than that; their files stay."""
        ended_at = func.coalesce(*(_batches.c[name] for name in ENDED_AT.values()))
        async with self._database.write() as connection:
            await connection.execute(delete(_batches).where(ended_at <= self.clock() - older_than_s))

    @shielded
    async def _write_lines(
        self, batch: Batch, statement: Delete | Insert, rows: Sequence[Mapping[str, Any]] | None = None
    ) -> bool:
        """Changes lines of a batch that nobody has begun with; False: it is another gateway's, which may have."""
        mine = select(_batches.c.id).where(_batches.c.id == batch.id, _batches.c.epoch == batch.epoch)
        async with self._database.write() as connection:
            if (await connection.execute(mine.with_for_update())).first() is None:
                return False
            await connection.execute(statement, rows)
        return True

    @shielded
    async def _begin(self, batch: Batch, num_total: int) -> Batch | None:
        changes = {"status": "in_progress", "in_progress_at": self.clock(), "num_total": num_total}
        return await self._change(batch, _batches.c.status == "validating", **changes)

    async def _change(self, batch: Batch, condition: ColumnElement[bool], **changes: Any) -> Batch | None:
        async with self._database.write() as connection:
            mine = (_batches.c.id == batch.id, _batches.c.epoch == batch.epoch, condition)
            if not (await connection.execute(update(_batches).where(*mine).values(changes))).rowcount:
                return None
        return await self._find(_batches.c.id == batch.id)

    async def _find(self, *conditions: ColumnElement[bool]) -> Batch | None:
        rows = await self._database.rows(select(_batches).where(*conditions))
        return _batch(rows[0]) if rows else None

    async def _answers(self, connection: AsyncConnection, batch: Batch, *, is_error: bool) -> dict[int, bytes]:
        query = select(_lines.c.position, _lines.c.answer).where(
            _lines.c.batch_id == batch.id, _lines.c.answer.is_not(None), _lines.c.is_error == is_error
        )
        return {row.position: bytes(row.answer) for row in await connection.execute(query)}


def custom_id_of(line: BatchLine) -> str:
    """What the tenant calls a line that was checked."""
    return str(orjson.loads(line.content)["custom_id"])


def _batch(row: RowMapping) -> Batch:
    errors = tuple(BatchError(**error) for error in row["errors"] or ())
    return Batch(**{**row, "errors": errors})
