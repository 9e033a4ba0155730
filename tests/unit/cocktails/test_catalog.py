"""What is found without looking at anything else, pages of a list, and waiting for a change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from cocktail_serve.cocktails import catalog as catalog_module
from cocktail_serve.cocktails.catalog import Catalog
from cocktail_serve.cocktails.cocktail import Cocktail, CrossValidation
from cocktail_serve.cocktails.options import CocktailOptions, CocktailRequest
from cocktail_serve.cocktails.pacing import paced
from cocktail_serve.cocktails.registry import Registry
from cocktail_serve.cocktails.store import Store
from cocktail_serve.config import Limits
from cocktail_serve.database.database import Database
from cocktail_serve.errors import InvalidRequestError, MethodNotServedError, NotFoundError
from cocktail_serve.pool import Member, Pool
from cocktail_serve.recipe import Recipe, make_recipe


def member(name: str) -> Member:
    return Member(name, Path("/models") / name, f"fp-{name}", "float32", 8)


POOL = Pool("flan", "decoder", member("base"), {"nq": member("nq")}, "text")


def recipe(share: float) -> Recipe:
    return make_recipe(POOL, {"base": 1 - share, "nq": share}, dtype="float32")


def request(name: str, seed: int = 0, *, inline: bool = False) -> CocktailRequest:
    options = CocktailOptions(
        name=name,
        pool="flan",
        pool_fingerprint=POOL.fingerprint,
        merging_weights={"base": 1.0},
        seed=seed,
        inline=inline,
    )
    return CocktailRequest(options, None)


def cocktail(tenant: str, number: int, name: str = "films", **changes: Any) -> Cocktail:
    """A ready cocktail; the number is its place in the order of making, and decides its recipe."""
    asked = request(name, number, inline=changes.pop("inline", False))
    fields: dict[str, Any] = {
        "uid": f"{tenant}-{number}",
        "tenant": tenant,
        "name": name,
        "pool_id": "flan",
        "kind": "decoder",
        "digest": asked.digest,
        "options": asked.options,
        "created_at": 1_700_000_000.0 + number,
        "sequence": number,
        "status": "ready",
        "progress": 1.0,
        "recipe": recipe(number / 1000),
    }
    return Cocktail(**fields | changes)


@pytest.fixture
def catalog() -> Catalog:
    return Catalog({"flan": POOL}, {"flan": "float32"}, clock=lambda: 1_700_000_000.0)


@pytest.fixture
def gone() -> list[Cocktail]:
    """What the registry has said is gone."""
    return []


@pytest.fixture
async def registry(catalog: Catalog, gone: list[Cocktail]) -> AsyncIterator[Registry]:
    database = Database("sqlite:///:memory:")
    await database.open()
    yield Registry(catalog, Store(database), max_inline=100, on_change=lambda _, removed: gone.extend(removed))
    await database.close()


class Touched:
    """Stands where another tenant's cocktail was, and counts who looks at it."""

    def __init__(self) -> None:
        self.__dict__["names"] = []

    def __getattr__(self, name: str) -> NoReturn:
        self.names.append(name)
        raise AssertionError(f"{name} of another tenant's cocktail was read")


class Strangers:
    """Cocktails of other tenants, in every state, which nobody may look at any more."""

    def __init__(self, catalog: Catalog) -> None:
        states: list[dict[str, Any]] = [
            {},
            {"status": "failed", "recipe": None},
            {"status": "scoring", "recipe": None},
            {"cross_validation": CrossValidation("pending")},
            {"inline": True, "name": "flan"},
        ]
        entries = [
            catalog.insert(cocktail(f"tenant-{tenant}", number, **state))
            for tenant in range(3)
            for number, state in enumerate(states, start=500)
        ]
        self.watches = [Touched() for _ in entries]
        for entry, watch in zip(entries, self.watches, strict=True):
            entry.cocktail = watch  # type: ignore[assignment]

    @property
    def num_touched(self) -> int:
        return sum(bool(watch.names) for watch in self.watches)


