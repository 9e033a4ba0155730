"""The folder that a server's engines write to."""

from __future__ import annotations

import uuid
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

from cocktail_serve.config import Settings
from cocktail_serve.engines.server import sweep_sockets
from cocktail_serve.errors import ConfigError


def own_run_dir(settings: Settings, stack: AsyncExitStack | ExitStack) -> Path:
    """The folder that engines write to: this process's alone. It outlives them: their logs tell why they ended.

    Raises:
        ConfigError: another server uses the folder.
    """
    run_dir = settings.store.cache_dir / "engines"
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(run_dir / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another server keeps its engines' files in {run_dir}; give each server a cache_dir of its own",
            param="store.cache_dir",
        ) from None
    stack.callback(lock.release)
    sweep_sockets(run_dir)
    return run_dir


def check_unused(settings: Settings) -> None:
    """Raises ConfigError where another server uses the folder now; makes none."""
    if (settings.store.cache_dir / "engines").is_dir():
        with ExitStack() as stack:
            own_run_dir(settings, stack)


def place_of(run_dir: Path) -> str:
    """The name of a folder that one process at a time holds, made on first use; it moves with the folder."""
    file = run_dir / "place"
    if not file.exists():
        temporary = run_dir / "place.tmp"
        temporary.write_text(uuid.uuid4().hex)
        temporary.replace(file)
    return file.read_text()
