"""The threads that mix: as many as this process has cores, whatever its OpenMP threads are tied to."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


@cache
def cores() -> frozenset[int]:
    """The cores that a thread of this process may run on; empty where the system does not say.

    Threads may be tied to a core each, and threads inherit that: the cores of all of them together are what the process
    was given, with what `allow_cores` added.
    """
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    found = set(_allowed)
    for thread in os.listdir("/proc/self/task"):
        try:
            found |= os.sched_getaffinity(int(thread))
        except ProcessLookupError:  # it ended meanwhile
            continue
    return frozenset(found)


def allow_cores(more: Collection[int]) -> None:
    """Has this process mix on these cores too, though none of its threads is on them yet."""
    _allowed.update(more)
    cores.cache_clear()


_allowed: set[int] = set()


def num_threads() -> int:
    """How many threads mix at once, for who calls from this thread."""
    return len(_cores_here()) or os.cpu_count() or 1


@cache
def mixing_threads(on: frozenset[int]) -> ThreadPoolExecutor:
    """The process's one pool of mixing threads for these cores."""
    return ThreadPoolExecutor(num_threads(), thread_name_prefix="mixing", initializer=_stay_on, initargs=(on,))


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

    if len(chunks) <= 1:
        take_turns()
        return
    turns: list[Future[None]] = []
    helped = _Help(take_turns)
    if hasattr(_here, "ask_for_help"):
        _here.ask_for_help(helped)
    try:
        if num_threads() == 1:
            take_turns()
        else:
            pool = mixing_threads(_cores_here())
            turns += [pool.submit(take_turns) for _ in range(min(num_threads(), len(chunks)))]
            wait(turns)
    except BaseException:
        chunks.clear()
        wait(turns)
        raise
    finally:
        helped.end()
    for turn in turns:
        turn.result()


def made_ahead(items: Iterable[T], *, depth: int, size_of: Callable[[T], int] = lambda item: 1) -> Generator[T]:
    """The same items, made by a thread of their own while those before are used.

    Who uses them may be tied to a core, as a vLLM worker on a CPU is. Then that core is left to it, since sums beside
    it would take turns with it, and the items are made on the others; while it has to wait, it helps.

    The thread has ended when the iterator has: exhausted, failed or closed.

    Args:
        depth: how much may wait, as a sum of sizes; one item always may, and one more is made meanwhile.
        size_of: the size of an item; one each if omitted.

    Raises:
        whatever `items` raises, in its turn.
    """
    made: SimpleQueue[tuple[T] | _Help | None] = SimpleQueue()
    room = threading.Condition()
    waiting = 0
    is_closed = False
    on = _other_cores()

    def make() -> None:
        nonlocal waiting
        try:
            _stay_on(on)
            if on < cores():
                _here.ask_for_help = made.put
            for item in items:
                size = size_of(item)
                with room:
                    while waiting and waiting + size > depth and not is_closed:
                        room.wait()
                    if is_closed:
                        return
                    waiting += size
                made.put((item,))
        finally:
            made.put(None)

    with ThreadPoolExecutor(1, thread_name_prefix="mixing-ahead") as maker:
        making = maker.submit(make)
        try:
            while (got := made.get()) is not None:
                if isinstance(got, _Help):
                    got.give()
                    continue
                with room:
                    waiting -= size_of(got[0])
                    room.notify()
                yield got[0]
        finally:
            with room:
                is_closed = True
                room.notify()
        making.result()


class _Help:
    """Work that another thread may do a part of, if it comes to it in time."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._outcome: Future[None] = Future()

    def give(self) -> None:
        """Does what is left. A failure is for the one who asked, an interrupt for both."""
        if self._outcome.set_running_or_notify_cancel():
            try:
                self._work()
            except BaseException as error:
                self._outcome.set_exception(error)
                if not isinstance(error, Exception):
                    raise
            else:
                self._outcome.set_result(None)

    def end(self) -> None:
        """Waits for a part that was begun; none is begun afterwards.

        Raises:
            whatever it raised.
        """
        if self._outcome.cancel():
            del self._work  # this may lie in a queue for long, and the work holds what it works on
        else:
            self._outcome.result()


_here = threading.local()


def _cores_here() -> frozenset[int]:
    """The cores to mix on, for who calls from this thread."""
    found: frozenset[int] = getattr(_here, "cores", cores())
    return found


def _other_cores() -> frozenset[int]:
    """The cores that this thread is not tied to; all, if there are no others."""
    if not cores():
        return cores()
    return cores() - os.sched_getaffinity(0) or cores()


def _stay_on(on: frozenset[int]) -> None:
    """Moves this thread to these cores, away from the one that it inherited, and what it mixes with it."""
    _here.cores = on
    if on:
        os.sched_setaffinity(0, on)


def _forget_threads() -> None:
    mixing_threads.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # threads do not survive a fork
