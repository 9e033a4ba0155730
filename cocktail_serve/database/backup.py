"""A copy of the registry, made while servers work with it."""

from __future__ import annotations

import os
import shlex
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from cocktail_serve.database.database import DatabaseURL
from cocktail_serve.database.migrations import FIRST_REVISION
from cocktail_serve.database.sqlite_file import copy_database, no_registry
from cocktail_serve.errors import ConfigError, InvalidRequestError, StorageError

_COUNTED = ("cocktails", "keys", "files", "fine_tuning_jobs", "experts")
"""Tables whose rows tell a reader what a copy is of."""

_HEADER = b"SQLite format 3\x00"


@dataclass(frozen=True, slots=True)
class Backup:
    """A copy that was made, and checked.

    Attributes:
        registry: what it is of.
        path: the copy.
        num_bytes: its size.
        revision: of its tables.
        counts: rows of the tables that a reader knows.
    """

    registry: Path
    path: Path
    num_bytes: int
    revision: str
    counts: Mapping[str, int]


def back_up(url: DatabaseURL, copy: Path, *, overwrite: bool = False) -> Backup:
    """Copies a registry as it is at one moment, of whatever release its tables are. Blocks.

    Args:
        url: of the registry.
        copy: the file to make.
        overwrite: whether an earlier copy at its place is replaced, by a whole one.

    Raises:
        ConfigError: the registry is in no file; says what copies it.
        InvalidRequestError: something is in the copy's place.
        StorageError: there is no registry, it is damaged, or the copy cannot be written.
    """
    registry = _file_of(make_url(url), copy)
    if not registry.exists():
        raise no_registry(registry)
    _check_place(copy, registry, overwrite=overwrite)
    try:
        _revision_of(registry)
    except sqlite3.Error as error:
        raise StorageError(f"the registry {registry} cannot be copied to {copy}: {error}") from error
    copy_database(registry, copy)
    with closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        tables = _tables_of(connection)
        # names of tables cannot be parameters; these are ours
        counts = {
            name: int(connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0]) if name in tables else 0
            for name in _COUNTED
        }
    return Backup(registry, copy, copy.stat().st_size, _revision_of(copy), counts)


def _file_of(url: URL, copy: Path) -> Path:
    backend = url.get_backend_name()
    if backend == "postgresql":
        place = URL.create("postgresql", url.username, None, url.host, url.port, url.database, url.query)
        dump = f"pg_dump --format=custom --file={shlex.quote(str(copy))} {shlex.quote(str(place))}"
        raise ConfigError(
            f"the registry is in PostgreSQL, whose own tools copy it while servers run: {dump} (a password is asked "
            "for, or read from PGPASSWORD or ~/.pgpass); pg_restore brings it back, as "
            "docs/how-to/backup-and-upgrade.md says",
            param="store.url",
        )
    if url.database in (None, "", ":memory:"):
        raise ConfigError(
            "the registry is in memory and ends with its server: name a file in store.url", param="store.url"
        )
    return Path(str(url.database))


def _check_place(copy: Path, registry: Path, *, overwrite: bool) -> None:
    if not copy.exists():
        return
    if os.path.samefile(copy, registry):
        raise InvalidRequestError(f"{copy} is the registry itself; give the copy another name")
    if not overwrite:
        raise InvalidRequestError(
            f"{copy} is there already; give the copy another name, or replace that one with --overwrite"
        )
    try:
        with copy.open("rb") as file:
            is_database = file.read(len(_HEADER)) == _HEADER
    except OSError as error:
        raise InvalidRequestError(f"{copy} cannot be replaced: {error.strerror}") from error
    if not is_database:
        raise InvalidRequestError(f"{copy} is no copy of a registry and is not replaced; give another name")


def _revision_of(database: Path) -> str:
    """The revision of a file's tables.

    Raises:
        StorageError: it holds no registry.
        sqlite3.Error: it cannot be read.
    """
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True)) as connection:
        tables = _tables_of(connection)
        if "alembic_version" in tables:
            (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            return str(revision)
    if "schema_info" in tables:
        return FIRST_REVISION
    raise StorageError(f"{database} holds no registry: the first start of the server makes it; check store.url")


def _tables_of(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
