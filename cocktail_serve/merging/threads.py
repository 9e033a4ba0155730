"""The threads that mix: as many as this process has cores, whatever its OpenMP threads are tied to."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from queue import Queue
from typing import TypeVar

T = TypeVar("T")


@cache
def cores() -> frozenset[int]:
    """The cores that a thread of this process may run on; empty where the system does not say.

    A vLLM worker on a CPU ties its main thread to one core, and threads inherit that: the cores of all threads
    together are what the process was given.
    """
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    found: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            found |= os.sched_getaffinity(int(thread))
        except ProcessLookupError:  # it ended meanwhile
            continue
    return frozenset(found)


def num_threads() -> int:
    """How many threads mix at once."""
    return len(cores()) or os.cpu_count() or 1


@cache
def mixing_threads() -> ThreadPoolExecutor:
    """The process's one pool of mixing threads."""
    return ThreadPoolExecutor(num_threads(), thread_name_prefix="mixing", initializer=_leave_inherited_core)


def in_parallel(work: Callable[[int, int], None], size: int, chunk: int) -> None:
    """Calls `work(begin, end)` for the chunks of `size`, in order, on all threads; in this one where one call does.

    After a failure or an interrupt no further chunk is begun, and none runs any more when this raises.

    Raises:
        whatever a call raised.
    """
    chunks = deque((begin, min(begin + chunk, size)) for begin in range(0, size, chunk))

    def take_turns() -> None:
        while True:
            try:
                begin, end = chunks.popleft()
            except IndexError:
                return
            try:
                work(begin, end)
            except BaseException:
                chunks.clear()
                raise

    if len(chunks) <= 1 or num_threads() == 1:
        take_turns()
        return
    turns = [mixing_threads().submit(take_turns) for _ in range(min(num_threads(), len(chunks)))]
    try:
        wait(turns)
    except BaseException:
        chunks.clear()
        wait(turns)
        raise
    for turn in turns:
        turn.result()


def made_ahead(items: Iterable[T], *, depth: int) -> Generator[T]:
    """The same items, made by a thread of their own while those before are used; at most `depth` wait.

    The thread has ended when the iterator has: exhausted, failed or closed.

    Raises:
        whatever `items` raises, in its turn.
    """
    made: Queue[tuple[T] | None] = Queue(depth)
    is_closed = threading.Event()

    def make() -> None:
        try:
            for item in items:
                made.put((item,))
                if is_closed.is_set():
                    return
        finally:
            made.put(None)

    with ThreadPoolExecutor(1, thread_name_prefix="mixing-ahead", initializer=_leave_inherited_core) as maker:
        making = maker.submit(make)
        got = made.get()
        try:
            while got is not None:
                yield got[0]
                got = made.get()
        finally:
            is_closed.set()
            while got is not None:  # it may wait for room
                got = made.get()
        making.result()


def _leave_inherited_core() -> None:
    if cores():
        os.sched_setaffinity(0, cores())


def _forget_threads() -> None:
    mixing_threads.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # threads do not survive a fork
