"""Making the next recipe resident, and what becomes of those who wait for it where that fails."""

from __future__ import annotations

import asyncio

from cocktail_serve.engines.engine_gone import EngineGoneError
from cocktail_serve.engines.turns.base import Mix
from cocktail_serve.engines.turns.hold import OperatorHold
from cocktail_serve.engines.turns.wait_queue import WaitQueues
from cocktail_serve.errors import ClientError, CocktailError, EngineError
from cocktail_serve.recipe import Recipe

MAX_BUSY_MIXES = 3
"""Mixes refused as busy in a row, with nothing in flight on our side, before the engine counts as lost."""

MAX_LOST_MIXES = 2
"""Engines lost in the mix of one recipe before those who wait for it are sent away.

One is bad luck (a process was killed just then), two look like the recipe's doing, and waiting on would never end.
"""


class Mixing:
    """Mixes recipes into one engine, of which nothing is in flight, during one life of it.

    Args:
        queues: those who wait are sent away where their recipe is refused, or keeps losing the engine.
        hold: so is the operator's pin.
    """

    def __init__(self, mix: Mix, *, queues: WaitQueues, hold: OperatorHold) -> None:
        self._mix = mix
        self._queues = queues
        self._hold = hold

    async def make_resident(self, recipe: Recipe) -> float | None:
        """Seconds that the engine took to mix the recipe, which is resident now; None: it was refused, and nothing has
        changed in the engine.

        Raises:
            EngineError: nobody knows what the parameters are.
        """
        try:
            for _ in range(MAX_BUSY_MIXES):
                if (seconds := await self._mix(recipe)) is not None:
                    return seconds
            raise EngineError(f"the engine stayed busy with nothing in flight, {MAX_BUSY_MIXES} times in a row")
        except ClientError as error:
            self._refuse(recipe.digest, error)
            return None
        except (CocktailError, asyncio.CancelledError) as error:
            self._count_loss(recipe.digest, error)
            raise

    def _refuse(self, digest: str, error: CocktailError) -> None:
        if self._hold.pinned_digest == digest:
            self._hold.unpin()
        for waiter in self._queues.of(digest):
            self._queues.fail(waiter, error)

    def _count_loss(self, digest: str, error: BaseException) -> None:
        """Sends those away who saw an engine lost in a mix of their recipe before: the recipe may be the cause, but not
        where the engine was gone before it was asked."""
        if isinstance(error, EngineGoneError):
            return
        for waiter in self._queues.of(digest):
            waiter.num_lost_mixes += 1
            if waiter.place is not None:
                waiter.place.num_lost_mixes = waiter.num_lost_mixes
            if waiter.num_lost_mixes == MAX_LOST_MIXES:
                self._queues.fail(
                    waiter,
                    EngineError(
                        f"the engine was lost {MAX_LOST_MIXES} times in a row while it mixed this model: {error!r}"
                    ),
                )
        pinned = self._hold.pinned
        if pinned is not None and pinned.recipe.digest == digest:
            pinned.num_lost_mixes += 1
            if pinned.num_lost_mixes == MAX_LOST_MIXES:
                self._hold.unpin()
