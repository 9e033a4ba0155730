"""Two services on one store, of either kind: what one does the other knows, and nothing is done by both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cocktail_serve.cocktails.service import CocktailService
from cocktail_serve.errors import ConflictError, NotFoundError
from tests.integration.test_cocktail_service import A, B, C, ScoringEngine, World, made, make_pool, until


class Pair:
    """Two gateways below HTTP: pools and engines of their own, one store."""

    def __init__(self, here: World, one: CocktailService, there: World, other: CocktailService) -> None:
        self.here, self.one, self.there, self.other = here, one, there, other


@pytest.fixture
async def pair(tmp_path: Path, database_url: str) -> AsyncIterator[Pair]:
    here, there = World(tmp_path / "here", url=database_url), World(tmp_path / "there", url=database_url)
    async with here.service(place="here") as one, there.service(place="there") as other:
        yield Pair(here, one, there, other)


async def silenced(service: CocktailService) -> None:
    """What others see of a process that stands still: it learns nothing and gives no sign of life."""
    await service._cluster_loop.pause()


async def test_what_one_makes_the_other_serves(pair: Pair) -> None:
    ready = await made(pair.one, pair.here.request())
    served = await pair.other.find_served_model("acme", "films")
    assert (served.model_id, served.recipe) == (ready.id, ready.recipe)
    assert await pair.other.find_cocktail("acme", ready.id) == ready
    assert pair.other.catalog.list("acme") == [ready]
    assert pair.there.scoring.visits == [], "nothing was measured again"
    other = await made(pair.one, pair.here.request("books", examples=[C]))
    assert await pair.other.examples("acme", other.id) == [C]
    with pytest.raises(NotFoundError):
        await pair.other.find_served_model("another", "films")


async def test_the_other_waits_for_what_one_makes(pair: Pair) -> None:
    pair.here.scoring.gate.clear()
    created, _ = await pair.one.create("acme", pair.here.request())
    await pair.other.find_cocktail("acme", created.id)
    waiting = asyncio.create_task(pair.other.wait("acme", created.id, 30.0))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    pair.here.scoring.gate.set()
    assert (await waiting).status == "ready"


async def test_equal_requests_to_both_at_once_are_one_job(pair: Pair) -> None:
    services = [(pair.one, pair.here), (pair.other, pair.there)] * 10
    answers = await asyncio.gather(*(service.create("acme", world.request()) for service, world in services))
    assert [existed for _, existed in answers].count(False) == 1
    assert len({cocktail.uid for cocktail, _ in answers}) == 1
    for service in (pair.one, pair.other):
        assert (await service.wait("acme", "films", 10.0)).status == "ready"
    assert len(pair.here.scoring.visits) + len(pair.there.scoring.visits) == 4, "base, two experts and the mixture"


async def test_the_newest_version_pins_and_deletions_are_the_same_in_both(pair: Pair) -> None:
    first = await made(pair.one, pair.here.request(seed=1))
    second = await made(pair.other, pair.there.request(seed=2))
    await until(lambda: pair.one.catalog.resolve("acme", "films").model_id == second.id)
    await pair.one.create("acme", pair.here.request(seed=1))
    await until(lambda: pair.other.catalog.resolve("acme", "films").model_id == first.id)
    await pair.other.set_current("acme", "films", second.id)
    await until(lambda: pair.one.catalog.resolve("acme", "films").model_id == second.id)
    await pair.one.set_current("acme", "films", None)
    await until(lambda: pair.other.catalog.resolve("acme", "films").model_id == first.id)
    await pair.other.set_current("acme", "films", second.id)
    await pair.one.delete("acme", second.id)
    assert pair.one.catalog.resolve("acme", "films").model_id == first.id
    await until(lambda: pair.other.catalog.resolve("acme", "films").model_id == first.id)
    with pytest.raises(NotFoundError):
        await pair.other.set_current("acme", "films", second.id)
    await pair.other.delete("acme", "films")
    await until(lambda: pair.one.catalog.list("acme") == [])


async def test_the_other_frees_the_parameters_of_what_one_deletes(pair: Pair) -> None:
    ready = await made(pair.one, pair.here.request())
    await pair.other.find_served_model("acme", "films")
    await pair.one.delete("acme", "films")
    await until(lambda: pair.there.scoring.forgotten == [ready.recipe.digest])


async def test_cancelling_and_deleting_ends_the_others_job(pair: Pair) -> None:
    pair.here.scoring.gate.clear()
    for end in (pair.other.cancel, pair.other.delete):
        created, _ = await pair.one.create("acme", pair.here.request())
        # "scoring" is told while its three calls are still on their way to the engine
        await until(lambda: pair.here.scoring.num_waiting == 3)
        assert pair.one.catalog.get("acme", "films").status == "scoring"
        dropped = pair.here.scoring.num_dropped
        await pair.other.find_cocktail("acme", created.id)
        waiting = asyncio.create_task(pair.one.wait("acme", created.id, 10.0))
        await asyncio.sleep(0)
        await end("acme", created.id)
        assert (await waiting).status == "cancelled"
        await until(lambda before=dropped: pair.here.scoring.num_dropped == before + 3)


async def test_a_job_is_taken_over_when_its_owner_stands_still_and_the_owner_can_no_longer_write(pair: Pair) -> None:
    pair.here.scoring.gate.clear()
    created, _ = await pair.one.create("acme", pair.here.request())
    await until(lambda: pair.one.catalog.get("acme", created.id).status == "scoring")
    await silenced(pair.one)
    await pair.other.find_cocktail("acme", created.id)
    ready = await pair.other.wait("acme", created.id, 20.0)
    assert ready.status == "ready"
    assert len(pair.there.scoring.visits) == 4

    # the owner wakes up, and measures something else before it hears of anything
    assert pair.one.catalog.get("acme", created.id).status == "scoring"
    pair.here.scoring.loss_of = dict.fromkeys(pair.here.scoring.loss_of, 9.0)
    pair.here.scoring.gate.set()
    await until(lambda: not pair.one._jobs.is_running(created.uid))
    assert await pair.one.find_cocktail("acme", created.id) == ready
    assert await pair.other.find_cocktail("acme", created.id) == ready
    assert (await pair.one.find_served_model("acme", "films")).recipe == ready.recipe


async def test_who_was_taken_for_dead_joins_again_and_owns_its_new_jobs(pair: Pair) -> None:
    await silenced(pair.one)
    before = pair.one._cluster_loop._heartbeats.me
    await until(lambda: before not in pair.other._cluster_loop._heartbeats._beats)
    await pair.one._cluster_loop.beat()
    assert pair.one._cluster_loop._heartbeats.me != before
    pair.here.scoring.gate.clear()
    created, _ = await pair.one.create("acme", pair.here.request())
    await until(lambda: pair.one._jobs.is_running(created.uid))
    assert (await pair.other.find_cocktail("acme", created.id)).owner == pair.one._cluster_loop._heartbeats.me
    pair.here.scoring.gate.set()
    assert (await pair.one.wait("acme", created.id, 10.0)).status == "ready"


async def test_who_leaves_hands_its_jobs_over_at_once(tmp_path: Path, database_url: str) -> None:
    """At the other's next beat, and long before the lease ends, after which it would take them over anyway."""
    here, there = (World(tmp_path / name, url=database_url, lease_s=60.0) for name in ("here", "there"))
    async with there.service(place="there") as other:
        here.scoring.gate.clear()
        async with here.service(place="here") as one:
            created, _ = await one.create("acme", here.request())
            await until(lambda: one.catalog.get("acme", created.id).status == "scoring")
        await other.find_cocktail("acme", created.id)
        await other._cluster_loop.beat()
        assert (await other.wait("acme", created.id, 10.0)).status == "ready"