async def test_what_a_tenant_asks_touches_only_its_own(catalog: Catalog) -> None:
    own = [catalog.insert(cocktail("acme", number)).cocktail for number in (1, 2)]
    working = catalog.insert(cocktail("acme", 3, "books", status="scoring", recipe=None)).cocktail
    strangers = Strangers(catalog)
    assert list(catalog.models("acme")) == sorted(["flan", "flan/nq", "films", own[0].id, own[1].id])
    assert [found.id for found in catalog.list("acme")] == [working.id, own[1].id, own[0].id]
    assert [found.id for found in catalog.page("acme", after=working.id, limit=1).data] == [own[1].id]
    assert catalog.resolve("acme", "films").recipe == recipe(0.002)
    assert catalog.get("acme", own[0].id).uid == "acme-1"
    found = catalog.find_version("acme", request("films", 2))
    assert found is not None
    assert found.cocktail == catalog.get("acme", "films")
    assert (await catalog.until("acme-3", lambda now: now.is_final, 0.0)) == working
    with pytest.raises(NotFoundError):
        catalog.resolve("acme", "unknown")
    with pytest.raises(NotFoundError):
        catalog.get("nobody", own[0].id)
    assert strangers.num_touched == 0


async def test_what_is_asked_of_all_tenants_touches_only_what_it_is_about(catalog: Catalog) -> None:
    own = catalog.insert(cocktail("acme", 1)).cocktail
    strangers = Strangers(catalog)
    assert catalog.uses("flan", recipe(0.001).digest)
    assert catalog.uses("flan", recipe(0.5).digest), "another tenant's"
    assert catalog.uses("flan", recipe(1.0).digest), "an expert's"
    assert not catalog.uses("flan", recipe(0.9).digest)
    assert not catalog.uses("mini", recipe(0.001).digest)
    assert catalog.named("flan", [recipe(0.001).digest, recipe(0.0).digest, recipe(0.9).digest]) == {
        recipe(0.001).digest: [("acme", own.id)],
        recipe(0.0).digest: [(None, "flan")],
        recipe(0.9).digest: [],
    }
    assert catalog.statuses() == {"ready": 10, "failed": 3, "scoring": 3}
    assert strangers.num_touched == 0
    assert [len(catalog.unfinished()), len(catalog.unreported())] == [3, 3]


async def test_what_a_tenant_changes_touches_only_its_own(
    catalog: Catalog, registry: Registry, gone: list[Cocktail]
) -> None:
    strangers = Strangers(catalog)
    limits = Limits(cocktails=2, scoring_jobs=2)
    made = [
        (await registry.find_or_add("acme", request("films", seed), score_items=(), warnings=(), limits=limits))[0]
        for seed in (1, 2)
    ]
    for share, queued in zip((0.1, 0.2), made, strict=True):
        ready = await registry.update(queued.uid, status="ready", recipe=recipe(share))
        assert ready is not None
    assert (await registry.pin("acme", "films", made[0].id)).id == made[0].id
    assert catalog.resolve("acme", "films").recipe == recipe(0.1)
    again, admission = await registry.find_or_add(
        "acme", request("films", 2), score_items=(), warnings=(), limits=limits
    )
    assert (again.uid, admission) == (made[1].uid, "existing")
    inline, _ = await registry.find_or_add("acme", request("flan", 9, inline=True), score_items=(), warnings=())
    assert (inline.inline, gone) == (True, [])
    await registry.sync()
    removed = await registry.remove("acme", made[0].id)
    assert [cocktail.uid for cocktail in removed] == [made[0].uid]
    assert gone == removed, "who has something to let go of is told"
    assert not catalog.uses("flan", recipe(0.1).digest)
    assert catalog.resolve("acme", "films").recipe == recipe(0.2)
    assert strangers.num_touched == 0


