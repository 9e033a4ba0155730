"""How long engines worked for a job: told by whoever works, wherever it is called from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Effort:
    """Seconds that engines worked, waiting for a turn left out.

    Attributes:
        scoring_s: that requests of scoring held an engine; several at once count each.
        mixing_s: that mixing took which these requests brought about; what several waited for counts for each.
    """

    scoring_s: float = 0.0
    mixing_s: float = 0.0


_current: ContextVar[Effort | None] = ContextVar("effort", default=None)


@contextmanager
def measured(on_spent: Callable[[Effort], object]) -> Iterator[None]:
    """Adds up what is spent inside the block, and in tasks that it starts; tells it at the end, if there is any.

    What is begun inside and outlives the block is measured by itself.
    """
    effort = Effort()
    token = _current.set(effort)
    try:
        yield
    finally:
        _current.reset(token)
        if effort != Effort():
            on_spent(effort)


def spend(*, scoring_s: float = 0.0, mixing_s: float = 0.0) -> None:
    """An engine has worked so long for the caller; nothing where nobody measures."""
    effort = _current.get()
    if effort is not None:
        effort.scoring_s += scoring_s
        effort.mixing_s += mixing_s
