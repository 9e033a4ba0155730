"""Who is there and who is dead, by numbers that stand still, never by comparing clocks."""

from __future__ import annotations

import pytest

from cocktail_serve.cocktails.gateway_heartbeats import GatewayHeartbeats
from cocktail_serve.database.database import Database


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def joined(database: Database, clock: Clock, place: str) -> GatewayHeartbeats:
    peers = GatewayHeartbeats(database, place=place, lease_s=10.0, clock=clock)
    await peers.join()
    return peers


async def test_who_gives_no_sign_of_life_is_struck_off_after_the_lease(database: Database, clock: Clock) -> None:
    one, other = await joined(database, clock, "a"), await joined(database, clock, "b")
    assert await one.alive() == {one.me, other.me}
    for _ in range(4):
        clock.now += 2.0
        await one.beat()
        assert await one.alive() == {one.me, other.me}
    await other.beat()
    for _ in range(5):
        clock.now += 2.0
        assert await one.alive() == {one.me, other.me}, "from its last sign of life on"
    clock.now += 2.0
    assert await one.alive() == {one.me}
    assert not await other.beat(), "it hears of it"
    former = other.me
    await other.join()
    assert other.me != former, "its next life is another's"
    assert await one.alive() == {one.me, other.me}


async def test_who_could_not_look_declares_nobody_dead(database: Database, clock: Clock) -> None:
    one, other = await joined(database, clock, "a"), await joined(database, clock, "b")
    await one.alive()
    clock.now += 60.0
    assert await one.alive() == {one.me, other.me}, "it may have been the store that was gone for all"
    for _ in range(4):
        clock.now += 2.0
        assert await one.alive() == {one.me, other.me}
    clock.now += 2.0
    assert await one.alive() == {one.me}


async def test_a_sign_of_life_at_the_last_moment_counts(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await joined(database, clock, "a"), await joined(database, clock, "b")
    await one.alive()
    strike_off = one._strike_off

    async def late(gateway: str, beat: int) -> bool:
        await other.beat()
        return await strike_off(gateway, beat)

    monkeypatch.setattr(one, "_strike_off", late)
    for _ in range(6):
        clock.now += 2.0
        assert await one.alive() == {one.me, other.me}


async def test_a_successor_in_the_same_place_knows_that_the_other_is_dead(database: Database, clock: Clock) -> None:
    crashed, beside = await joined(database, clock, "a"), await joined(database, clock, "b")
    successor = await joined(database, clock, "a")
    assert await beside.alive() == {beside.me, successor.me}
    assert not await crashed.beat()


async def test_who_leaves_is_gone_at_once(database: Database, clock: Clock) -> None:
    one, other = await joined(database, clock, "a"), await joined(database, clock, "b")
    await one.leave()
    assert await other.alive() == {other.me}
