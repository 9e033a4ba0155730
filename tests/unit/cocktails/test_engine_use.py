"""Whose account an engine's work goes to: all of a job's calls, however they end."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from typing import Any

import pytest

from cocktail_serve.cocktails.engine_use import EngineUse
from cocktail_serve.engines.base import Scored
from cocktail_serve.engines.engine_time import CallTimer, EngineTimeTotal
from cocktail_serve.usage.amounts import UsageAmount
from tests.unit.engines.test_engine_time import work


class FakeLedger:
    """Use by model, in the order in which it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, UsageAmount]] = []

    def add(self, tenant: str, key_id: str | None, model: str, pool: str, use: UsageAmount) -> None:
        assert (tenant, key_id, pool) == ("acme", "k1", "flan")
        self.told.append((model, use))


def counted(ledger: Any, model: str = "films@1") -> AbstractContextManager[EngineTimeTotal]:
    return EngineUse(ledger).counted("acme", "k1", model=model, pool_id="flan")


async def test_tasks_inside_are_added_up() -> None:
    ledger = FakeLedger()
    with counted(ledger) as total:
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(total.of(work(scoring_s=1.0, mixing_s=0.5)))
    assert ledger.told == [("films@1", UsageAmount(scoring_s=3.0, mixing_s=1.5))]
    await work(scoring_s=1.0)  # nobody adds it up
    assert ledger.told == [("films@1", UsageAmount(scoring_s=3.0, mixing_s=1.5))]


async def test_two_at_once_are_kept_apart() -> None:
    ledger = FakeLedger()

    async def job(number: int) -> None:
        with counted(ledger, f"films@{number}") as total:
            for _ in range(number):
                await total.of(work(scoring_s=1.0))

    await asyncio.gather(*(job(number) for number in (1, 2, 3)))
    assert dict(ledger.told) == {f"films@{number}": UsageAmount(scoring_s=float(number)) for number in (1, 2, 3)}


async def test_what_failed_was_spent_too_and_nothing_is_not_told() -> None:
    ledger = FakeLedger()
    with pytest.raises(RuntimeError), counted(ledger) as total:
        await total.of(work(mixing_s=2.0, error=RuntimeError()))
    with counted(ledger):
        pass
    assert ledger.told == [("films@1", UsageAmount(mixing_s=2.0))]


async def test_what_was_cancelled_was_spent_too() -> None:
    ledger = FakeLedger()

    async def hang() -> Scored:
        with CallTimer() as timer:
            timer.add(mixing_s=2.0)
            with timer.scoring():
                await asyncio.Event().wait()
        raise AssertionError

    async def job() -> None:
        with counted(ledger) as total:
            async with asyncio.TaskGroup() as group:
                group.create_task(total.of(hang()))
                group.create_task(total.of(hang()))

    task = asyncio.create_task(job())
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ((_, use),) = ledger.told
    assert use.mixing_s == 4.0
    assert 0.03 <= use.scoring_s < 10, "of two"
