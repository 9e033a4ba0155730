"""The folder that a server's engines write to."""

from __future__ import annotations

import uuid
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

from cocktail_serve.checkpoints.fingerprint import FINGERPRINTS
from cocktail_serve.checkpoints.kept_files import trim
from cocktail_serve.config import Settings
from cocktail_serve.engines.vllm.server import sweep_sockets
from cocktail_serve.errors import ConfigError, StorageError
from cocktail_serve.scoring.tokenizer_cache import TOKENIZERS

ENGINES = "engines"
"""Folder of the cache that engines write to."""


def trim_cache(settings: Settings) -> None:
    """Keeps what can be made again within `store.cache_bytes`. Blocks."""
    cache = settings.store.cache_dir
    trim([cache / FINGERPRINTS, cache / ENGINES / TOKENIZERS], int(settings.store.cache_bytes))


def own_run_dir(settings: Settings, stack: AsyncExitStack | ExitStack) -> Path:
    """The folder that engines write to: this process's alone. It outlives them: their logs tell why they ended.

    Raises:
        ConfigError: another server uses the folder.
        StorageError: it cannot be written.
    """
    run_dir = settings.store.cache_dir / ENGINES
    lock = FileLock(run_dir / "lock")
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another server keeps its engines' files in {run_dir}; give each server a cache_dir of its own",
            param="store.cache_dir",
        ) from None
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    stack.callback(lock.release)
    sweep_sockets(run_dir)
    return run_dir


def check_unused(settings: Settings) -> None:
    """Raises ConfigError where another server uses the folder now; makes none."""
    if (settings.store.cache_dir / ENGINES).is_dir():
        with ExitStack() as stack:
            own_run_dir(settings, stack)


def place_of(run_dir: Path) -> str:
    """The name of a folder that one process at a time holds, made on first use; it moves with the folder.

    Raises:
        StorageError: it cannot be written.
    """
    file = run_dir / "place"
    try:
        if not file.exists():
            temporary = run_dir / "place.tmp"
            temporary.write_text(uuid.uuid4().hex)
            temporary.replace(file)
        return file.read_text()
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def _unwritable(run_dir: Path, error: OSError) -> StorageError:
    return StorageError(
        f"the engines' files cannot be kept in {run_dir}: {error.strerror}; make room there, or set store.cache_dir to "
        "a folder that can be written"
    )
