"""SQLite (one file, WAL) or PostgreSQL by URL: opened, brought up to date, read, written, closed."""

from __future__ import annotations

import asyncio
import functools
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, Table, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, RowMapping, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from cocktail_serve.database.migrations import head, migrate, revision_to_change
from cocktail_serve.database.shield import Shield
from cocktail_serve.database.sqlite_file import BUSY_S, QUICK_CHECK, SQLiteFile, damage_told
from cocktail_serve.errors import ConfigError, InvalidRequestError, StorageError

logger = logging.getLogger(__name__)

_SERVER_LOCK = 0x636F636B
"""Advisory lock of PostgreSQL that every server shares while it works with the database (the bytes of `cock`)."""

_MIGRATION_LOCK = _SERVER_LOCK + 1

_CONNECT_S = 10.0
_STATEMENT_S = 30.0
_IDLE_IN_TRANSACTION_S = 10.0
"""A process that is stopped in the middle of a transaction holds rows that others need: PostgreSQL ends it then."""

_NUL_IN_TEXT = "22021"
"""What PostgreSQL says of a NUL character, `character_not_in_repertoire`; SQLite takes it."""

_IN_CLAUSE = 500
"""Parameters of one IN list: well under SQLite's and PostgreSQL's limits on bound variables."""

DatabaseURL = URL | str
"""Of SQLAlchemy; as one object where it names a file whose path no text can."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Database:
    """One database and its connections.

    Every write is on disk when its block ends. Every method raises StorageError when the database refuses.

    Args:
        url: of SQLAlchemy, with or without the driver: `sqlite:///path`, `postgresql://user@host/name`.

    Raises:
        ConfigError: not a URL, or its driver is not installed.
    """

    def __init__(self, url: DatabaseURL) -> None:
        try:
            self.url = async_url(url)
            # a server may close connections that idle: look before use
            self._engine: AsyncEngine = create_async_engine(
                self.url, pool_pre_ping=not self.is_sqlite, connect_args=_connect_args(self.url)
            )
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"store.url needs the driver {error.name!r}; install it: pip install 'cocktail-serve[postgres]'",
                param="store.url",
            ) from error
        except (ArgumentError, NoSuchModuleError, ValueError) as error:
            raise ConfigError(f"store.url cannot be used: {error}", param="store.url") from error
        self._file: SQLiteFile | None = None
        if self.is_sqlite:
            if self.url.database not in (None, "", ":memory:"):
                self._file = SQLiteFile(Path(str(self.url.database)))
                event.listen(self._engine.sync_engine, "do_connect", _named_by(self._file.uri))
            event.listen(self._engine.sync_engine, "connect", _set_up_sqlite)
            event.listen(self._engine.sync_engine, "begin", _begin_sqlite)
        self._unbegun = self._engine.execution_options(**{_BEGIN: ""})
        self._writers = self._engine.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"})
        self._writing = asyncio.Lock()
        self._shield = Shield()
        self._lock_holder: AsyncConnection | None = None

    async def open(self, *, as_server: bool = True, may_make: bool = True, is_checked: bool = False) -> None:
        """Connects, and creates or upgrades the tables. Of a file that is upgraded, a copy is left beside it.

        Args:
            as_server: as one of the servers that work with the database; only a server that has it alone changes tables
                that hold something. A command that reads or adds a row changes no such table.
            may_make: whether a file and tables are made where there are none.
            is_checked: whether a file is read as a whole first, to find damage.

        Raises:
            StorageError: the database is missing, damaged, or cannot be opened; another release wrote its tables, or
                works with them.
        """
        try:
            with _translated(self._place, is_told=False):
                if self._file is not None:
                    self._file.open(may_make=may_make)
                await self._migrate(as_server=as_server, may_make=may_make, is_checked=is_checked)
        except StorageError:
            await self.close()
            raise

    async def close(self) -> None:
        """Waits for what is being written and closes every connection. May be called twice."""
        await self._shield.until_done()
        await self._drop_lock_holder()
        await self._engine.dispose()
        if self._file is not None:
            self._file.close()

    async def hold(self) -> None:
        """Shares the servers' lock again after the database's server was gone, which forgot who held it."""
        if self.is_sqlite:
            return  # the lock is this process's own
        if self._lock_holder is not None:
            try:
                with _translated(self._place):
                    await self._lock_holder.execute(text("SELECT 1"))
                return
            except StorageError:
                await self._drop_lock_holder()
        await self._share_server()

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    def reason_lost(self) -> str:
        """Why the database that was opened is not there any more, and does not come back by itself; empty: it is, or it
        is a server's, which may be gone for a while."""
        return "" if self._file is None else self._file.reason_lost()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection to read from."""
        self._check_file()
        with _translated(self._place):
            async with self._engine.connect() as connection:
                yield connection

    async def rows(self, query: Select[Any]) -> Sequence[RowMapping]:
        """All that one query finds."""
        async with self.read() as connection:
            found: Sequence[RowMapping] = (await connection.execute(query)).mappings().all()
        return found

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction that is committed when the block ends, and rolled back if it raises.

        SQLite gives one process at a time the right to write, from the block's first statement on, so what the block
        has read still holds when it writes. On PostgreSQL others write at the same time: a block that decides by what
        it read locks the rows first.
        """
        async with self._writing:
            self._check_file()
            with _translated(self._place):
                async with self._writers.begin() as connection:
                    yield connection

    async def run_shielded(self, change: Coroutine[Any, Any, _T]) -> _T:
        """Awaits a coroutine that goes on when the caller is cancelled; `close` waits for it."""
        return await self._shield.run(change)

    async def truncate_wal(self) -> None:
        """Deleted text also stands in SQLite's write-ahead log until it is checkpointed."""
        if not self.is_sqlite:
            return
        try:
            async with self._unbegun.connect() as connection:
                await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        except SQLAlchemyError as error:
            # the deletion itself is done; the next checkpoint takes the log
            logger.warning("the registry's log could not be truncated: %s", getattr(error, "orig", error))

    @property
    def _place(self) -> str:
        """How messages name it."""
        return str(self._file.path) if self._file else self.url.render_as_string(hide_password=True)

    def _check_file(self) -> None:
        if self._file is not None:
            self._file.check()

    async def _share_server(self) -> None:
        """Takes a share of the servers' lock: none of them changes tables beneath the others."""
        if self._file is not None:
            is_ours = self._file.share()
        else:
            is_ours = self.is_sqlite or await self._advisory_lock("pg_try_advisory_lock_shared")
        if not is_ours:
            raise self._in_use()

    async def _own_server(self) -> None:
        """Raises StorageError unless no other server works with the database; then none may begin to."""
        if self._file is not None:
            is_ours = self._file.own()
        else:
            is_ours = self.is_sqlite or await self._advisory_lock("pg_try_advisory_lock")
        if not is_ours:
            raise self._in_use()

    async def _release_server(self) -> None:
        if self._file is not None:
            self._file.release()
        await self._drop_lock_holder()

    async def _advisory_lock(self, function: str) -> bool:
        """The lock is the connection's: it goes when this process does."""
        with _translated(self._place):
            if self._lock_holder is None:
                holder = await self._engine.connect()
                self._lock_holder = await holder.execution_options(isolation_level="AUTOCOMMIT")
            taken = await self._lock_holder.execute(text(f"SELECT {function}(:key)"), {"key": _SERVER_LOCK})
            return bool(taken.scalar_one())

    async def _drop_lock_holder(self) -> None:
        holder, self._lock_holder = self._lock_holder, None
        if holder is not None:
            try:
                # its end is what frees the lock: back in the pool it would keep it
                await holder.invalidate()
                await holder.close()
            except Exception as error:
                if not _is_the_databases(error):
                    raise

    def _in_use(self) -> StorageError:
        return StorageError(
            f"the registry {self._place} needs other tables for this release, or another release is changing them, "
            "while servers work with it; stop them first"
        )

    async def _migrate(self, *, as_server: bool, may_make: bool, is_checked: bool) -> None:
        async with self._unbegun.connect() as connection, self._alone(connection):
            if is_checked and self._file is not None:
                verdict = (await connection.exec_driver_sql(QUICK_CHECK)).scalar_one()
                if damage := damage_told(verdict):
                    raise _damaged(self._place, damage)
            find = functools.partial(revision_to_change, may_change=as_server, may_make=may_make)
            revision = await connection.run_sync(find)
            if revision is not None:
                await self._own_server()
                await self._keep_copy(revision)
            await connection.run_sync(migrate)
            await connection.commit()
            if revision is not None:
                await self._release_server()
            if as_server:
                await self._share_server()

    async def _keep_copy(self, revision: str) -> None:
        """Before tables that hold something are changed."""
        told = ("the registry %s is upgraded from revision %s to %s; ", self._place, revision, head())
        if self._file is None:
            logger.warning(f"{told[0]}no copy of it is made here", *told[1:])
            return
        copy = await asyncio.to_thread(self._file.keep_copy, revision)
        logger.warning(
            f"{told[0]}as it was, it is in %s: delete that once you do not go back, what is deleted from now on is "
            "still in it",
            *told[1:],
            copy,
        )

    @asynccontextmanager
    async def _alone(self, connection: AsyncConnection) -> AsyncIterator[None]:
        """One process migrates; others wait, and then find nothing left to do."""
        if not self.is_sqlite:
            # held by the session: the tables are committed before it ends
            await connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _MIGRATION_LOCK})
            try:
                yield
            finally:
                await connection.rollback()
                await connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _MIGRATION_LOCK})
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


