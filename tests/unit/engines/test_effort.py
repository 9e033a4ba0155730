"""Whose account an engine's work goes to, through tasks and without anybody passing it on."""

from __future__ import annotations

import asyncio

import pytest

from cocktail_serve.engines.effort import Effort, measured, spend


async def test_tasks_inside_are_added_up() -> None:
    told: list[Effort] = []

    async def work() -> None:
        await asyncio.sleep(0)
        spend(scoring_s=1.0)
        spend(mixing_s=0.5)

    with measured(told.append):
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(work())
    assert told == [Effort(3.0, 1.5)]
    spend(scoring_s=1.0)  # nobody measures
    assert told == [Effort(3.0, 1.5)]


async def test_two_at_once_are_kept_apart() -> None:
    told: dict[int, Effort] = {}

    async def job(number: int) -> None:
        with measured(lambda effort: told.setdefault(number, effort)):
            for _ in range(number):
                spend(scoring_s=1.0)
                await asyncio.sleep(0)

    await asyncio.gather(*(job(number) for number in (1, 2, 3)))
    assert told == {number: Effort(float(number)) for number in (1, 2, 3)}


def test_what_failed_was_spent_too_and_nothing_is_not_told() -> None:
    told: list[Effort] = []

    def fail() -> None:
        spend(mixing_s=2.0)
        raise RuntimeError

    with pytest.raises(RuntimeError), measured(told.append):
        fail()
    with measured(told.append):
        pass
    assert told == [Effort(mixing_s=2.0)]
