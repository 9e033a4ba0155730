"""Scores in the database, of either kind: what is kept comes back equal, and goes with the last who needs it."""

from __future__ import annotations

import numpy as np
import pytest

from cocktail_serve.cocktails.score_store import ScoreKey, ScoreStore
from cocktail_serve.cocktails.store import Store
from cocktail_serve.database.database import Database
from tests.cocktails import queued_cocktail

KEY = ScoreKey(model="m", variant="v")


@pytest.fixture
async def store(database: Database) -> Store:
    return Store(database)


@pytest.fixture
async def scores(database: Database) -> ScoreStore:
    return ScoreStore(database)


async def test_scores_are_kept_apart_by_tenant_model_and_variant(store: Store, scores: ScoreStore) -> None:
    await store.add(queued_cocktail("1"), None, ["i"])
    await scores.keep_losses("1", KEY, {"i": 1.25})
    assert await scores.losses("acme", KEY, ["i", "j"]) == {"i": 1.25}
    assert await scores.losses("other", KEY, ["i"]) == {}
    assert await scores.losses("acme", ScoreKey("m2", "v"), ["i"]) == {}
    assert await scores.losses("acme", ScoreKey("m", "v2"), ["i"]) == {}
    await scores.keep_losses("1", KEY, {"i": 9.0, "j": 2.0})
    assert await scores.losses("acme", KEY, ["i", "j"]) == {"i": 1.25, "j": 2.0}, "the first to come stays"


async def test_more_items_than_a_statement_takes(store: Store, scores: ScoreStore) -> None:
    items = [f"{number:064x}" for number in range(1201)]
    await store.add(queued_cocktail("1"), None, items)
    await scores.keep_losses("1", KEY, {item: float(number) for number, item in enumerate(items)})
    kept = await scores.losses("acme", KEY, items)
    assert len(kept) == 1201
    assert kept[items[777]] == 777.0


async def test_embeddings_come_back_bit_for_bit(store: Store, scores: ScoreStore) -> None:
    vector = np.random.default_rng(0).normal(size=384).astype(np.float32)
    await store.add(queued_cocktail("1"), None, ["t"])
    await scores.keep_embeddings("1", KEY, {"t": vector})
    kept = await scores.embeddings("acme", KEY, ["t"])
    assert kept["t"].dtype == np.float32
    np.testing.assert_array_equal(kept["t"], vector)


async def test_deletion_keeps_the_scores_another_cocktail_of_the_tenant_needs(store: Store, scores: ScoreStore) -> None:
    for uid, tenant, items in (("1", "acme", ["a", "b"]), ("2", "acme", ["b", "c"]), ("3", "other", ["a"])):
        await store.add(queued_cocktail(uid, tenant), None, items)
        await scores.keep_losses(uid, KEY, dict.fromkeys(items, 1.0))
    await store.delete("acme", ["1"])
    assert set(await scores.losses("acme", KEY, ["a", "b", "c"])) == {"b", "c"}
    assert set(await scores.losses("other", KEY, ["a"])) == {"a"}


async def test_scores_that_arrive_after_the_deletion_are_not_kept(store: Store, scores: ScoreStore) -> None:
    await store.add(queued_cocktail("1"), None, ["a"])
    await store.delete("acme", ["1"])
    await scores.keep_losses("1", KEY, {"a": 1.0})
    assert await scores.losses("acme", KEY, ["a"]) == {}
