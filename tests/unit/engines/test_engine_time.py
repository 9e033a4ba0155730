"""Whose account an engine's work goes to: with every result, and with every error."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from cocktail_serve.engines.base import MixedAhead, Scored
from cocktail_serve.engines.engine_time import CallTimer, EngineTime, EngineTimeTotal, engine_time_of, totalled
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


async def test_tasks_inside_are_added_up() -> None:
    told: list[EngineTime] = []
    with totalled(told.append) as total:
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(total.of(work(scoring_s=1.0, mixing_s=0.5)))
    assert told == [EngineTime(3.0, 1.5)]
    await work(scoring_s=1.0)  # nobody adds it up
    assert told == [EngineTime(3.0, 1.5)]


async def test_two_at_once_are_kept_apart() -> None:
    told: dict[int, EngineTime] = {}

    async def job(number: int) -> None:
        with totalled(lambda time: told.setdefault(number, time)) as total:
            for _ in range(number):
                await total.of(work(scoring_s=1.0))

    await asyncio.gather(*(job(number) for number in (1, 2, 3)))
    assert told == {number: EngineTime(float(number)) for number in (1, 2, 3)}


async def test_what_failed_was_spent_too_and_nothing_is_not_told() -> None:
    told: list[EngineTime] = []
    with pytest.raises(RuntimeError), totalled(told.append) as total:
        await total.of(work(mixing_s=2.0, error=RuntimeError()))
    with totalled(told.append):
        pass
    assert told == [EngineTime(mixing_s=2.0)]


async def test_what_was_cancelled_was_spent_too() -> None:
    told: list[EngineTime] = []

    async def hang() -> Scored:
        with CallTimer() as timer:
            timer.add(mixing_s=2.0)
            with timer.scoring():
                await asyncio.Event().wait()
        raise AssertionError

    async def job() -> None:
        with totalled(told.append) as total:
            async with asyncio.TaskGroup() as group:
                group.create_task(total.of(hang()))
                group.create_task(total.of(hang()))

    task = asyncio.create_task(job())
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (time,) = told
    assert time.mixing_s == 4.0
    assert 0.03 <= time.scoring_s < 10, "of two"


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
