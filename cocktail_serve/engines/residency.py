"""The turns of one engine: which recipe its parameters are now, and who may use them.

An engine holds one full-weight recipe at a time. Whoever wants to use it acquires a lease for a recipe and holds it
until its answer is finished. The rules, in the order they bite:

1. A request for the resident recipe is admitted at once while its turn is open.
2. When somebody waits for another recipe, the turn ends as soon as nothing is in flight, or `slice_s` after the later
   of the turn's start and that arrival.
3. Then nobody is admitted. What is in flight may finish for `drain_s`; what is left is ended with `DrainedError`. If
   all who waited give up meanwhile, the turn is opened again.
4. The recipe whose oldest request waited longest is mixed, and all who wait for it are admitted together.

Background leases (scoring, mixing ahead) follow the same rules with two handicaps: each counts as having arrived
`background_delay_s` later than it did unless the engine idles, and while traffic waits no two turns in a row are
given for background's sake. The first lets traffic go first; because it is a constant and not a class of its own,
background work cannot starve: once it is the oldest in line, it is next.

All state is changed on the event loop between two awaits, and an admission is counted in the moment it is decided, not
when the admitted task wakes up. So no lease is ever held while another recipe is resident or being mixed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, NoReturn, Self

from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.errors import (
    CapacityError,
    ClientError,
    CocktailError,
    DrainedError,
    EngineError,
    ModelNotReadyError,
    QueueTimeoutError,
)
from cocktail_serve.recipe import Recipe

Mix = Callable[[Recipe], Awaitable[bool]]
"""Makes a recipe resident. True: done. False: the engine was still busy and nothing changed.

A `ClientError` means that this recipe cannot be mixed and nothing changed; any other error, that the engine is lost.
"""

MAX_BUSY_MIXES = 3
"""Mixes refused as busy in a row, with nothing in flight on our side, before the engine counts as lost."""

MAX_LOST_MIXES = 2
"""Engines lost in the mix of one recipe before those who wait for it are sent away.

One is bad luck (a process was killed just then), two look like the recipe's doing, and waiting on would never end.
"""


class Lease:
    """The right to use an engine while one recipe is resident. Release it when the answer is finished or given up.

    Attributes:
        error: why the lease was ended before its release: `DrainedError`, or `EngineError` when the engine was lost.
    """

    __slots__ = ("_on_end", "_residency", "error")

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._on_end: Callable[[], object] | None = None
        self.error: CocktailError | None = None

    @property
    def should_yield(self) -> bool:
        """True once others wait for this turn to end: long work that can pause should release and queue again."""
        return self._residency.is_draining

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
        """Calls back once if the lease ends before its release: close the connection, the engine needs it gone."""
        self.raise_if_ended()
        self._on_end = callback

    def release(self) -> None:
        """Gives the lease back. May be called twice."""
        self._on_end = None
        self._residency._release(self)

    def raise_if_ended(self) -> None:
        """Raises the lease's error, if it has one."""
        if self.error is not None:
            raise self.error

    def _end(self, error: CocktailError) -> None:
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


class _Waiter:
    """One who waits for a recipe's turn.

    Attributes:
        arrived: time in line counts from here; for background work later than it really came.
        num_lost_mixes: times that the engine was lost while it mixed this recipe for the waiter.
    """

    __slots__ = ("arrived", "came", "is_background", "lease", "num_lost_mixes", "recipe", "timer")

    def __init__(self, recipe: Recipe, lease: asyncio.Future[Lease], *, came: float, delay_s: float | None) -> None:
        self.recipe = recipe
        self.lease = lease
        self.came = came
        self.is_background = delay_s is not None
        self.arrived = came + (delay_s or 0.0)
        self.num_lost_mixes = 0
        self.timer: asyncio.TimerHandle | None = None


class _Line:
    """Who waits, by recipe, each in order of arrival."""

    def __init__(self) -> None:
        self._by_recipe: dict[str, dict[_Waiter, None]] = {}

    def add(self, waiter: _Waiter) -> None:
        self._by_recipe.setdefault(waiter.recipe.digest, {})[waiter] = None

    def discard(self, waiter: _Waiter) -> None:
        digest = waiter.recipe.digest
        of_recipe = self._by_recipe.get(digest)
        if of_recipe is not None and waiter in of_recipe:
            del of_recipe[waiter]
            if not of_recipe:
                del self._by_recipe[digest]

    def of(self, digest: str) -> list[_Waiter]:
        return list(self._by_recipe.get(digest, ()))

    def pop(self, digest: str) -> list[_Waiter]:
        return list(self._by_recipe.pop(digest, ()))

    def oldest(self) -> _Waiter | None:
        firsts = (next(iter(of_recipe)) for of_recipe in self._by_recipe.values())
        return min(firsts, key=lambda waiter: waiter.arrived, default=None)

    def __iter__(self) -> Iterator[_Waiter]:
        for of_recipe in self._by_recipe.values():
            yield from of_recipe

    def __len__(self) -> int:
        return sum(map(len, self._by_recipe.values()))

    def __bool__(self) -> bool:
        return bool(self._by_recipe)


