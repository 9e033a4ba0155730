"""Files of examples and of batches: kept in the database once per content, each tenant its own."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, delete, exists, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.database import tables
from cocktail_serve.database.database import Database, insert_missing, page_of, shielded
from cocktail_serve.errors import InvalidExamplesError, InvalidRequestError, NotFoundError
from cocktail_serve.examples import jsonl_lines, parse_examples, parse_line
from cocktail_serve.ids import Order, Page, check_cursor, is_id, new_id
from cocktail_serve.pool import Kind
from cocktail_serve.tenants.example_quota import check_example_bytes
from cocktail_serve.tenants.limits import LimitsOf, unlimited

Purpose = Literal["fine-tune", "batch", "batch_output"]
"""What files are for: examples, requests of a batch, and what became of those."""

PURPOSE: Final = "fine-tune"
"""Of files whose every line is an example."""

UPLOADED: tuple[Purpose, ...] = ("fine-tune", "batch")
"""What uploads may be for."""

PREFIX = "file"

MAX_ERRORS = 5
"""Malformed lines that an error names."""


@dataclass(frozen=True, slots=True)
class File:
    """A file.

    Attributes:
        digest: SHA-256 of the content, 64 hex characters.
        created_at: seconds since the epoch, as `expires_at`.
    """

    id: str
    tenant: str
    filename: str
    num_bytes: int
    digest: str
    created_at: float
    expires_at: float | None = None
    purpose: Purpose = PURPOSE


def content_digest(content: bytes) -> str:
    """SHA-256, 64 hex characters. Bound by the CPU."""
    return hashlib.sha256(content).hexdigest()


def check_jsonl(content: bytes) -> None:
    """Checks that every line is an example of some kind of pool; which, the job decides. Bound by the CPU.

    Raises:
        InvalidRequestError: no text, no examples, or malformed lines: names the first few.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = content.count(b"\n", 0, error.start) + 1
        raise InvalidRequestError(
            f"line {at}: not UTF-8 text: {error.reason}", param="file", code="invalid_file"
        ) from error
    if text.lstrip().startswith("["):
        raise InvalidRequestError(
            "the file is one JSON array; a JSONL file has one object on each line: jq -c '.[]' FILE > FILE.jsonl",
            param="file",
            code="invalid_file",
        )
    errors = []
    num_rows = 0
    for number, line in jsonl_lines(text):
        num_rows += 1
        try:
            _check_row(parse_line(line, number))
        except InvalidExamplesError as error:
            errors.append(f"line {number}: {error.message.removeprefix(f'row {error.row}: ')}")
    if errors:
        more = f"; and {len(errors) - MAX_ERRORS} more" if len(errors) > MAX_ERRORS else ""
        raise InvalidRequestError(
            f"{len(errors)} of {num_rows} lines are no examples: {'; '.join(errors[:MAX_ERRORS])}{more}",
            param="file",
            code="invalid_file",
        )
    if not num_rows:
        raise InvalidRequestError(
            "the file holds no examples: one JSON object on each line", param="file", code="invalid_file"
        )


def _check_row(row: Any) -> None:
    keys = row.keys() if isinstance(row, dict) else frozenset()
    kind: Kind = "decoder"
    if not keys.isdisjoint({"query_prompt", "passage_prompt"}):
        kind = "reranker"
    elif not keys.isdisjoint({"query", "pos", "anchor", "positive"}):
        kind = "encoder"
    # a retrieval example without negatives is fit beside others: that is the whole file's matter, and the job checks it
    parse_examples([row] if kind == "decoder" else [row, row], kind)


