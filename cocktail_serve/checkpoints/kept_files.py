"""Files in the cache: what was made of models and can be made again, kept until there is too much of it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)


def write_kept(path: Path, content: bytes) -> None:
    """Writes a file as a whole or not at all, in place of the one that is there.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_kept(path: Path) -> bytes:
    """Reads a file, which counts as used.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    content = path.read_bytes()
    use_kept(path)
    return content


def use_kept(path: Path) -> bool:
    """Whether a file is there, which then counts as used."""
    with contextlib.suppress(OSError):  # of another user: it goes sooner than it should
        os.utime(path)
    return path.is_file()


def trim(folders: Iterable[Path], max_bytes: int) -> None:
    """Deletes kept files, the least recently used first, until those that are left have at most `max_bytes`.

    What cannot be deleted is left, with a line in the log. Blocks.
    """
    files = []
    for folder in folders:
        for path in sorted(folder.glob("*.*")):
            with contextlib.suppress(OSError):  # gone meanwhile
                if path.suffix != ".lock" and path.is_file():
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= max_bytes:
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the cache is larger than store.cache_bytes: cannot delete %s: %s", path, error.strerror)
        else:
            total -= size
