"""The right to use an engine, as whoever answers a request holds it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from cocktail_serve.errors import CocktailError


class LeaseOwner(Protocol):
    """Who gives leases, and is told what becomes of them: turns, exclusive or shared."""

    @property
    def is_draining(self) -> bool:
        """Whether leases should be given back soon."""
        ...

    def give_back(self, lease: Lease) -> None:
        """A lease is no longer used; may be told twice."""
        ...

    def charge(self, tenant: str, num_tokens: int) -> None:
        """A tenant was served these tokens more (or fewer) than charged so far."""
        ...


class Lease:
    """The right to use an engine while one recipe is resident. Release it when the answer is finished or given up.

    Args:
        tenant: whom its tokens are charged to; None: background work, which is nobody's.
        num_tokens: what was charged when it was granted, an estimate.

    Attributes:
        mixing_s: seconds of the mix that came between its asking and its grant.
        error: why the lease was ended before its release: `DrainedError`, or `EngineError` when the engine was lost.
    """

    __slots__ = ("_num_charged", "_num_emitted", "_on_end", "_owner", "error", "mixing_s", "tenant")

    def __init__(self, owner: LeaseOwner, *, tenant: str | None = None, num_tokens: int = 0) -> None:
        self._owner = owner
        self._num_charged = num_tokens
        self._num_emitted = 0
        self._on_end: Callable[[], object] | None = None
        self.tenant = tenant
        self.mixing_s = 0.0
        self.error: CocktailError | None = None

    @property
    def should_yield(self) -> bool:
        """True once others wait for this turn to end: long work that can pause should release and queue again."""
        return self._owner.is_draining

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Cancels the await inside when the lease ends, and raises the lease's error in its place."""
        self.raise_if_ended()
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a lease is used inside a task")
        cancelling = task.cancelling()
        self._on_end = task.cancel
        try:
            yield
        except asyncio.CancelledError:
            # as asyncio.timeout does: a cancellation from elsewhere, at the same moment, wins
            if self.error is not None and task.uncancel() <= cancelling:
                raise self.error from None
            raise
        finally:
            self._on_end = None

    def on_end(self, callback: Callable[[], object]) -> None:
        """Calls back once if the lease ends before its release: close the connection, the engine needs it gone.

        In place of `interruptible`, not inside of it: one thing happens at a lease's end.
        """
        self.raise_if_ended()
        self._on_end = callback

    def emitted(self, num_tokens: int) -> None:
        """Charges tokens as they come, once they are more than the estimate."""
        self._num_emitted += num_tokens
        if self._num_emitted > self._num_charged:
            self._charge(self._num_emitted)

    def settle(self, num_tokens: int) -> None:
        """Charges what the answer really took, read and generated, in place of the estimate. After the release too."""
        if num_tokens != self._num_charged:
            self._charge(num_tokens)

    def release(self) -> None:
        """Gives the lease back. May be called twice."""
        self._on_end = None
        self._owner.give_back(self)

    def raise_if_ended(self) -> None:
        """Raises the lease's error, if it has one."""
        if self.error is not None:
            raise self.error

    def _charge(self, num_tokens: int) -> None:
        if self.tenant is not None:
            self._owner.charge(self.tenant, num_tokens - self._num_charged)
        self._num_charged = num_tokens

    def end(self, error: CocktailError) -> None:
        """Takes the right away; for the lease's owner."""
        self.error = error
        callback, self._on_end = self._on_end, None
        if callback is not None:
            callback()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