async def test_counts_follow_what_a_version_becomes(catalog: Catalog, registry: Registry) -> None:
    queued, _ = await registry.find_or_add("acme", request("films"), score_items=(), warnings=())
    assert [one.uid for one in catalog.unfinished()] == [queued.uid]
    assert (catalog.statuses(), catalog.of_tenant("acme").num_unfinished) == ({"queued": 1}, 1)
    await registry.update(queued.uid, status="mixing", recipe=recipe(0.3))
    assert catalog.uses("flan", recipe(0.3).digest)
    await registry.update(queued.uid, status="ready", recipe=recipe(0.4), cross_validation=CrossValidation("pending"))
    assert not catalog.uses("flan", recipe(0.3).digest)
    assert [one.uid for one in catalog.unreported()] == [queued.uid]
    assert (catalog.statuses(), catalog.of_tenant("acme").num_unfinished) == ({"ready": 1}, 0)
    await registry.keep_cross_validation(queued.uid, CrossValidation("ready"))
    assert (catalog.unreported(), catalog.unfinished()) == ([], [])
    await registry.remove("acme", "films")
    assert (catalog.statuses(), catalog.list("acme"), catalog.uids()) == ({}, [], set())
    assert not catalog.uses("flan", recipe(0.4).digest)
    assert list(catalog.models("acme")) == ["flan", "flan/nq"]


async def test_only_the_current_version_is_marked(catalog: Catalog) -> None:
    old, new = (catalog.insert(cocktail("acme", number)) for number in (1, 2))

    def marks() -> list[bool]:
        return [one.current for one in reversed(catalog.list("acme"))]

    assert marks() == [False, True]
    catalog.pin("acme", "films", old)
    assert marks() == [True, False]
    catalog.update(old, cocktail("acme", 1, mixed_loss=1.0))
    assert marks() == [True, False]
    assert catalog.drop(old).current
    assert marks() == [True]
    catalog.update(new, cocktail("acme", 2, status="queued", recipe=None))
    assert marks() == [False]


async def test_the_model_list_follows_experts_that_come_and_go(catalog: Catalog) -> None:
    pools = {"flan": POOL}
    catalog = Catalog(pools, {"flan": "float32"})
    version = catalog.insert(cocktail("acme", 1)).cocktail.id
    before = ["films", version, "flan", "flan/nq"]
    assert list(catalog.models("acme")) == before
    assert catalog.models("acme") is catalog.models("acme"), "kept, not sorted again"
    pools["flan"] = Pool("flan", "decoder", POOL.base, {}, "text")
    catalog.reread_pools()
    assert list(catalog.models("acme")) == ["flan"]
    with pytest.raises(NotFoundError, match="no longer has"):
        catalog.resolve("acme", "films")
    pools["flan"] = POOL
    catalog.reread_pools()
    assert list(catalog.models("acme")) == before
    assert catalog.resolve("acme", "films").pool is POOL


def ids_of_pages(catalog: Catalog, *, limit: int, name: str | None = None) -> list[list[str]]:
    """All pages, as a client that follows `last_id` gets them."""
    pages = []
    after = None
    while True:
        page = catalog.page("acme", name, after=after, limit=limit)
        pages.append([found.id for found in page.data])
        if not page.has_more:
            return pages
        after = pages[-1][-1]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7])
def test_pages_hold_each_version_once_the_newest_first(catalog: Catalog, limit: int) -> None:
    made = [catalog.insert(cocktail("acme", number, f"name-{number % 2}")).cocktail.id for number in (3, 1, 6, 2, 5, 4)]
    catalog.insert(cocktail("acme", 7, "flan", inline=True))
    catalog.insert(cocktail("other", 8))
    newest = [made[index] for index in (2, 4, 5, 0, 3, 1)]
    pages = ids_of_pages(catalog, limit=limit)
    assert [found for page in pages for found in page] == newest
    assert [len(page) for page in pages[:-1]] == [limit] * (len(pages) - 1)
    of_name = [found for found in newest if found.startswith("name-1@")]
    assert [found for page in ids_of_pages(catalog, limit=limit, name="name-1") for found in page] == of_name
    assert catalog.page("acme", "unknown").data == []


