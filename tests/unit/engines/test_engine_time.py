"""How long engines worked for a call: told with every result, and with every error."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from cocktail_serve.engines.base import MixedAhead, Scored
from cocktail_serve.engines.engine_time import CallTimer, EngineTime, EngineTimeTotal, engine_time_of
from cocktail_serve.errors import ContextLengthError, EngineError


async def work(*, scoring_s: float = 0.0, mixing_s: float = 0.0, error: BaseException | None = None) -> MixedAhead:
    """A call of an engine, which ends in an error if there is one."""
    with CallTimer() as timer:
        await asyncio.sleep(0)
        timer.add(scoring_s=scoring_s)
        timer.add(mixing_s=mixing_s)
        if error is not None:
            raise error
    return MixedAhead(timer.time)


async def test_an_error_that_several_are_told_carries_each_ones_own_time() -> None:
    error = EngineError("the engine was lost while it mixed this model")
    totals = [EngineTimeTotal() for _ in range(3)]
    ended = await asyncio.gather(
        totals[0].of(work(scoring_s=1.0, error=error)),
        totals[1].of(work(error=error)),
        totals[2].of(work(scoring_s=4.0, error=error)),
        return_exceptions=True,
    )
    assert ended == [error] * 3
    assert [total.time.scoring_s for total in totals] == [1.0, 0.0, 4.0]


async def test_an_error_takes_it_to_another_process() -> None:
    with pytest.raises(ContextLengthError) as caught:
        await work(scoring_s=1.0, mixing_s=0.5, error=ContextLengthError("row 2: too long", param="examples"))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.message, again.param) == (ContextLengthError, "row 2: too long", "examples")
    assert engine_time_of(again) == EngineTime(1.0, 0.5)
    assert engine_time_of(ValueError()) == EngineTime()
    scored = Scored([1.0, 2.0], EngineTime(0.25))
    assert pickle.loads(pickle.dumps(scored)) == scored
