"""What must survive a restart: cocktails, their examples, pins, and the scores kept to be used again."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    delete,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.engine import URL, RowMapping, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from cocktail_serve.cocktails.cocktail import Cocktail, Failure
from cocktail_serve.cocktails.request import CocktailOptions
from cocktail_serve.cocktails.unbroken import Unbroken
from cocktail_serve.errors import ConfigError, StorageError
from cocktail_serve.examples import ExampleSet
from cocktail_serve.recipe import Recipe

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1

_schema = MetaData()
_DIGEST = String(64)
_TENANT = String(255)

_info = Table("schema_info", _schema, Column("version", Integer, primary_key=True))

_cocktails = Table(
    "cocktails",
    _schema,
    Column("uid", String(32), primary_key=True),
    Column("tenant", _TENANT, nullable=False),
    Column("name", String(64), nullable=False),
    Column("pool_id", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("digest", _DIGEST, nullable=False),
    Column("request", JSON, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("ready_at", Float(53)),
    Column("used_at", Float(53), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("progress", Float(53), nullable=False),
    Column("losses", JSON, nullable=False),
    Column("merging_weights", JSON(none_as_null=True)),
    Column("entropy", Float(53)),
    Column("mixed_loss", Float(53)),
    Column("recipe", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("warnings", JSON, nullable=False),
    UniqueConstraint("tenant", "name", "digest"),
)

_uid_of_cocktail = functools.partial(ForeignKey, "cocktails.uid", ondelete="CASCADE")

_examples = Table(
    "examples",
    _schema,
    Column("uid", String(32), _uid_of_cocktail(), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("body", JSON, nullable=False),
)

_items = Table(
    "items",
    _schema,
    Column("uid", String(32), _uid_of_cocktail(), primary_key=True),
    Column("item", _DIGEST, primary_key=True),
    Index("ix_items_item", "item"),
)
"""What a cocktail's scores are kept under (an example's or a text's digest), so that deletion finds them."""

