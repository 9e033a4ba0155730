"""What became of processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import psutil


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie only waits for whoever adopted it to take note."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def survivors(processes: Iterable[psutil.Process], *, timeout_s: float) -> list[psutil.Process]:
    """Those that are still alive after that time, as soon as there are none."""
    deadline = time.monotonic() + timeout_s
    while alive := [process for process in processes if is_alive(process)]:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.05)
    return alive
