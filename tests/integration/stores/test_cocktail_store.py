"""Cocktails in the database, of either kind: what is written comes back equal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cocktail_serve.cocktails.cocktail import Failure
from cocktail_serve.cocktails.store import StaleError, Store
from cocktail_serve.database.database import Database
from cocktail_serve.errors import StorageError
from cocktail_serve.examples import ExampleSet, TextExample
from cocktail_serve.recipe import Recipe
from tests.cocktails import queued_cocktail


@pytest.fixture
async def store(database: Database) -> Store:
    return Store(database)


async def test_a_cocktail_comes_back_equal(store: Store) -> None:
    queued = queued_cocktail("1")
    ready = queued_cocktail(
        "2",
        status="ready",
        progress=1.0,
        ready_at=1700000001.5,
        losses={"base": 0.1 + 0.2, "nq": 1e-300},
        merging_weights={"base": 1 / 3, "nq": 2 / 3},
        entropy=0.6,
        mixed_loss=0.5,
        recipe=Recipe("fp", (("fp", 1 / 3), ("fq", 2 / 3)), "bfloat16"),
        warnings=("one", "two"),
    )
    failed = queued_cocktail("3", status="failed", error=Failure("EngineError", "engine_error", "it died", None))
    for each in (queued, ready, failed):
        await store.add(each, None, [])
    news = await store.load()
    assert news.cocktails == [queued, ready, failed]
    assert list(news.cocktails[1].losses) == ["base", "nq"]
    assert (news.pins, news.last) == ({}, 3)


async def test_an_update_of_what_was_deleted_does_not_bring_it_back(store: Store) -> None:
    added = await store.add(queued_cocktail("1"), None, [])
    await store.delete("acme", ["1"])
    with pytest.raises(StaleError):
        await store.update(queued_cocktail("1", status="ready", change=1), before=added)
    assert (await store.load()).cocktails == []


async def test_examples_keep_their_order(store: Store) -> None:
    examples = ExampleSet(tuple(TextExample(f"in {n}", f"out {n}") for n in range(12)), num_given=12)
    await store.add(queued_cocktail("1"), examples, ["i"])
    assert await store.examples("1") == examples.to_json()
    assert await store.examples("2") == []


async def test_a_pin_is_replaced_removed_and_goes_with_its_version(store: Store) -> None:
    for uid in "12":
        await store.add(queued_cocktail(uid), None, [])
    await store.pin("acme", "films", "1")
    await store.pin("acme", "films", "2")
    assert (await store.load()).pins == {("acme", "films"): "2"}
    await store.delete("acme", ["2"])
    assert (await store.load()).pins == {}
    await store.pin("acme", "films", "1")
    await store.pin("acme", "films", None)
    assert (await store.load()).pins == {}


async def test_messages_carry_no_examples(store: Store) -> None:
    secret = ExampleSet((TextExample("the vault opens at dawn", "quietly"),), num_given=1)
    await store.add(queued_cocktail("1"), secret, [])
    with pytest.raises(StorageError) as caught:
        await store.add(queued_cocktail("1", name="books"), secret, [])
    assert "vault" not in caught.value.message
    assert await store.examples("1") == secret.to_json()


async def test_news_are_what_changed_since(store: Store) -> None:
    assert await store.changes_since(0) is None
    first = await store.add(queued_cocktail("1"), None, [])
    second = await store.add(queued_cocktail("2", digest="b" * 8), None, [])
    news = await store.changes_since(first.change)
    assert news is not None
    assert (news.cocktails, news.removed, news.is_all) == ([second], [], False)
    await store.pin("acme", "films", "1")
    await store.delete("acme", ["2"])
    news = await store.changes_since(second.change)
    assert news is not None
    assert ([one.uid for one in news.cocktails], news.removed) == (["1"], ["2"])
    assert news.pins == {("acme", "films"): "1"}
    assert await store.changes_since(news.last) is None


async def test_a_write_that_goes_back_to_something_older_is_refused(store: Store) -> None:
    added = await store.add(queued_cocktail("1"), None, [])
    scoring = await store.update(replace(added, status="scoring"), before=added)
    with pytest.raises(StaleError):
        await store.update(replace(added, status="ready"), before=added)
    assert [one.status for one in (await store.load()).cocktails] == ["scoring"]
    again = await store.update(replace(scoring, status="queued"), before=scoring, newest=True)
    assert again.sequence == again.change > scoring.sequence


async def test_one_id_is_added_once(store: Store) -> None:
    await store.add(queued_cocktail("1", digest="a" * 8 + "1"), None, [])
    with pytest.raises(StaleError):
        await store.add(queued_cocktail("2", digest="a" * 8 + "2"), None, [])
    await store.add(queued_cocktail("3", "other", digest="a" * 8 + "2"), None, [])
    assert [one.uid for one in (await store.load()).cocktails] == ["1", "3"]


async def test_who_missed_removals_that_are_no_longer_known_reads_everything(store: Store) -> None:
    for uid in "123":
        await store.add(queued_cocktail(uid), None, [])
    await store.delete("acme", ["1"])
    await store.delete("acme", ["2"])
    await store.forget_removals(keep=1)
    behind, near = await store.changes_since(3), await store.changes_since(4)
    assert behind is not None
    assert near is not None
    assert (behind.is_all, [one.uid for one in behind.cocktails]) == (True, ["3"])
    assert (near.is_all, near.cocktails, near.removed) == (False, [], ["2"])
