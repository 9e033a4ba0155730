"""Opens a pool and shows how far it is: large ones are read whole the first time."""

from __future__ import annotations

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig, Settings
from cocktail_serve.library_process import LibraryCall, call_here
from cocktail_serve.pool import Pool
from cocktail_serve.progress import OnProgress


def open_with_progress(
    settings: Settings, config: PoolConfig, report: OnProgress, *, call: LibraryCall = call_here
) -> Pool:
    """As `open_pool`, which see for errors.

    Args:
        call: where it is done.
    """

    def read(name: str, done: int, total: int) -> None:
        report(f"{config.id}: reading {name}", done, total, is_bytes=True)

    return call(open_pool, config, cache_dir=settings.store.cache_dir, progress=read)
