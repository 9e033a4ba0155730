"""A server's processes as one thing: started together, watched, and gone together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import psutil

logger = logging.getLogger(__name__)

MAX_LOG_BYTES = 16 * 1024**2
LOG_CHECK_S = 10.0
_KILL_WAIT_S = 10.0
_TAIL_BYTES = 64 * 1024
_POLL_S = 0.02


class ProcessGroup:
    """A child in a session of its own, with all it starts.

    The child is started from the event loop's thread: a server that asks the kernel to die with its parent
    (`PR_SET_PDEATHSIG`) dies with the thread that forked it, so that thread must live as long as we do.

    Args:
        process: leader of a session and process group of its own.
        log: file that its output goes to.
        log_start: bytes that were in it before.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: Path, *, log_start: int = 0) -> None:
        self._process = process
        self._log = log
        self._log_start = log_start
        self._known: dict[int, psutil.Process] = {}
        self._exited = asyncio.create_task(process.wait())
        self._trimmer = asyncio.create_task(_keep_bounded(log))
        # psutil walks /proc, which takes milliseconds
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="process-group")

    @classmethod
    async def start(cls, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> Self:
        """Starts the command with its output appended to `log`.

        Raises:
            OSError: the command cannot be run, or the log cannot be written.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        trim(log)
        # appended to, so that a writer goes on at the new end after the file was trimmed
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        log_start = os.fstat(descriptor).st_size
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env=env,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
        return cls(process, log, log_start=log_start)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def wait(self) -> int:
        """Waits for the leader to exit; its return code. May be awaited, and cancelled, many times."""
        return await asyncio.shield(self._exited)

    async def remember(self) -> None:
        """Takes note of all descendants, so that `kill` finds them when their parents are gone."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._find)

    async def kill(self, *, grace_s: float) -> None:
        """Ends every process of the group, and every descendant that left it: SIGTERM, then SIGKILL.

        Args:
            grace_s: how long SIGTERM may take; 0: SIGKILL at once.
        """
        await asyncio.get_running_loop().run_in_executor(self._executor, self._kill, grace_s)
        await self.wait()
        self._trimmer.cancel()
        self._executor.shutdown(wait=False)

    def log_tail(self) -> list[str]:
        """The last lines that this group, and none before it, wrote to the log."""
        try:
            with self._log.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = self._log_start if size >= self._log_start else 0  # it was trimmed since
                file.seek(max(start, size - _TAIL_BYTES))
                return file.read().decode(errors="replace").splitlines()
        except OSError as error:
            return [f"(no log: {error})"]

    def _find(self) -> list[psutil.Process]:
        """All processes of the session, all descendants of any process ever found, as far as they are alive."""
        for pid in psutil.pids():
            if pid not in self._known and _session_of(pid) == self.pid:
                self._note(pid)
        for process in list(self._known.values()):
            with contextlib.suppress(psutil.Error):
                for child in process.children(recursive=True):
                    self._known.setdefault(child.pid, child)
        self._known = {pid: process for pid, process in self._known.items() if not _is_gone(process)}
        return list(self._known.values())

    def _note(self, pid: int) -> None:
        with contextlib.suppress(psutil.Error):
            self._known[pid] = psutil.Process(pid)

    def _kill(self, grace_s: float) -> None:
        alive = self._find()
        if grace_s > 0 and alive:
            _send(alive, signal.SIGTERM)
            _wait_until_gone(alive, grace_s)
            alive = self._find()
        # one may be started while its parent is killed, so look again until there is none
        while alive:
            _send(alive, signal.SIGKILL)
            stuck = _wait_until_gone(alive, _KILL_WAIT_S)
            if stuck:
                logger.error("processes %s outlived SIGKILL", [process.pid for process in stuck])
                return
            alive = self._find()


def trim(log: Path) -> None:
    """Empties a log that has grown over `MAX_LOG_BYTES`, in place; its end is kept beside it, in one file `.1`."""
    try:
        if log.stat().st_size <= MAX_LOG_BYTES:
            return
        old = log.with_name(log.name + ".1")
        with log.open("rb") as source, old.open("wb") as target:
            source.seek(-MAX_LOG_BYTES, os.SEEK_END)
            target.write(source.read(MAX_LOG_BYTES))
        os.truncate(log, 0)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("cannot trim the log %s: %s", log, error)


async def _keep_bounded(log: Path) -> None:
    while True:
        await asyncio.sleep(LOG_CHECK_S)
        trim(log)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _wait_until_gone(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that are still there after that time.

    Polls: psutil's own wait would take the leader's exit status away from the event loop.
    """
    deadline = time.monotonic() + timeout_s
    while alive := [process for process in processes if not _is_gone(process)]:
        if time.monotonic() >= deadline:
            break
        time.sleep(_POLL_S)
    return alive


def _is_gone(process: psutil.Process) -> bool:
    """A zombie is gone but for its exit status. A pid in use again is a stranger's: psutil compares the start times."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