def shielded(
    method: Callable[Concatenate[_Owner, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[_Owner, _P], Coroutine[Any, Any, _T]]:
    """A cancelled caller leaves; the transaction still ends, so no connection is abandoned halfway."""

    @functools.wraps(method)
    async def run(self: _Owner, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await self._database.run_shielded(method(self, *args, **kwargs))

    return run


def async_url(url: DatabaseURL) -> URL:
    """A database URL with a driver that awaits, where it names none."""
    parsed = make_url(url)
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
    return parsed.set(drivername=drivers.get(parsed.drivername, parsed.drivername))


def insert_or(connection: AsyncConnection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that can be told, by its `on_conflict_...`, what becomes of rows whose key is there already."""
    return sqlite.insert(table) if connection.dialect.name == "sqlite" else postgresql.insert(table)


def insert_missing(connection: AsyncConnection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that leaves out rows whose key is there already: another process may have written them just now."""
    return insert_or(connection, table).on_conflict_do_nothing()


def page_of(
    query: Select[Any], key: ColumnElement[Any], *, after: Any, limit: int, order: Literal["asc", "desc"] = "desc"
) -> Select[Any]:
    """A query for a part of its rows, and for one more, which tells that there are further ones.

    Args:
        key: what the rows are in order of.
        after: of the row to begin behind; None: at the first.
    """
    is_rising = order == "asc"
    if after is not None:
        query = query.where(key > after if is_rising else key < after)
    return query.order_by(key.asc() if is_rising else key.desc()).limit(limit + 1)


def chunks(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Parts of a list that one IN clause takes."""
    for start in range(0, len(values), _IN_CLAUSE):
        yield values[start : start + _IN_CLAUSE]


_BEGIN = "cocktail_begin"
"""Execution option: the statement that begins a transaction on SQLite; empty: none."""


def _connect_args(url: URL) -> dict[str, Any]:
    if url.drivername == "sqlite+aiosqlite":
        return {"isolation_level": None, "timeout": BUSY_S}  # transactions begin as `_begin_sqlite` says
    if url.drivername == "postgresql+asyncpg":
        idle = {"idle_in_transaction_session_timeout": str(int(_IDLE_IN_TRANSACTION_S * 1000))}
        return {"timeout": _CONNECT_S, "command_timeout": _STATEMENT_S, "server_settings": idle}
    return {}


def _begin_sqlite(connection: Connection) -> None:
    if statement := connection.get_execution_options().get(_BEGIN, "BEGIN"):
        connection.exec_driver_sql(statement)


def _named_by(uri: str) -> Callable[..., None]:
    """Has connections open what a URI of SQLite names: by a path alone they would make the file where it is missing."""

    def name(_dialect: Any, _record: Any, args: list[Any], options: dict[str, Any]) -> None:
        args[0] = uri
        options["uri"] = True

    return name


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {int(BUSY_S * 1000)}",
        "synchronous = FULL",  # with NORMAL a power cut may take the last commits, which were announced
        "foreign_keys = ON",
        "secure_delete = ON",  # deleted examples leave the file, not only its index
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


@contextmanager
def _translated(place: str, *, is_told: bool = True) -> Iterator[None]:
    """What the database raises, as errors of ours.

    Args:
        place: the database, for messages.
        is_told: whether the log has it too.
    """
    try:
        yield
    except Exception as error:
        if _is_about_text(error):
            raise InvalidRequestError(
                "a text holds a NUL character or a lone surrogate, which no registry takes. Nothing was changed."
            ) from error
        if not _is_the_databases(error):
            raise
        # the statement and its parameters, and the second line of PostgreSQL's messages, would carry examples into the
        # message and the log
        cause = str(getattr(error, "orig", None) or f"{type(error).__name__}: {error}").partition("\n")[0]
        if is_told:
            logger.error("the registry refused: %s", cause)
        if "image is malformed" in cause or "file is not a database" in cause:
            raise _damaged(place, cause) from error
        if "disk is full" in cause or "No space left" in cause:
            hint = "its disk is full; free some space and send the request again"
        elif "readonly" in cause or "read-only" in cause:
            hint = "it is read-only; give the server's user the right to write it"
        else:
            hint = f"it refused ({cause})"
        raise StorageError(f"the registry could not be used: {hint}. Nothing was changed.") from error


def _damaged(place: str, damage: str) -> StorageError:
    return StorageError(
        f"the registry {place} is damaged ({damage}): end the servers that use it, and put a copy in its place "
        "(docs/how-to/backup-and-upgrade.md says how). Nothing was changed."
    )


def _is_the_databases(error: Exception) -> bool:
    """SQLAlchemy hands on unwrapped what asyncpg raises while it connects."""
    return isinstance(error, SQLAlchemyError | sqlite3.Error | OSError) or type(error).__module__.startswith("asyncpg.")


def _is_about_text(error: BaseException | None) -> bool:
    """Whether a value is no text: asyncpg says of a surrogate only by its cause that it could not be encoded."""
    while error is not None:
        if isinstance(error, UnicodeEncodeError) or getattr(error, "sqlstate", None) == _NUL_IN_TEXT:
            return True
        error = error.__cause__
    return False