class Residency:
    """Decides whose turn it is on one engine. Lives on one event loop, whose clock is its clock.

    The owner of the engine calls `run` for each life of the engine; everybody else calls `acquire`.

    Args:
        mix: makes a recipe resident in the engine.
        slice_s: how long the resident recipe keeps its turn while others wait.
        drain_s: how long a turn's end waits for what is in flight.
        background_delay_s: how much later than it came a background lease counts as having arrived.
    """

    def __init__(
        self,
        mix: Mix,
        *,
        slice_s: float,
        drain_s: float,
        background_delay_s: float,
        stats: EngineStats | None = None,
    ) -> None:
        self._mix = mix
        self._slice_s = slice_s
        self._drain_s = drain_s
        self._background_delay_s = background_delay_s
        self.stats = stats or EngineStats()
        self._phase: Literal["closed", "open", "draining", "mixing"] = "closed"
        self._resident: str | None = None
        self._turn_started = 0.0
        self._last_was_visit = False
        self._in_flight: set[Lease] = set()
        self._traffic = _Line()
        self._background = _Line()
        self._changed = asyncio.Event()

    @property
    def resident(self) -> str | None:
        """Digest of the recipe in the engine; None while it is being mixed or the engine is down."""
        return self._resident

    @property
    def is_draining(self) -> bool:
        return self._phase == "draining"

    @property
    def is_mixing(self) -> bool:
        return self._phase == "mixing"

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_waiting(self) -> int:
        """Requests in line, background work left out."""
        return len(self._traffic)

    async def acquire(self, recipe: Recipe, *, background: bool = False, timeout_s: float | None = None) -> Lease:
        """Waits for the recipe's turn.

        Args:
            background: give way to those who are not.
            timeout_s: None: waits as long as it takes.

        Raises:
            QueueTimeoutError: the turn did not come in time.
            ModelNotReadyError: as above, and the engine was down at the end of that time.
            EngineError: mixing this recipe lost the engine, more than once.
            ClientError: this recipe cannot be mixed; nothing else was disturbed.
        """
        if self._phase == "open" and recipe.digest == self._resident:
            if not background:
                self.stats.wait.observe(0.0)
            return self._admit()
        loop = asyncio.get_running_loop()
        waiter = _Waiter(
            recipe,
            loop.create_future(),
            came=loop.time(),
            delay_s=self._background_delay_s if background else None,
        )
        line = self._background if background else self._traffic
        line.add(waiter)
        if timeout_s is not None:
            waiter.timer = loop.call_later(timeout_s, self._expire, waiter, timeout_s)
        self._changed.set()
        try:
            lease = await waiter.lease
            lease.raise_if_ended()  # between the admission and our waking up
            return lease
        except asyncio.CancelledError:
            # admitted, but cancelled before it could wake up
            if waiter.lease.done() and not waiter.lease.cancelled() and waiter.lease.exception() is None:
                waiter.lease.result().release()
            raise
        finally:
            line.discard(waiter)
            if waiter.timer is not None:
                waiter.timer.cancel()
            self._changed.set()

    async def run(self, resident: str) -> NoReturn:
        """Gives turns during one life of the engine. Cancel it when the engine is gone.

        Whoever holds a lease when it ends gets `EngineError`; whoever waits goes on waiting for the next life.

        Args:
            resident: digest of the recipe that the engine started with.

        Raises:
            EngineError: a mix failed, so that nobody knows what the parameters are: kill the engine.
        """
        if self._phase != "closed":
            raise RuntimeError("this residency already runs")
        self._resident = resident
        self._last_was_visit = False
        try:
            while True:
                self._open_turn()
                await self._until_turn_ends()
                self._phase = "draining"
                waiter = await self._drain()
                if waiter is not None:
                    await self._swap(waiter)
        finally:
            self._phase = "closed"
            self._resident = None
            self._end_in_flight(
                lambda: EngineError("the engine failed while it held the request; it is being restarted")
            )

    def fail_waiting(self, error: Callable[[], CapacityError]) -> None:
        """Sends everybody in line away: the engine will not come back soon."""
        for waiter in [*self._traffic, *self._background]:
            self._fail(waiter, error())

    def _admit(self) -> Lease:
        lease = Lease(self)
        self._in_flight.add(lease)
        return lease

    def _release(self, lease: Lease) -> None:
        self._in_flight.discard(lease)
        if not self._in_flight and (self._traffic or self._background):
            self._changed.set()

    def _open_turn(self) -> None:
        """Admits all who wait for the resident recipe."""
        digest = self._resident
        if digest is None:
            raise RuntimeError("a turn was opened with nothing resident")
        now = asyncio.get_running_loop().time()
        self._phase = "open"
        self._turn_started = now
        for waiter in [*self._traffic.pop(digest), *self._background.pop(digest)]:
            if waiter.lease.done():
                continue  # cancelled or expired; its task has not woken up yet
            if not waiter.is_background:
                self.stats.wait.observe(now - waiter.came)
            waiter.lease.set_result(self._admit())

    async def _until_turn_ends(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # while a turn is open, all who wait wait for another recipe
            waiter = self._next()
            if waiter is None:
                ends_at = None
            elif not self._in_flight:
                return
            else:
                ends_at = max(self._turn_started, waiter.arrived) + self._slice_s
                if loop.time() >= ends_at:
                    return
            await self._change(until=ends_at)

    async def _drain(self) -> _Waiter | None:
        """Waits for what is in flight, then names the next in line; None: nobody waits for another recipe any more."""
        deadline = asyncio.get_running_loop().time() + self._drain_s
        while True:
            waiter = self._next()
            if waiter is None or waiter.recipe.digest == self._resident:
                return None
            if not self._in_flight:
                return waiter
            if asyncio.get_running_loop().time() >= deadline:
                self.stats.num_drained += len(self._in_flight)
                self._end_in_flight(
                    lambda: DrainedError(
                        f"the request ran for more than drain_s={self._drain_s:g} s after its model's turn had ended, "
                        "and requests for other models wait; ask for fewer tokens, or raise engine.drain_s",
                        retry_after_s=self._slice_s,
                    )
                )
            else:
                await self._change(until=deadline)

    async def _swap(self, waiter: _Waiter) -> None:
        recipe = waiter.recipe
        before, self._resident = self._resident, None
        self._phase = "mixing"
        started = asyncio.get_running_loop().time()
        try:
            for _ in range(MAX_BUSY_MIXES):
                if await self._mix(recipe):
                    break
            else:
                raise EngineError(f"the engine stayed busy with nothing in flight, {MAX_BUSY_MIXES} times in a row")
        except ClientError as error:
            self._resident = before
            self._fail_recipe(recipe.digest, error)
            return
        except (CocktailError, asyncio.CancelledError) as error:
            self._give_up_on(recipe.digest, error)
            raise
        self._resident = recipe.digest
        self._last_was_visit = waiter.is_background
        self.stats.swap.observe(asyncio.get_running_loop().time() - started)

    def _next(self) -> _Waiter | None:
        traffic, background = self._traffic.oldest(), self._background.oldest()
        if traffic is None or background is None:
            return traffic or background
        if self._last_was_visit or traffic.arrived <= background.arrived:
            return traffic
        return background

    async def _change(self, *, until: float | None) -> None:
        """Returns when somebody came or went, or at that time."""
        self._changed.clear()
        try:
            async with asyncio.timeout_at(until):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _end_in_flight(self, error: Callable[[], CocktailError]) -> None:
        """Ended leases no longer count: their connections are closed, and the engine's own count guards the mix."""
        leases, self._in_flight = self._in_flight, set()
        for lease in leases:
            lease._end(error())

    def _expire(self, waiter: _Waiter, timeout_s: float) -> None:
        self.stats.num_queue_timeouts += 1
        if self._phase == "closed":
            self._fail(
                waiter,
                ModelNotReadyError(f"the engine is starting or restarting and was not ready within {timeout_s:g} s"),
            )
        else:
            self._fail(
                waiter,
                QueueTimeoutError(
                    f"the model's turn did not come within queue_timeout_s={timeout_s:g} s: too many models share this "
                    "engine now; retry later, or raise engine.queue_timeout_s",
                    retry_after_s=self._slice_s,
                ),
            )

    def _give_up_on(self, digest: str, error: BaseException) -> None:
        """Sends those away who saw the engine lost in a mix of their recipe before: the recipe may be the cause."""
        for waiter in [*self._traffic.of(digest), *self._background.of(digest)]:
            waiter.num_lost_mixes += 1
            if waiter.num_lost_mixes == MAX_LOST_MIXES:
                self._fail(
                    waiter,
                    EngineError(
                        f"the engine was lost {MAX_LOST_MIXES} times in a row while it mixed this model: {error!r}"
                    ),
                )

    def _fail_recipe(self, digest: str, error: CocktailError) -> None:
        for waiter in [*self._traffic.pop(digest), *self._background.pop(digest)]:
            self._fail(waiter, error)

    def _fail(self, waiter: _Waiter, error: CocktailError) -> None:
        (self._background if waiter.is_background else self._traffic).discard(waiter)
        if not waiter.lease.done():
            waiter.lease.set_exception(error)
