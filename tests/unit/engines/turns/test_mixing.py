"""What becomes of those who wait, and of the operator's pin, where a mix is refused or loses the engine."""

from __future__ import annotations

import asyncio

import pytest

from cocktail_serve.engines.turns.hold import OperatorHold
from cocktail_serve.engines.turns.mixing import Mixing
from cocktail_serve.engines.turns.wait_queue import Claimant, Waiter, WaitQueues
from cocktail_serve.errors import CocktailError, EngineError, InvalidMixError
from cocktail_serve.recipe import Recipe

WANTED, OTHER = (Recipe(base="base", coefficients=((name, 1.0),), dtype="float32") for name in ("one", "other"))

MIX_S = 0.5

Outcome = bool | CocktailError | asyncio.CancelledError


class World:
    """A request and background work wait for each of two recipes; mixes end as told."""

    def __init__(self, *outcomes: Outcome, pinned: Recipe | None = None) -> None:
        self.outcomes = list(outcomes)
        self.queues, self.hold = WaitQueues(), OperatorHold()
        self.mixing = Mixing(self._mix, queues=self.queues, hold=self.hold)
        self.wanted = [self._wait(WANTED, claimant) for claimant in ("tenant", "background")]
        self.others = [self._wait(OTHER, claimant) for claimant in ("tenant", "background")]
        if pinned is not None:
            self.hold.pin(pinned, 0.0)

    def _wait(self, recipe: Recipe, claimant: Claimant) -> Waiter:
        granted = asyncio.get_running_loop().create_future()
        waiter = Waiter(recipe=recipe, made_at=0.0, ranked_from=0.0, claimant=claimant, granted=granted)
        self.queues.holding(waiter).add(waiter)
        return waiter

    async def _mix(self, recipe: Recipe) -> float | None:
        assert recipe == WANTED
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, bool):
            return MIX_S if outcome else None
        raise outcome

    def assert_sent_away(self, error: type[CocktailError], message: str) -> None:
        """Those who wait for the recipe, and nobody else."""
        for waiter in self.wanted:
            with pytest.raises(error, match=message):
                waiter.granted.result()
        assert not any(waiter.is_answered for waiter in self.others)
        assert list(self.queues.requests) + list(self.queues.background) == self.others


@pytest.mark.parametrize("num_busy", [0, 1, 2])
async def test_a_busy_engine_is_asked_three_times(num_busy: int) -> None:
    world = World(*[False] * num_busy, True)
    assert await world.mixing.make_resident(WANTED) == MIX_S
    assert not world.outcomes


async def test_an_engine_that_stays_busy_is_lost() -> None:
    world = World(False, False, False, True)
    with pytest.raises(EngineError, match="stayed busy with nothing in flight, 3 times in a row"):
        await world.mixing.make_resident(WANTED)
    assert world.outcomes == [True]
    assert [waiter.num_lost_mixes for waiter in [*world.wanted, *world.others]] == [1, 1, 0, 0]


@pytest.mark.parametrize(("pinned", "kept"), [(None, None), (WANTED, None), (OTHER, OTHER.digest)])
async def test_a_refused_recipe(pinned: Recipe | None, kept: str | None) -> None:
    world = World(InvalidMixError("no such model"), pinned=pinned)
    assert await world.mixing.make_resident(WANTED) is None
    world.assert_sent_away(InvalidMixError, "no such model")
    assert world.hold.pinned_digest == kept


@pytest.mark.parametrize("loss", [EngineError("torn"), asyncio.CancelledError()])
@pytest.mark.parametrize(("pinned", "kept"), [(None, None), (WANTED, None), (OTHER, OTHER.digest)])
async def test_a_recipe_that_loses_the_engine_twice(
    loss: CocktailError | asyncio.CancelledError, pinned: Recipe | None, kept: str | None
) -> None:
    world = World(loss, loss, pinned=pinned)
    with pytest.raises(type(loss)):
        await world.mixing.make_resident(WANTED)
    assert not any(waiter.is_answered for waiter in world.wanted)
    assert world.hold.pinned_digest == (None if pinned is None else pinned.digest)
    with pytest.raises(type(loss)):
        await world.mixing.make_resident(WANTED)
    world.assert_sent_away(EngineError, rf"lost 2 times in a row while it mixed this model: {type(loss).__name__}\(")
    assert world.hold.pinned_digest == kept
