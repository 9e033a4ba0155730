"""What is made ahead by a thread: the same items, bounded, and no thread left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cocktail_serve.merging.threads import made_ahead


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