def test_who_deletes_what_it_lists_lists_on(catalog: Catalog) -> None:
    entries = {
        entry.cocktail.id: entry for entry in (catalog.insert(cocktail("acme", number)) for number in range(1, 8))
    }
    seen = []
    after = None
    while (page := catalog.page("acme", after=after, limit=2)).data:
        seen += [found.id for found in page.data]
        after = seen[-1]
        for found in page.data:
            catalog.drop(entries[found.id])
    assert seen == list(reversed(entries))
    assert not page.has_more


def test_a_version_asked_for_again_keeps_its_place(catalog: Catalog) -> None:
    first, second = (catalog.insert(cocktail("acme", number)) for number in (1, 2))
    catalog.update(first, cocktail("acme", 1, sequence=9))
    assert [found.uid for found in catalog.list("acme")] == [second.cocktail.uid, first.cocktail.uid]
    assert catalog.get("acme", "films").uid == first.cocktail.uid, "but is what its name means"


@pytest.mark.parametrize("after", ["films", "films@00000000", "", "flan", "file-1"])
def test_behind_what_was_never_listed_there_is_no_page(catalog: Catalog, after: str) -> None:
    catalog.insert(cocktail("acme", 1))
    catalog.insert(cocktail("other", 2))
    with pytest.raises(InvalidRequestError, match="is not an id of this list") as caught:
        catalog.page("acme", after=after)
    assert caught.value.param == "after"


def test_nothing_is_listed_behind_what_is_another_tenants_or_inline(catalog: Catalog) -> None:
    catalog.insert(cocktail("acme", 1))
    others = catalog.insert(cocktail("other", 2)).cocktail.id
    inline = catalog.insert(cocktail("acme", 3, "flan", inline=True)).cocktail.id
    for after in (others, inline):
        with pytest.raises(InvalidRequestError):
            catalog.page("acme", after=after)


def test_places_of_what_is_gone_are_forgotten_in_time(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "PLACES_KEPT", 2)
    catalog.insert(cocktail("acme", 1))
    gone = [catalog.insert(cocktail("acme", number)) for number in (2, 3, 4)]
    ids = [catalog.drop(entry).id for entry in gone]
    assert [found.uid for found in catalog.page("acme", after=ids[1]).data] == ["acme-1"]
    with pytest.raises(InvalidRequestError):
        catalog.page("acme", after=ids[0])


async def test_a_change_wakes_who_waits_for_it(catalog: Catalog) -> None:
    entry = catalog.insert(cocktail("acme", 1, status="scoring", progress=0.2, recipe=None))
    half = asyncio.create_task(catalog.until("acme-1", lambda now: now.progress >= 0.5, 10.0))
    final = asyncio.create_task(catalog.until("acme-1", lambda now: now.is_final, 10.0))
    gone = asyncio.create_task(catalog.until("acme-1", lambda now: False, 10.0))
    await asyncio.sleep(0)
    catalog.update(entry, cocktail("acme", 1, status="scoring", progress=0.4, recipe=None))
    await asyncio.sleep(0.01)
    assert not half.done()
    catalog.update(entry, cocktail("acme", 1, status="scoring", progress=0.6, recipe=None))
    found = await half
    assert found is not None
    assert (found.progress, final.done()) == (0.6, False)
    catalog.update(entry, cocktail("acme", 1))
    assert await final == catalog.get("acme", "films")
    catalog.drop(entry)
    assert await gone is None


async def test_waiting_ends_in_time_and_leaves_nothing(catalog: Catalog) -> None:
    entry = catalog.insert(cocktail("acme", 1, status="scoring", recipe=None))
    assert await catalog.until("acme-1", lambda now: now.is_final, 0.01) == entry.cocktail
    assert await catalog.until("unknown", lambda now: now.is_final, 10.0) is None
    catalog.drop(entry)
    assert catalog._changes == {}


