"""Every way to start a process is refused to unit tests."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.no_process import ProcessStartedError


def in_a_pool() -> None:
    with ProcessPoolExecutor(1) as pool:
        pool.submit(os.getpid).result()


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([sys.executable, "-c", ""], check=False),
        lambda: os._exit(0) if os.fork() == 0 else None,
        lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}),
        lambda: os.system("true"),
        lambda: multiprocessing.get_context("fork").Process(target=os.getpid).start(),
        lambda: multiprocessing.get_context("spawn").Process(target=os.getpid).start(),
        in_a_pool,
    ],
    ids=["subprocess", "fork", "posix_spawn", "system", "multiprocessing fork", "multiprocessing spawn", "pool"],
)
def test_a_start_is_refused_and_noted(start: Callable[[], object], refused: list[str]) -> None:
    with pytest.raises(ProcessStartedError, match="move it to tests/integration"):
        start()
    assert refused
    refused.clear()