class Files:
    """The files of all tenants, in a database that is open.

    Args:
        limits_of: limits of a tenant.
        clock: seconds since the epoch.
    """

    def __init__(
        self, database: Database, *, limits_of: LimitsOf = unlimited, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._limits_of = limits_of
        self._clock = clock

    @shielded
    async def add(
        self,
        tenant: str,
        filename: str,
        content: bytes,
        *,
        expires_after_s: int | None = None,
        purpose: Purpose = PURPOSE,
    ) -> File:
        """Keeps a file; equal contents of one tenant are kept once.

        Raises:
            QuotaExceededError: the tenant would keep more bytes of examples than it may.
        """
        digest = await asyncio.to_thread(content_digest, content)
        async with self._database.write() as connection:
            return await self.write(
                connection, tenant, filename, content, digest, expires_after_s=expires_after_s, purpose=purpose
            )

    async def write(
        self,
        connection: AsyncConnection,
        tenant: str,
        filename: str,
        content: bytes,
        digest: str,
        *,
        expires_after_s: int | None,
        purpose: Purpose,
    ) -> File:
        """As `add`, in a transaction of the caller's. What a batch made is kept whatever the tenant keeps already.

        Args:
            digest: `content_digest` of the content.
        """
        now = self._clock()
        file = File(
            id=new_id(PREFIX),
            tenant=tenant,
            filename=filename,
            num_bytes=len(content),
            digest=digest,
            created_at=now,
            expires_at=None if expires_after_s is None else now + expires_after_s,
            purpose=purpose,
        )
        contents = tables.file_contents
        known = select(contents.c.digest).where(contents.c.tenant == tenant, contents.c.digest == file.digest)
        if (await connection.execute(known)).first() is None:
            limit = None if purpose == "batch_output" else self._limits_of(tenant).example_bytes
            await check_example_bytes(connection, tenant, len(content), limit, now=now)
            row = {"tenant": tenant, "digest": file.digest, "content": content}
            await connection.execute(insert_missing(connection, contents).values(row))
        await connection.execute(insert(tables.files).values(_row(file)))
        return file

    async def check_room(self, connection: AsyncConnection, tenant: str) -> None:
        """Checks that a tenant keeps fewer bytes than it may: before what is not refused once it is made.

        Raises:
            QuotaExceededError: it keeps as many, or more.
        """
        await check_example_bytes(connection, tenant, 1, self._limits_of(tenant).example_bytes, now=self._clock())

    @shielded
    async def get(self, tenant: str, file_id: str, *, param: str | None = None) -> File:
        """A file of a tenant.

        Args:
            param: the field of the request that names it.

        Raises:
            NotFoundError: unknown, expired or another tenant's.
        """
        _check_id(file_id, param)
        async with self._database.read() as connection:
            query = select(tables.files).where(*self._of(tenant), tables.files.c.id == file_id)
            row = (await connection.execute(query)).mappings().first()
        if row is None:
            raise _no_file(file_id, param)
        return File(**row)

    @shielded
    async def content(
        self, tenant: str, file_id: str, *, param: str | None = None, purpose: Purpose | None = None
    ) -> bytes:
        """What was uploaded, byte for byte; raises as `get`.

        Args:
            purpose: what it has to be for; None: anything.

        Raises:
            InvalidRequestError: it is for something else.
        """
        _check_id(file_id, param)
        contents = tables.file_contents
        same = (contents.c.tenant == tables.files.c.tenant) & (contents.c.digest == tables.files.c.digest)
        query = select(contents.c.content, tables.files.c.purpose).join(tables.files, same).where(*self._of(tenant))
        async with self._database.read() as connection:
            found = (await connection.execute(query.where(tables.files.c.id == file_id))).first()
        if found is None:
            raise _no_file(file_id, param)
        if purpose is not None:
            check_purpose(file_id, found.purpose, purpose, param=param)
        return bytes(found.content)

    @shielded
    async def list(
        self, tenant: str, *, after: str | None, limit: int, order: Order, purpose: str | None = None
    ) -> Page[File]:
        """The tenant's files by the moment they came, from behind `after` on."""
        check_cursor(after, PREFIX)
        of_tenant = select(tables.files).where(*self._of(tenant))
        if purpose is not None:
            of_tenant = of_tenant.where(tables.files.c.purpose == purpose)
        query = page_of(of_tenant, tables.files.c.id, after=after, limit=limit, order=order)
        return Page.of([File(**row) for row in await self._database.rows(query)], limit)

    @shielded
    async def delete(self, tenant: str, file_id: str) -> None:
        """Deletes a file, and its content where no other file of the tenant has it; raises as `get`."""
        _check_id(file_id, None)
        async with self._database.write() as connection:
            found = await self._remove(connection, *self._of(tenant), tables.files.c.id == file_id)
        if not found:
            raise _no_file(file_id, None)
        await self._database.truncate_wal()

    @shielded
    async def sweep(self) -> None:
        """Deletes the files that have expired, with their contents."""
        async with self._database.write() as connection:
            found = await self._remove(connection, tables.files.c.expires_at <= self._clock())
        if found:
            await self._database.truncate_wal()

    def _of(self, tenant: str) -> tuple[ColumnElement[bool], ...]:
        expires_at = tables.files.c.expires_at
        return (tables.files.c.tenant == tenant, or_(expires_at.is_(None), expires_at > self._clock()))

    async def _remove(self, connection: AsyncConnection, *conditions: ColumnElement[bool]) -> bool:
        files, contents = tables.files, tables.file_contents
        removed = await connection.execute(delete(files).where(*conditions).returning(files.c.tenant, files.c.digest))
        gone = {(row.tenant, row.digest) for row in removed}
        for tenant, digest in gone:
            still = exists().where(files.c.tenant == tenant, files.c.digest == digest)
            await connection.execute(
                delete(contents).where(contents.c.tenant == tenant, contents.c.digest == digest, ~still)
            )
        return bool(gone)


def check_purpose(file_id: str, purpose: str, wanted: Purpose, *, param: str | None) -> None:
    """Raises InvalidRequestError for a file that is for something else."""
    if purpose != wanted:
        raise InvalidRequestError(
            f"the file {file_id} was uploaded with the purpose {purpose!r}, and this takes one of {wanted!r}: upload "
            "it again",
            param=param,
        )


def _check_id(file_id: str, param: str | None) -> None:
    if not is_id(file_id, PREFIX):
        raise _no_file(file_id, param)


def _no_file(file_id: str, param: str | None) -> NotFoundError:
    return NotFoundError(
        f"there is no file {file_id!r}; GET /v1/files lists those there are", param=param, code="file_not_found"
    )


def _row(file: File) -> dict[str, Any]:
    return {column.name: getattr(file, column.name) for column in tables.files.columns}
