"""The file of a SQLite database: made, locked among servers, missed when it is gone, copied while it is written to."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from cocktail_serve.errors import StorageError

logger = logging.getLogger(__name__)

BUSY_S = 10.0
"""How long a write waits for another process's, before SQLite refuses it."""

QUICK_CHECK = "PRAGMA quick_check(1)"
"""Reads a database as a whole, and tells the first thing that is wrong with it."""

NO_REGISTRY = "registry_missing"
"""Code of the error where there is no registry and none may be made."""

_BEFORE = ".revision-"
"""Between the name of a registry and the revision of a copy that was kept of it."""


class SQLiteFile:
    """A database in one file, and the lock file beside it.

    SQLite goes on with a file that was deleted or replaced under it, and loses what is written: so every use asks
    `check` first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._lock: int | None = None
        self._is_told = False

    @property
    def uri(self) -> str:
        """Of SQLite: opens the file that is there, and makes none."""
        return f"{self.path.absolute().as_uri()}?mode=rw"

    def open(self, *, may_make: bool) -> None:
        """Makes the file where it is missing, private, and has SQLite keep a write-ahead log.

        Raises:
            StorageError: it is missing and may not be made, or cannot be opened.
        """
        path = self.path
        if not may_make and not path.exists():
            raise no_registry(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                logger.info("a registry is made: %s", path)
            # examples are their tenants' alone; SQLite gives its log files the mode of the database
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            if not _is_wal(path):
                # no server works with it yet. SQLite does not wait for another process that does the same
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                try:
                    with closing(sqlite3.connect(path, timeout=BUSY_S)) as connection:
                        connection.execute("PRAGMA journal_mode = WAL")
                finally:
                    fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._identity = _identity(path)
        except OSError as error:
            raise StorageError(f"the registry {path} cannot be opened: {error.strerror}; check store.url") from error

    def close(self) -> None:
        """Gives the lock up. May be called twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def share(self) -> bool:
        """Takes a share of the servers' lock; False: one of them has it alone."""
        return self._flock(fcntl.LOCK_SH)

    def own(self) -> bool:
        """Takes the servers' lock alone; False: a server works with the file."""
        return self._flock(fcntl.LOCK_EX)

    def release(self) -> None:
        """Gives back what `share` or `own` took."""
        assert self._lock is not None
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def reason_lost(self) -> str:
        """Why the file that was opened is not there any more; empty: it is. Said in the log when that changes."""
        try:
            found = _identity(self.path)
        except OSError as error:
            reason = f"the registry {self.path} is gone ({error.strerror}): put it back"
        else:
            is_same = self._identity in (None, found)
            reason = "" if is_same else f"the registry {self.path} is another file than was opened"
        if reason:
            reason += ", or end the server, put a copy in its place and start it again; none is made meanwhile"
        if bool(reason) is not self._is_told:
            self._is_told = bool(reason)
            if reason:
                logger.error("%s", reason)
            else:
                logger.warning("the registry %s is back", self.path)
        return reason

    def check(self) -> None:
        """Raises StorageError where the file that was opened is not there any more."""
        if reason := self.reason_lost():
            raise StorageError(f"{reason}. Nothing was changed.")

    def keep_copy(self, revision: str) -> Path:
        """Copies the database beside it, under a name of its own.

        Args:
            revision: of its tables.

        Raises:
            StorageError: there is no room, or it cannot be read.
        """
        copy = self.path.with_name(
            f"{self.path.name}{_BEFORE}{revision}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        )
        copy_database(self.path, copy)
        return copy

    def _flock(self, operation: int) -> bool:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def no_registry(path: Path) -> StorageError:
    """Of a place where there is none, and none may be made."""
    return StorageError(
        f"there is no registry {path}: the first start of the server makes it; if there was one, put it back, "
        "or a copy of it",
        code=NO_REGISTRY,
    )


def kept_copies(path: Path) -> list[Path]:
    """Copies that upgrades left beside a registry."""
    return sorted(path.parent.glob(f"{path.name}{_BEFORE}*"))


def copy_database(path: Path, copy: Path) -> None:
    """Copies a database that others may read and write meanwhile: as it is at one moment, whole or not at all. Blocks.

    The copy is checked, private, and on disk when this returns. A file of its name is replaced.

    Raises:
        StorageError: the copy cannot be written, or the database cannot be read.
    """
    partial = copy.with_name(f"{copy.name}.partial")
    try:
        try:
            partial.unlink(missing_ok=True)
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            uri = f"{path.absolute().as_uri()}?mode=rw"
            with (
                closing(sqlite3.connect(uri, uri=True, timeout=BUSY_S)) as source,
                closing(sqlite3.connect(partial, isolation_level=None)) as target,
            ):
                source.backup(target)
                target.execute("PRAGMA journal_mode = DELETE")  # one file, whatever the original keeps beside it
                if damage := damage_of(target):
                    raise sqlite3.DatabaseError(damage)
            sync(partial)
            partial.replace(copy)
            sync(copy.parent)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"the registry {path} cannot be copied to {copy}: {error.strerror}") from error
    except sqlite3.Error as error:
        raise StorageError(f"the registry {path} cannot be copied to {copy}: {error}") from error


def damage_of(connection: sqlite3.Connection) -> str:
    """What SQLite finds wrong with a database; empty: nothing. Reads all of it."""
    (verdict,) = connection.execute(QUICK_CHECK).fetchone()
    return damage_told(verdict)


def damage_told(verdict: str) -> str:
    """The one line of `QUICK_CHECK` that tells what is wrong; empty: nothing is."""
    return "" if verdict == "ok" else verdict.rpartition("\n")[2]


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _identity(path: Path) -> tuple[int, int]:
    """What tells a file from another at its place."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_wal(path: Path) -> bool:
    """Whether the header says so (bytes 18 and 19): looking costs no lock."""
    with path.open("rb") as file:
        return file.read(20)[18:] == b"\x02\x02"