async def test_others_run_between_what_is_paced() -> None:
    turns: list[str] = []

    async def other() -> None:
        for _ in range(3):
            turns.append("other")
            await asyncio.sleep(0)

    def values() -> Iterator[int]:
        for value in range(6):
            turns.append(str(value))
            yield value

    task = asyncio.create_task(other())
    assert [value async for value in paced(values(), every=2)] == list(range(6))
    assert turns == ["0", "1", "other", "2", "3", "other", "4", "5", "other"]
    await task


async def test_news_of_others_are_told_once_though_a_caller_leaves_in_the_middle(tmp_path: Path) -> None:
    """Names are taken in a few at a time, and others run in between: what was taken in has been told."""
    url = f"sqlite:///{tmp_path / 'registry.sqlite'}"
    databases = [Database(url), Database(url)]
    registries = []
    told: list[str] = []
    for database in databases:
        await database.open()
        catalog = Catalog({"flan": POOL}, {"flan": "float32"})
        registries.append(
            Registry(
                catalog,
                Store(database),
                max_inline=3,
                on_change=lambda changed, removed: told.extend(one.uid for one in (*changed, *removed)),
            )
        )
        await registries[-1].load()
    one, other = registries
    gone, _ = await one.find_or_add("acme", request("gone"), score_items=(), warnings=())
    made = {
        (await other.find_or_add("acme", request(f"films-{number}"), score_items=(), warnings=()))[0].uid
        for number in range(12)
    }
    await other.remove("acme", "gone")
    told.clear()

    leaving = asyncio.create_task(one.sync())
    while not told:  # noqa: ASYNC110  # what is watched for has no event of its own
        await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert len(told) < 13
    assert {found.uid for found in one.catalog.list("acme")} | {gone.uid} == set(told), "told, or not there"
    await one.sync()
    assert sorted(told) == sorted({*made, gone.uid})
    assert {found.uid for found in one.catalog.list("acme")} == made
    for database in databases:
        await database.close()


class TestMode:
    """A cocktail of another engine's, whose mixtures reached it otherwise."""

    @pytest.fixture
    def unmerged(self) -> Catalog:
        return Catalog({"flan": replace(POOL, mode="unmerged")}, {"flan": "float32"}, clock=lambda: 1_700_000_000.0)

    def test_a_sum_is_served_in_the_form_of_now_with_a_warning(self, catalog: Catalog, unmerged: Catalog) -> None:
        made = cocktail("acme", 1)
        adopted = unmerged.pool_models.as_configured(made)
        assert adopted.recipe == replace(recipe(0.001), mode="unmerged")
        assert adopted.warnings == (
            "made for float32; the engine runs unmerged float32 now, so the mixture rounds differently",
        )
        assert unmerged.pool_models.served_model(adopted).recipe == adopted.recipe
        assert unmerged.pool_models.as_configured(adopted) is adopted
        back = catalog.pool_models.as_configured(adopted)
        assert back.recipe == made.recipe
        assert "made for unmerged float32; the engine runs float32 now" in back.warnings[-1]

    def test_what_needs_merged_parameters_is_kept_and_not_served(self, catalog: Catalog, unmerged: Catalog) -> None:
        ties = make_recipe(POOL, {"nq": 0.5}, dtype="float32", method="ties")
        made = unmerged.insert(unmerged.pool_models.as_configured(cocktail("acme", 1, recipe=ties))).cocktail
        assert made.recipe == ties
        with pytest.raises(MethodNotServedError, match="method 'ties', which needs merged parameters") as caught:
            unmerged.resolve("acme", "films")
        assert caught.value.param == "model"
        assert list(unmerged.models("acme")) == ["flan", "flan/nq"]
        assert catalog.pool_models.served_model(made).recipe == ties
