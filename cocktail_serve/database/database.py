"""SQLite (one file, WAL) or PostgreSQL by URL: opened, brought up to date, read, written, closed."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from filelock import FileLock, Timeout
from sqlalchemy import event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from cocktail_serve.database.migrations import migrate
from cocktail_serve.database.unbroken import Unbroken
from cocktail_serve.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

_SERVER_LOCK = 0x636F636B
"""Advisory lock of PostgreSQL that the server holds which works with the database (the bytes of `cock`)."""

_MIGRATION_LOCK = _SERVER_LOCK + 1

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Database:
    """One database and its connections.

    Every write is on disk when its block ends. Every method raises StorageError when the database refuses.

    Args:
        url: SQLAlchemy URL with or without the driver: `sqlite:///path`, `postgresql://user@host/name`.

    Raises:
        ConfigError: not a URL, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            self.url = async_url(url)
            # a server may close connections that idle: look before use
            self._engine: AsyncEngine = create_async_engine(self.url, pool_pre_ping=not self.is_sqlite)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"store.url needs the driver {error.name!r}; install it: pip install 'cocktail-serve[postgres]'",
                param="store.url",
            ) from error
        except (ArgumentError, NoSuchModuleError, ValueError) as error:
            raise ConfigError(f"store.url cannot be used: {error}", param="store.url") from error
        if self.is_sqlite:
            event.listen(self._engine.sync_engine, "connect", _set_up_sqlite)
        self._writing = asyncio.Lock()
        self._unbroken = Unbroken()
        self._file_lock: FileLock | None = None
        self._lock_holder: AsyncConnection | None = None

    async def open(self, *, exclusive: bool = True) -> None:
        """Connects, and creates or upgrades the tables.

        Args:
            exclusive: as the one server that works with the database. A command that only reads or adds a row opens it
                beside a server, and then changes no table that holds something.

        Raises:
            StorageError: the database cannot be opened, another server has it, or another release wrote its tables.
        """
        try:
            if self._path is not None:
                self._prepare_file(self._path, exclusive=exclusive)
            if exclusive and not self.is_sqlite:
                await self._own_server()
            await self._migrate(may_change=exclusive)
        except StorageError:
            await self.close()
            raise

    async def close(self) -> None:
        """Waits for what is being written and closes every connection. May be called twice."""
        await self._unbroken.drain()
        if self._lock_holder is not None:
            with _translated():
                await self._lock_holder.close()
            self._lock_holder = None
        await self._engine.dispose()
        if self._file_lock is not None:
            self._file_lock.release()

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection to read from."""
        with _translated():
            async with self._engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction that is committed when the block ends, and rolled back if it raises."""
        # one writer at a time: SQLite allows no more, and a reader that turns writer would fail at once, not wait
        async with self._writing:
            with _translated():
                async with self._engine.begin() as connection:
                    yield connection

    async def to_the_end(self, change: Coroutine[Any, Any, _T]) -> _T:
        """Awaits a coroutine that goes on when the caller is cancelled; `close` waits for it."""
        return await self._unbroken.run(change)

    async def truncate_wal(self) -> None:
        """Deleted text also stands in SQLite's write-ahead log until it is checkpointed."""
        if not self.is_sqlite:
            return
        try:
            async with self._engine.connect() as connection:
                await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        except SQLAlchemyError as error:
            # the deletion itself is done; the next checkpoint takes the log
            logger.warning("the registry's log could not be truncated: %s", getattr(error, "orig", error))

    @property
    def _path(self) -> Path | None:
        is_file = self.is_sqlite and self.url.database not in (None, "", ":memory:")
        return Path(str(self.url.database)) if is_file else None

    def _prepare_file(self, path: Path, *, exclusive: bool) -> None:
        """Two servers on one file would each show the other's past, and end each other's jobs."""
        lock = FileLock(f"{path}.lock", timeout=0) if exclusive else None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if lock is not None:
                lock.acquire()
            # examples are their tenants' alone; SQLite gives its log files the mode of the database
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except Timeout as error:
            raise _in_use(str(path), "another file") from error
        except OSError as error:
            raise StorageError(f"the registry {path} cannot be opened: {error.strerror}; check store.url") from error
        self._file_lock = lock

    async def _own_server(self) -> None:
        """The lock is the connection's: it goes when this process does."""
        with _translated():
            holder = await self._engine.connect()
            self._lock_holder = await holder.execution_options(isolation_level="AUTOCOMMIT")
            taken = await holder.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": _SERVER_LOCK})
            if not taken.scalar_one():
                raise _in_use(self.url.render_as_string(hide_password=True), "another database")

    async def _migrate(self, *, may_change: bool) -> None:
        with _translated():
            async with self._engine.connect() as connection, self._alone(connection):
                await connection.run_sync(functools.partial(migrate, may_change=may_change))
                await connection.commit()

    @asynccontextmanager
    async def _alone(self, connection: AsyncConnection) -> AsyncIterator[None]:
        """One process migrates; others wait, and then find nothing left to do."""
        if not self.is_sqlite:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            yield
            return
        # a table that is copied to change it must not take with it the rows that refer to it
        await connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        await connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            await connection.rollback()
            await connection.exec_driver_sql("PRAGMA foreign_keys = ON")


class HasDatabase(Protocol):
    """Something that keeps rows in a database."""

    _database: Database


_Owner = TypeVar("_Owner", bound=HasDatabase)


def to_the_end(
    method: Callable[Concatenate[_Owner, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[_Owner, _P], Coroutine[Any, Any, _T]]:
    """A cancelled caller leaves; the transaction still ends, so no connection is abandoned halfway."""

    @functools.wraps(method)
    async def run(self: _Owner, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await self._database.to_the_end(method(self, *args, **kwargs))

    return run


def async_url(url: str) -> URL:
    """A database URL with a driver that awaits, where it names none."""
    parsed = make_url(url)
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
    return parsed.set(drivername=drivers.get(parsed.drivername, parsed.drivername))


def _in_use(place: str, other: str) -> StorageError:
    return StorageError(f"another server uses the registry {place}; stop it, or set store.url to {other}")


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
    except Exception as error:
        if not _is_the_databases(error):
            raise
        # the statement and its parameters, and the second line of PostgreSQL's messages, would carry examples into the
        # message and the log
        cause = str(getattr(error, "orig", None) or f"{type(error).__name__}: {error}").partition("\n")[0]
        logger.error("the registry refused: %s", cause)
        if "disk is full" in cause or "No space left" in cause:
            hint = "its disk is full; free some space and send the request again"
        elif "readonly" in cause or "read-only" in cause:
            hint = "it is read-only; give the server's user the right to write it"
        else:
            hint = f"it refused ({cause})"
        raise StorageError(f"the registry could not be used: {hint}. Nothing was changed.") from error


def _is_the_databases(error: Exception) -> bool:
    """SQLAlchemy hands on unwrapped what asyncpg raises while it connects."""
    return isinstance(error, SQLAlchemyError | OSError) or type(error).__module__.startswith("asyncpg.")