_pins = Table(
    "pins",
    _schema,
    Column("tenant", _TENANT, primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("uid", String(32), _uid_of_cocktail(), nullable=False),
)


def _score_table(name: str, *value: Column[Any]) -> Table:
    return Table(
        name,
        _schema,
        Column("tenant", _TENANT, primary_key=True),
        Column("item", _DIGEST, primary_key=True),
        Column("model", _DIGEST, primary_key=True),
        Column("variant", _DIGEST, primary_key=True),
        *value,
    )


_losses = _score_table("losses", Column("loss", Float(53), nullable=False))
_embeddings = _score_table("embeddings", Column("vector", LargeBinary, nullable=False))


@dataclass(frozen=True, slots=True)
class ScoreKey:
    """What a score depends on besides the text.

    Attributes:
        model: fingerprint of the parameters.
        variant: digest of how it was made: version of the loss, tokenizer and modules, dtype, truncation.
    """

    model: str
    variant: str


_IN_CLAUSE = 500
"""Parameters of one IN list: well under SQLite's and PostgreSQL's limits on bound variables."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _to_the_end(
    method: Callable[Concatenate[Store, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[Store, _P], Coroutine[Any, Any, _T]]:
    """A cancelled caller leaves; the transaction still ends, so no connection is abandoned halfway."""

    @functools.wraps(method)
    async def run(self: Store, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await self._unbroken.run(method(self, *args, **kwargs))

    return run


class Store:
    """The tables, on SQLite (one file, WAL) or a server by URL. One process owns them.

    Every write is on disk when its coroutine returns. Every method raises StorageError when the database refuses.

    Args:
        url: SQLAlchemy URL with or without the driver: `sqlite:///path`, `postgresql://...`.

    Raises:
        ConfigError: not a URL, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            self.url = async_url(url)
            self._engine: AsyncEngine = create_async_engine(self.url)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, ValueError) as error:
            raise ConfigError(f"store.url cannot be used: {error}", param="store.url") from error
        if self._is_sqlite:
            event.listen(self._engine.sync_engine, "connect", _set_up_sqlite)
        self._writing = asyncio.Lock()
        self._unbroken = Unbroken()
        self._owned: FileLock | None = None

    async def open(self) -> None:
        """Creates what is missing.

        Raises:
            StorageError: the database cannot be opened, or another release wrote its tables.
        """
        if self._is_sqlite and self.url.database not in (None, "", ":memory:"):
            self._own(Path(str(self.url.database)))
        try:
            await self._create_tables()
        except StorageError:
            await self.close()
            raise

    async def close(self) -> None:
        """Waits for what is being written and closes every connection. May be called twice."""
        await self._unbroken.drain()
        await self._engine.dispose()
        if self._owned is not None:
            self._owned.release()

    @_to_the_end
    async def load(self) -> tuple[list[Cocktail], dict[tuple[str, str], str]]:
        """All cocktails in the order they were asked for, and the uid that each pinned `(tenant, name)` means."""
        async with self._read() as connection:
            rows = (await connection.execute(select(_cocktails).order_by(_cocktails.c.sequence))).mappings().all()
            pins = (await connection.execute(select(_pins))).all()
        return [_cocktail(row) for row in rows], {(pin.tenant, pin.name): pin.uid for pin in pins}

    @_to_the_end
    async def add(self, cocktail: Cocktail, examples: ExampleSet | None, items: Sequence[str]) -> None:
        """Writes a new cocktail with its examples and the keys its scores will be kept under."""
        async with self._write() as connection:
            await connection.execute(insert(_cocktails).values(_row(cocktail)))
            if examples is not None:
                rows = [
                    {"uid": cocktail.uid, "position": position, "body": body}
                    for position, body in enumerate(examples.to_json())
                ]
                await connection.execute(insert(_examples), rows)
            if items:
                await connection.execute(
                    insert(_items), [{"uid": cocktail.uid, "item": item} for item in dict.fromkeys(items)]
                )

    @_to_the_end
    async def update(self, cocktail: Cocktail) -> None:
        """Overwrites a cocktail's row; does nothing where it has been deleted."""
        row = _row(cocktail)
        async with self._write() as connection:
            await connection.execute(update(_cocktails).where(_cocktails.c.uid == row.pop("uid")).values(row))

    @_to_the_end
    async def touch(self, used_at: Mapping[str, float]) -> None:
        """Writes when cocktails were last used, by uid."""
        async with self._write() as connection:
            for uid, moment in used_at.items():
                await connection.execute(update(_cocktails).where(_cocktails.c.uid == uid).values(used_at=moment))

    @_to_the_end
    async def pin(self, tenant: str, name: str, uid: str | None) -> None:
        """Pins a name to a version, or removes the pin."""
        async with self._write() as connection:
            await connection.execute(delete(_pins).where(_pins.c.tenant == tenant, _pins.c.name == name))
            if uid is not None:
                await connection.execute(insert(_pins).values(tenant=tenant, name=name, uid=uid))

    @_to_the_end
    async def delete(self, tenant: str, uids: Sequence[str]) -> None:
        """Deletes cocktails of a tenant with their examples, and the scores that no other of its cocktails needs."""
        async with self._write() as connection:
            for some in _chunks(uids):
                going = select(_items.c.item).where(_items.c.uid.in_(some))
                staying = (
                    select(_items.c.item)
                    .join(_cocktails, _cocktails.c.uid == _items.c.uid)
                    .where(_cocktails.c.tenant == tenant, _cocktails.c.uid.not_in(some))
                )
                for scores in (_losses, _embeddings):
                    await connection.execute(
                        delete(scores).where(
                            scores.c.tenant == tenant, scores.c.item.in_(going), scores.c.item.not_in(staying)
                        )
                    )
                for table in (_pins, _items, _examples, _cocktails):
                    await connection.execute(delete(table).where(table.c.uid.in_(some)))
        if self._is_sqlite:
            await self._truncate_wal()

    @_to_the_end
    async def examples(self, uid: str) -> list[dict[str, Any]]:
        """The examples of a cocktail as JSON rows, in order; empty where there are none."""
        query = select(_examples.c.body).where(_examples.c.uid == uid).order_by(_examples.c.position)
        async with self._read() as connection:
            return list((await connection.execute(query)).scalars())

    @_to_the_end
    async def losses(self, tenant: str, key: ScoreKey, items: Sequence[str]) -> dict[str, float]:
        """Losses kept for these examples of one model, by example digest."""
        return await self._kept(_losses, _losses.c.loss, tenant=tenant, key=key, items=items)

    @_to_the_end
    async def keep_losses(self, uid: str, key: ScoreKey, losses: Mapping[str, float]) -> None:
        """Keeps losses measured for a cocktail; nothing where it has been deleted meanwhile."""
        await self._keep(_losses, "loss", uid=uid, key=key, values=losses)

    @_to_the_end
    async def embeddings(self, tenant: str, key: ScoreKey, items: Sequence[str]) -> dict[str, np.ndarray]:
        """Embeddings kept for these texts under one model, `[D]` float32, by text digest."""
        kept = await self._kept(_embeddings, _embeddings.c.vector, tenant=tenant, key=key, items=items)
        return {item: np.frombuffer(vector, dtype="<f4") for item, vector in kept.items()}

    @_to_the_end
    async def keep_embeddings(self, uid: str, key: ScoreKey, vectors: Mapping[str, np.ndarray]) -> None:
        """Keeps embeddings made for a cocktail; nothing where it has been deleted meanwhile."""
        packed = {item: np.ascontiguousarray(vector, dtype="<f4").tobytes() for item, vector in vectors.items()}
        await self._keep(_embeddings, "vector", uid=uid, key=key, values=packed)

    async def _create_tables(self) -> None:
        async with self._write() as connection:
            await connection.run_sync(_schema.create_all)
            found = (await connection.execute(select(_info.c.version))).scalar_one_or_none()
            if found is None:
                await connection.execute(insert(_info).values(version=SCHEMA_VERSION))
        if found not in (None, SCHEMA_VERSION):
            raise StorageError(
                f"the registry's tables are of version {found} and this release reads version {SCHEMA_VERSION}; "
                "use the release that wrote them, or set store.url to a new place"
            )

    async def _kept(
        self, table: Table, value: Column[Any], *, tenant: str, key: ScoreKey, items: Sequence[str]
    ) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        async with self._read() as connection:
            for some in _chunks(items):
                query = select(table.c.item, value).where(*_score_key(table, tenant, key, some))
                kept.update((row[0], row[1]) for row in await connection.execute(query))
        return kept

    async def _keep(self, table: Table, column: str, *, uid: str, key: ScoreKey, values: Mapping[str, Any]) -> None:
        async with self._write() as connection:
            owner = await connection.execute(select(_cocktails.c.tenant).where(_cocktails.c.uid == uid))
            tenant = owner.scalar_one_or_none()
            if tenant is None:
                return
            # two jobs may have measured the same: the first to come keeps its value
            present: set[str] = set()
            for some in _chunks(list(values)):
                query = select(table.c.item).where(*_score_key(table, tenant, key, some))
                present.update((await connection.execute(query)).scalars())
            rows = [
                {"tenant": tenant, "item": item, "model": key.model, "variant": key.variant, column: value}
                for item, value in values.items()
                if item not in present
            ]
            if rows:
                await connection.execute(insert(table), rows)

    async def _truncate_wal(self) -> None:
        """Deleted text also stands in the write-ahead log until it is checkpointed."""
        try:
            async with self._engine.connect() as connection:
                await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        except SQLAlchemyError as error:
            # the deletion itself is done; the next checkpoint takes the log
            logger.warning("the registry's log could not be truncated: %s", getattr(error, "orig", error))

    def _own(self, path: Path) -> None:
        """Two servers on one file would each show the other's past, and end each other's jobs."""
        lock = FileLock(f"{path}.lock", timeout=0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            # examples are their tenants' alone; SQLite gives its log files the mode of the database
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except Timeout as error:
            raise StorageError(
                f"another server uses the registry {path}; stop it, or set store.url to another file"
            ) from error
        except OSError as error:
            raise StorageError(f"the registry {path} cannot be opened: {error.strerror}; check store.url") from error
        self._owned = lock

    @property
    def _is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @asynccontextmanager
    async def _read(self) -> AsyncIterator[AsyncConnection]:
        with _translated():
            async with self._engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[AsyncConnection]:
        # one writer at a time: SQLite allows no more, and a reader that turns writer would fail at once, not wait
        async with self._writing:
            with _translated():
                async with self._engine.begin() as connection:
                    yield connection


def async_url(url: str) -> URL:
    """A database URL with a driver that awaits, where it names none."""
    parsed = make_url(url)
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
    return parsed.set(drivername=drivers.get(parsed.drivername, parsed.drivername))


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in (
        "busy_timeout = 10000",
        "journal_mode = WAL",
        "synchronous = FULL",  # with NORMAL a power cut may take the last commits, which were announced
        "foreign_keys = ON",
        "secure_delete = ON",  # deleted examples leave the file, not only its index
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        # the statement and its parameters would carry examples into the message and the log
        cause = str(getattr(error, "orig", None) or type(error).__name__)
        logger.error("the registry refused: %s", cause)
        if "disk is full" in cause:
            hint = "its disk is full; free some space and send the request again"
        elif "readonly" in cause or "read-only" in cause:
            hint = "it is read-only; give the server's user the right to write it"
        else:
            hint = f"it refused ({cause})"
        raise StorageError(f"the registry could not be used: {hint}. Nothing was changed.") from error


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _IN_CLAUSE):
        yield values[start : start + _IN_CLAUSE]


def _score_key(table: Table, tenant: str, key: ScoreKey, items: Sequence[str]) -> list[Any]:
    return [
        table.c.tenant == tenant,
        table.c.model == key.model,
        table.c.variant == key.variant,
        table.c.item.in_(items),
    ]


def _row(cocktail: Cocktail) -> dict[str, Any]:
    return {
        "uid": cocktail.uid,
        "tenant": cocktail.tenant,
        "name": cocktail.name,
        "pool_id": cocktail.pool_id,
        "kind": cocktail.kind,
        "digest": cocktail.digest,
        "request": cocktail.request.to_json(),
        "created_at": cocktail.created_at,
        "ready_at": cocktail.ready_at,
        "used_at": cocktail.used_at,
        "sequence": cocktail.sequence,
        "status": cocktail.status,
        "progress": cocktail.progress,
        "losses": dict(cocktail.losses),
        "merging_weights": None if cocktail.merging_weights is None else dict(cocktail.merging_weights),
        "entropy": cocktail.entropy,
        "mixed_loss": cocktail.mixed_loss,
        "recipe": None if cocktail.recipe is None else cocktail.recipe.to_json(),
        "error": None if cocktail.error is None else cocktail.error.to_json(),
        "warnings": list(cocktail.warnings),
    }


def _cocktail(row: RowMapping) -> Cocktail:
    values = dict(row)
    return Cocktail(
        **{
            **values,
            "request": CocktailOptions.from_json(values["request"]),
            "recipe": None if values["recipe"] is None else Recipe.from_json(values["recipe"]),
            "error": None if values["error"] is None else Failure(**values["error"]),
            "warnings": tuple(values["warnings"]),
        }
    )
