"""Refuses to start processes, for tests that must run in this one alone."""

from __future__ import annotations

import multiprocessing.process
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"})
"""What the interpreter tells its auditors before it starts a process."""

_refused: list[str] | None = None
"""None: nothing is refused now. An auditor cannot be taken away again, so it looks here."""


class ProcessStartedError(BaseException):
    """Not an `Exception`: it passes by what handles the failures of a start."""


@contextmanager
def no_process() -> Iterator[list[str]]:
    """Within it every start of a process raises, and is noted in the list it gives.

    Raises:
        ProcessStartedError: from the call that starts one, in whichever thread.
    """
    global _refused  # noqa: PLW0603  # one interpreter, one auditor
    _refused = []
    try:
        with pytest.MonkeyPatch.context() as patch:
            # what `multiprocessing` spawns by its own means is told to no auditor
            patch.setattr(multiprocessing.process.BaseProcess, "start", lambda process: _refuse(repr(process)))
            yield _refused
    finally:
        _refused = None


def _refuse(start: str) -> None:
    if _refused is not None:
        _refused.append(start)
        raise ProcessStartedError(f"a unit test starts no process: move it to tests/integration. It was {start}")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _STARTS:
        _refuse(f"{event}{arguments[:2]}")


sys.addaudithook(_audit)
