"""The file of the registry where no URL names a database, and its way there from where earlier releases kept it.

It was kept in the folder for what can be made again, which people and their tools clear, and it cannot be made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Protocol

import psutil
from sqlalchemy.engine import URL

from cocktail_serve.database.database import DatabaseURL
from cocktail_serve.database.sqlite_file import BUSY_S, damage_of, sync
from cocktail_serve.errors import StorageError

logger = logging.getLogger(__name__)

_BESIDE = ("-shm", "-wal", "-journal")
"""What SQLite keeps beside a database; the last two may hold what the database does not yet."""

_GOES_WITH_ITS_CONTAINER = frozenset({"overlay", "aufs", "tmpfs", "ramfs"})
"""File systems that a container, or the machine's memory, takes with it."""


class RegistryPlace(Protocol):
    """What a configuration says of where the registry is."""

    @property
    def url(self) -> str | None:
        """Of a database that the operator chose."""

    @property
    def registry_path(self) -> Path:
        """The file of the registry where there is no `url`."""

    @property
    def former_registry_path(self) -> Path | None:
        """Where earlier releases kept that file, if it was elsewhere."""


@contextmanager
def registry_url(place: RegistryPlace, *, may_move: bool = True) -> Iterator[DatabaseURL]:
    """The database to open, for as long as the block uses it. Blocks.

    A registry in the former place is moved: copied, made durable in its new place as a whole, and only then deleted.
    Where that cannot be now, since a server works with it there or the new place would not last, it is used where it
    is, by every process alike. Where both are there, the new one is used.

    Args:
        may_move: whether it is moved; else it is used where it is.

    Raises:
        StorageError: it cannot be moved; it is where it was.
    """
    if place.url is not None:
        yield place.url
        return
    with ExitStack() as stack:
        yield URL.create("sqlite", database=str(_found(place, stack, may_move=may_move)))


def _found(place: RegistryPlace, stack: ExitStack, *, may_move: bool) -> Path:
    path, former = place.registry_path, place.former_registry_path
    if former is None or not former.exists():
        return path
    if not may_move:
        return path if path.exists() else former
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        moving = path.with_name(f"{path.name}.moving").open("ab")
    except OSError as error:
        logger.warning("the registry stays in %s: %s cannot be written: %s", former, path.parent, error.strerror)
        return former
    with moving:
        fcntl.flock(moving, fcntl.LOCK_EX)  # who moves it at the same time has done so when this returns
        if path.exists() or not former.exists():
            if former.exists():
                logger.warning(
                    "there are two registries: %s is used, and %s is not; delete the latter, or name it in store.url",
                    path,
                    former,
                )
            return path
        reason = _reason_to_stay(former, path, stack)
        if reason:
            logger.warning("the registry stays in %s: %s", former, reason)
            return former
        _move(former, path)
        return path


def _reason_to_stay(former: Path, path: Path, stack: ExitStack) -> str:
    """Why a registry is not moved now; empty: it is, and no server begins to work with it until the stack ends."""
    if _goes_with_its_container(path.parent) and not _goes_with_its_container(former):
        return f"{path.parent} would go with its container; mount a volume there, or name the file in store.url"
    try:
        lock = os.open(f"{former}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return ""  # no server can lock it either
    stack.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_SH)  # nobody moves it while this process uses it
        return "a server works with it there"
    return ""


def _move(former: Path, path: Path) -> None:
    copy = path.with_name(f"{path.name}.copy")
    try:
        with _held_still(former):
            _copy(former, copy)
            copy.replace(path)
            sync(path.parent)
            _delete(former)
    except (OSError, sqlite3.Error) as error:
        for each in (copy, *(Path(f"{copy}{suffix}") for suffix in _BESIDE)):
            with contextlib.suppress(OSError):
                each.unlink(missing_ok=True)
        raise StorageError(
            f"the registry cannot be moved from {former} to {path}: {error}; make room there, or set store.url to "
            f"sqlite:///{former} to leave it where it is"
        ) from error
    logger.warning("the registry was moved from %s to %s, out of a folder that is cleared as a cache", former, path)


@contextmanager
def _held_still(registry: Path) -> Iterator[None]:
    """Keeps every process from writing to a registry; nobody has to be kept from one that cannot be written.

    Raises:
        sqlite3.Error: somebody does not stop writing, or it is no database.
    """
    with closing(sqlite3.connect(registry, timeout=BUSY_S, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                raise
        yield


def _copy(registry: Path, copy: Path) -> None:
    """Copies a registry that nobody writes to into one file, which is on disk when this returns."""
    for suffix in ("", *_BESIDE):
        Path(f"{copy}{suffix}").unlink(missing_ok=True)  # of a move that was broken off
    os.close(os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    shutil.copyfile(registry, copy)
    for suffix in ("-wal", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{registry}{suffix}", f"{copy}{suffix}")
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        damage = damage_of(connection)
    if damage:
        raise sqlite3.DatabaseError(f"it is damaged: {damage}")
    if any(Path(f"{copy}{suffix}").exists() for suffix in ("-wal", "-journal")):
        raise sqlite3.DatabaseError("its log could not be written into the copy")
    sync(copy)


def _delete(registry: Path) -> None:
    """Deletes what was copied, the database last: what is left of it otherwise would be taken for another's."""
    try:
        for suffix in (*_BESIDE, "", ".lock"):
            Path(f"{registry}{suffix}").unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s was moved, and cannot be deleted: %s", registry, error.strerror)


def _goes_with_its_container(path: Path) -> bool:
    resolved = path.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if resolved.is_relative_to(mount.mountpoint)]
    # of two at one place, the later one hides the other
    return bool(mounts) and max(mounts, key=lambda mount: len(mount.mountpoint)).fstype in _GOES_WITH_ITS_CONTAINER
