"""What is made ahead by a thread: the same items, bounded, on the right cores, and no thread left behind."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from cocktail_serve.merging import threads
from cocktail_serve.merging.threads import allow_cores, in_parallel, made_ahead


def threads_ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mixing-ahead")]


def test_the_items_come_in_their_order() -> None:
    assert list(made_ahead(iter(range(50)), depth=3)) == list(range(50))
    assert list(made_ahead(iter(()), depth=3)) == []
    assert not threads_ahead()


def test_no_more_than_the_depth_wait() -> None:
    made: list[int] = []
    reached = threading.Event()

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            if number == 3:
                reached.set()
            yield number

    ahead = made_ahead(items(), depth=2)
    assert next(ahead) == 0
    assert reached.wait(10)  # 1 and 2 wait, 3 is made and has no room
    assert made == [0, 1, 2, 3]
    assert list(ahead) == list(range(1, 10))


def test_a_failure_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    ahead = made_ahead(items(), depth=5)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    assert not threads_ahead()


def test_closing_ends_the_thread_while_it_waits_for_room() -> None:
    ahead = made_ahead(iter(range(1000)), depth=1)
    assert next(ahead) == 0
    assert len(threads_ahead()) == 1
    ahead.close()
    assert not threads_ahead()


def test_sizes_bound_what_waits() -> None:
    made: list[int] = []
    reached = threading.Event()

    def items() -> Iterator[int]:
        for number in (5, 1, 2, 3, 9, 4):
            made.append(number)
            if number == 3:
                reached.set()
            yield number

    ahead = made_ahead(items(), depth=4, size_of=lambda number: number)
    assert next(ahead) == 5  # alone it may wait, whatever its size
    assert reached.wait(10)
    assert made == [5, 1, 2, 3]
    assert list(ahead) == [1, 2, 3, 9, 4]


@pytest.fixture
def tied() -> Iterator[int]:
    """This thread is tied to a core, as a vLLM worker on a CPU ties its own."""
    given = os.sched_getaffinity(0)
    if len(given) < 2:
        pytest.skip("needs two cores")
    threads.cores.cache_clear()
    assert given <= threads.cores()
    core = min(given)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, given)
        threads.cores.cache_clear()


def test_the_core_of_who_uses_the_items_is_left_to_it(tied: int) -> None:
    def items() -> Iterator[frozenset[int]]:
        yield frozenset(os.sched_getaffinity(0))

    (found,) = made_ahead(items(), depth=1)
    assert found == threads.cores() - {tied}


def test_who_waits_for_an_item_helps_to_make_it(tied: int) -> None:
    helped = threading.Event()

    def items() -> Iterator[list[str]]:
        chunks: list[str] = []

        def work(begin: int, end: int) -> None:
            if threading.current_thread() is threading.main_thread():
                helped.set()
            else:
                assert helped.wait(10)
            chunks.append(f"{begin}-{end}")

        in_parallel(work, 40, 10)
        yield sorted(chunks)

    assert list(made_ahead(items(), depth=1)) == [["0-10", "10-20", "20-30", "30-40"]]


def test_what_fails_in_the_helpers_part_comes_in_its_turn(tied: int) -> None:
    has_failed = threading.Event()

    def items() -> Iterator[int]:
        yield 1

        def work(begin: int, end: int) -> None:
            if threading.current_thread() is threading.main_thread():
                has_failed.set()
                raise OSError("the disk is gone")
            assert has_failed.wait(10)

        in_parallel(work, 40, 10)
        yield 2

    ahead = made_ahead(items(), depth=5)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    assert not threads_ahead()


def test_help_that_nobody_gives_is_not_waited_for(tied: int) -> None:
    def items() -> Iterator[int]:
        for number in range(3):
            in_parallel(lambda begin, end: None, 40, 10)
            yield number

    ahead = made_ahead(items(), depth=10)
    assert next(ahead) == 0
    ahead.close()
    assert not threads_ahead()


def test_help_that_was_not_given_keeps_nothing(tied: int) -> None:
    class Temporary:
        pass

    alive: list[weakref.ref[Temporary]] = []

    def items() -> Iterator[int]:
        for number in range(3):
            temporary = Temporary()
            alive.append(weakref.ref(temporary))
            in_parallel(lambda begin, end, held=temporary: None, 40, 10)  # type: ignore[misc]
            yield number

    ahead = made_ahead(items(), depth=10)
    assert next(ahead) == 0
    while len(alive) < 3:
        time.sleep(0.001)
    deadline = time.monotonic() + 10
    while any(ref() is not None for ref in alive) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [ref() for ref in alive] == [None] * 3
    ahead.close()


def test_cores_may_be_allowed_that_no_thread_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_allowed", set())
    try:
        allow_cores({4096})
        assert 4096 in threads.cores()
    finally:
        threads.cores.cache_clear()
