"""The ledger on both kinds of database: what is counted comes out, once, whatever happens on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select

from cocktail_serve.database import tables
from cocktail_serve.database.database import Database
from cocktail_serve.errors import InvalidRequestError, StorageError
from cocktail_serve.usage import ledger as ledger_module
from cocktail_serve.usage.amounts import UsageAccount, UsageAmount
from cocktail_serve.usage.days import usage_days
from cocktail_serve.usage.ledger import OTHER_MODELS, Ledger
from cocktail_serve.usage.store import UsageRow, UsageStore

DAY = date(2026, 3, 1)
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()


class Flaky(UsageStore):
    """A store that can be gone, or lose the answer to a commit."""

    is_gone = False
    loses_answers = False

    async def write(self, writer: str, number: int, batch: Mapping[UsageAccount, UsageAmount]) -> None:
        if self.is_gone:
            raise StorageError("gone")
        await super().write(writer, number, batch)
        if self.loses_answers:
            raise StorageError("the connection broke while it committed")


@dataclass
class World:
    database: Database
    now: float = NOW
    store: Flaky = field(init=False)
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.store = Flaky(self.database)
        self.ledger = Ledger(self.store, clock=lambda: self.now)

    def ask(self, num_in: int = 10, num_out: int = 5, **who: Any) -> None:
        account = {"tenant": "acme", "key_id": "k1", "model": "films@1a2b3c4d", "pool": "flan", **who}
        self.ledger.add(**account, use=UsageAmount(requests=1, tokens_in=num_in, tokens_out=num_out))

    async def rows(self, *group_by: Any, **where: Any) -> list[UsageRow]:
        return await self.store.sums(DAY - timedelta(days=400), DAY + timedelta(days=400), group_by=group_by, **where)

    async def total(self) -> UsageAmount:
        rows = await self.rows()
        return rows[0].use if rows else UsageAmount()


@pytest.fixture
async def world(database: Database) -> World:
    return World(database)


async def test_what_is_counted_comes_out_by_day_key_and_model(world: World) -> None:
    world.ask()
    world.ask()
    world.ask(model="flan", key_id=None)
    world.ask(tenant="other")
    world.ledger.add("acme", "k1", "films@1a2b3c4d", "flan", UsageAmount(scoring_s=1.5, mixing_s=0.25))
    world.now += 86400
    world.ask()
    await world.ledger.flush()
    films = "films@1a2b3c4d"
    assert await world.rows("day", "key", "model", "pool", tenant="acme") == [
        UsageRow(UsageAmount(1, 10, 5), DAY, None, "", "flan", "flan"),
        UsageRow(UsageAmount(2, 20, 10, 1.5, 0.25), DAY, None, "k1", films, "flan"),
        UsageRow(UsageAmount(1, 10, 5), DAY + timedelta(days=1), None, "k1", films, "flan"),
    ]
    assert [(row.tenant, row.use.requests) for row in await world.rows("tenant")] == [("acme", 4), ("other", 1)]
    assert await world.store.sums(DAY, DAY, group_by=[], tenant="acme") == [UsageRow(UsageAmount(3, 30, 15, 1.5, 0.25))]
    assert await world.rows(tenant="never") == []


async def test_batches_add_to_each_other_and_to_other_writers(world: World) -> None:
    other = Ledger(world.store, clock=lambda: world.now)
    for _ in range(3):
        world.ask()
        other.add("acme", "k1", "films@1a2b3c4d", "flan", UsageAmount(requests=1, tokens_in=1))
        await asyncio.gather(world.ledger.flush(), other.flush())
    assert await world.total() == UsageAmount(6, 33, 15)
    await world.ledger.stop()
    await other.stop()
    async with world.database.read() as connection:
        assert (await connection.execute(select(tables.usage_writers))).all() == [], "both said that they leave"


async def test_flushing_nothing_writes_nothing(world: World) -> None:
    world.store.is_gone = True
    await world.ledger.flush()


async def test_a_store_that_is_gone_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "FLUSH_S", 0.001)
    world.ledger.start()
    world.store.is_gone = True
    for _ in range(20):
        world.ask()
        await asyncio.sleep(0.002)
    with pytest.raises(StorageError):
        await world.ledger.flush()
    assert await world.total() == UsageAmount()
    world.store.is_gone = False
    async with asyncio.timeout(10):
        while (await world.total()).requests < 20:  # noqa: ASYNC110  # the ledger tells nobody
            await asyncio.sleep(0.001)
    await world.ledger.stop()
    assert await world.total() == UsageAmount(20, 200, 100)


async def test_a_batch_whose_commit_was_not_heard_of_counts_once(world: World) -> None:
    world.ask()
    world.store.loses_answers = True
    with pytest.raises(StorageError):
        await world.ledger.flush()
    world.ask()
    world.store.loses_answers = False
    await world.ledger.flush()
    await world.ledger.flush()
    assert await world.total() == UsageAmount(2, 20, 10)


async def test_stopping_writes_what_is_left(world: World) -> None:
    world.ledger.start()
    world.ask()
    await world.ledger.stop()
    await world.ledger.stop()
    assert await world.total() == UsageAmount(1, 10, 5)


async def test_what_is_lost_at_the_end_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.ask()
    world.store.is_gone = True
    await world.ledger.stop()
    assert "usage of 1 accounts could not be written" in caplog.text


async def test_memory_is_bounded_and_tokens_are_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_ACCOUNTS", 3)
    for number in range(10):
        world.ask(model=f"flan@{number:08x}")
    assert len(world.ledger._counting) == 4
    await world.ledger.flush()
    assert await world.total() == UsageAmount(10, 100, 50)
    assert {row.model: row.use.requests for row in await world.rows("model")}[OTHER_MODELS] == 7


async def test_many_tasks_at_once(world: World) -> None:
    async def ask(number: int) -> None:
        for _ in range(20):
            world.ask(tenant=f"t{number % 3}")
            await asyncio.sleep(0)
            if number == 0:
                await world.ledger.flush()

    await asyncio.gather(*(ask(number) for number in range(10)))
    await world.ledger.flush()
    assert await world.total() == UsageAmount(200, 2000, 1000)


def test_days() -> None:
    today = datetime.now(UTC).date()
    assert usage_days(None, None) == (today - timedelta(days=29), today)
    assert usage_days(None, DAY) == (date(2026, 1, 31), DAY)
    assert usage_days(DAY, DAY) == (DAY, DAY)
    assert usage_days(None, date.min) == (date.min, date.min)
    for start, end in ((DAY, DAY - timedelta(days=1)), (DAY - timedelta(days=366), DAY)):
        with pytest.raises(InvalidRequestError):
            usage_days(start, end)