async def test_a_job_goes_only_to_a_gateway_whose_pool_is_as_it_was(tmp_path: Path, database_url: str) -> None:
    here, there, third = (World(tmp_path / name, url=database_url) for name in ("here", "there", "third"))
    there.pools["flan"] = make_pool("flan", "decoder", ["ag-news"])
    there.scoring = ScoringEngine(there.pools["flan"], {"base": 2.0, "ag-news": 1.0})
    async with there.service(place="there") as other:
        here.scoring.gate.clear()
        async with third.service(place="third") as last:
            async with here.service(place="here") as one:
                created, _ = await one.create("acme", here.request())
                await until(lambda: one.catalog.get("acme", created.id).status == "scoring")
            await last.find_cocktail("acme", created.id)
            assert (await last.wait("acme", created.id, 10.0)).status == "ready"
        assert there.scoring.visits == []
        with pytest.raises(NotFoundError, match="no longer has"):
            await other.find_served_model("acme", created.id)


async def test_two_that_change_at_once_lose_nothing(pair: Pair) -> None:
    """Versions of one name made, asked again and deleted through both at once: both end with the same."""

    async def make(service: CocktailService, world: World, seed: int, rows: list[dict[str, str]]) -> None:
        for _ in range(3):
            cocktail, _existed = await service.create("acme", world.request(seed=seed, examples=rows))
            await service.wait("acme", cocktail.id, 10.0)

    async def drop(service: CocktailService, world: World, seed: int) -> None:
        for _ in range(4):
            await asyncio.sleep(0.03)
            try:
                await service.delete("acme", f"films@{world.request(seed=seed, examples=[C]).digest[:8]}")
            except (NotFoundError, ConflictError):
                continue

    await asyncio.gather(
        *(make(pair.one, pair.here, seed, [A, B]) for seed in range(4)),
        *(make(pair.other, pair.there, seed, [A, B]) for seed in range(4)),
        *(make(pair.one, pair.here, seed, [C]) for seed in range(2)),
        *(drop(pair.other, pair.there, seed) for seed in range(2)),
    )
    for service in (pair.one, pair.other):
        await service._registry.sync()
    shown = pair.one.catalog.list("acme")
    assert shown == pair.other.catalog.list("acme")
    kept = {pair.here.request(seed=seed).digest for seed in range(4)}
    assert kept <= {cocktail.digest for cocktail in shown}
    assert all(cocktail.status == "ready" for cocktail in shown if cocktail.digest in kept)


async def test_one_of_them_sweeps(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cocktail_serve.cocktails.cluster_loop.SWEEP_S", 0.0)
    swept: list[str] = []

    async def note(self: CocktailService) -> None:
        swept.append(self._cluster_loop._heartbeats.me)

    monkeypatch.setattr(CocktailService, "_sweep", note)
    worlds = [World(tmp_path / name, url=database_url) for name in ("here", "there")]
    async with worlds[0].service(place="here") as one, worlds[1].service(place="there") as other:
        both = {service._cluster_loop._heartbeats.me: service for service in (one, other)}
        swept.clear()
        await until(lambda: len(swept) >= 4)
        (sweeper,) = set(swept)
        await silenced(both.pop(sweeper))
        swept.clear()
        await until(lambda: len(swept) >= 2)
        assert set(swept) == set(both), "another one, when it is dead"
