"""The seam between an engine and the rules by which its recipes are let in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn, Protocol

from cocktail_serve.engines.line_place import LinePlace
from cocktail_serve.engines.load import EngineLoad
from cocktail_serve.engines.scheduler_snapshot import SchedulerSnapshot
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.errors import CocktailError
from cocktail_serve.recipe import Recipe

Mix = Callable[[Recipe], Awaitable[float | None]]
"""Makes a recipe resident in an engine: seconds that it took. None: the engine was still busy and nothing changed.

A `ClientError` means that this recipe cannot be mixed and nothing changed; any other error, that the engine is lost.
"""


class Turns(Protocol):
    """Gives leases on one engine. Lives on one event loop.

    The owner of the engine calls `run` for each life of the engine; everybody else calls `acquire`. While a lease is
    held, the engine can answer by its recipe: alone, where recipes take turns, or beside others.
    """

    @property
    def num_in_flight(self) -> int:
        """Leases that are held."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests in line, background work left out."""
        ...

    @property
    def num_asked(self) -> int:
        """Requests in line or in flight, background work left out."""
        ...

    @property
    def is_mixing(self) -> bool:
        """Whether the engine is busy with its parameters, so that its own answers may be late."""
        ...

    async def acquire(
        self,
        recipe: Recipe,
        *,
        tenant: str = "",
        num_tokens: int = 0,
        background: bool = False,
        timeout_s: float | None = None,
        place: LinePlace | None = None,
    ) -> Lease:
        """Waits until the engine may be used by a recipe.

        Args:
            tenant: whose request it is; not read for background work.
            num_tokens: what its answer is expected to take; settle what it took with the lease.
            background: give way to those who are not.
            timeout_s: None: waits as long as it takes.
            place: by which it can be called out of the line; what it waited in others counts.

        Raises:
            RecalledError: it was called away.
            QueueTimeoutError: it was not let in within that time.
            ModelNotReadyError: the operator drains the engine or keeps another recipe in it, or the engine was down at
                the end of that time.
            EngineError: making the recipe ready lost the engine, more than once.
            ClientError: the engine cannot answer by this recipe; nothing else was disturbed.
        """
        ...

    async def run(self, resident: str, mix: Mix) -> NoReturn:
        """Gives leases during one life of the engine. Cancel it when the engine is gone.

        Whoever holds a lease when it ends gets `EngineError`; whoever waits goes on waiting for the next life.

        Args:
            resident: digest of the recipe that the engine started with.
            mix: on the engine of this life; not called where recipes share a batch.

        Raises:
            EngineError: nobody knows what the parameters are: kill the engine.
        """
        ...

    def fail_waiting(self, error: Callable[[], CocktailError]) -> None:
        """Sends everybody in line away: the engine will not come back soon."""
        ...

    def pin(self, recipe: Recipe | None) -> None:
        """Keeps a recipe in the engine and sends requests for others away; None: no longer.

        Raises:
            InvalidRequestError: the engine's recipes do not take turns.
        """
        ...

    def drain(self, is_drained: bool) -> None:
        """Lets nobody in from now on, and sends requests in line away; or lets them in again."""
        ...

    def end_in_flight(self, error: Callable[[], CocktailError]) -> None:
        """Takes their leases from all who hold one."""
        ...

    def snapshot(self) -> SchedulerSnapshot:
        """What the engine does now, and who waits for it."""
        ...

    def load(self) -> EngineLoad:
        """How full it is, for who chooses between engines."""
        ...


def loop_time() -> float:
    """The time that turns go by: of the event loop, in seconds."""
    return asyncio.get_running_loop().time()
