"""How long engines worked for a call: part of what the call gives back, and of the error that it ends in."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TypeVar


@dataclass(frozen=True, slots=True)
class EngineTime:
    """Seconds that engines worked, waiting for a turn left out.

    Attributes:
        scoring_s: that requests of scoring held an engine; several at once count each.
        mixing_s: that mixing took which these requests brought about; what several waited for counts for each.
    """

    scoring_s: float = 0.0
    mixing_s: float = 0.0

    def __add__(self, other: EngineTime) -> EngineTime:
        return EngineTime(self.scoring_s + other.scoring_s, self.mixing_s + other.mixing_s)


class Timed(Protocol):
    """What a call of an engine gives back."""

    @property
    def engine_time(self) -> EngineTime: ...


_T = TypeVar("_T", bound=Timed)

_CARRIED = "_engine_time"
"""Where errors have it: among their attributes, which cross to another process with them."""


class CallTimer:
    """Adds up the engine time of one call, inside the engine; an error that leaves the block carries it.

    Every call has a block around all of it: an error may be raised to several callers, and each is told its own time.

    Attributes:
        time: so far.
    """

    __slots__ = ("time",)

    def __init__(self) -> None:
        self.time = EngineTime()

    def add(self, *, scoring_s: float = 0.0, mixing_s: float = 0.0) -> None:
        """The engine has worked so long."""
        self.time += EngineTime(scoring_s, mixing_s)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """What is inside holds the engine for scoring, however it ends."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(scoring_s=time.monotonic() - started)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            error.__dict__[_CARRIED] = self.time


class EngineTimeTotal:
    """Adds up what engines worked for one job: calls that failed and those that were cancelled too.

    Attributes:
        time: so far.
    """

    __slots__ = ("time",)

    def __init__(self) -> None:
        self.time = EngineTime()

    async def of(self, call: Awaitable[_T]) -> _T:
        """The result of an engine's call; raises what it raises."""
        try:
            result = await call
        except BaseException as error:
            self.time += engine_time_of(error)
            raise
        self.time += result.engine_time
        return result


def engine_time_of(error: BaseException) -> EngineTime:
    """How long engines worked for the call that has just ended in this error."""
    carried: EngineTime = error.__dict__.get(_CARRIED, EngineTime())
    return carried
