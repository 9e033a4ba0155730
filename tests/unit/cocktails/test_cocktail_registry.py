"""Ids that collide, and failures that read the same after a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve import errors
from cocktail_serve.cocktails.catalog import Catalog
from cocktail_serve.cocktails.cocktail import Cocktail, Failure
from cocktail_serve.cocktails.options import CocktailOptions, CocktailRequest
from cocktail_serve.cocktails.registry import Registry
from cocktail_serve.cocktails.store import Store
from cocktail_serve.database.database import Database
from cocktail_serve.errors import CocktailError, ConflictError, NotFoundError, PermissionDeniedError, StorageError
from cocktail_serve.pool import Member, Pool
from cocktail_serve.recipe import one_hot

POOL = Pool("flan", "decoder", Member("base", Path("/b"), "fp-base", "float32", 8), {}, "text")


def request(seed: int = 0, name: str = "films", *, inline: bool = False) -> CocktailRequest:
    options = CocktailOptions(
        name=name,
        pool="flan",
        pool_fingerprint=POOL.fingerprint,
        merging_weights={"base": 1.0},
        seed=seed,
        inline=inline,
    )
    return CocktailRequest(options, None)


@pytest.fixture
def gone() -> list[Cocktail]:
    """What the registry has said is gone."""
    return []


@pytest.fixture
async def registry(gone: list[Cocktail]) -> AsyncIterator[Registry]:
    database = Database("sqlite:///:memory:")
    await database.open()
    store = Store(database)
    catalog = Catalog({"flan": POOL}, {"flan": "float32"}, clock=lambda: 1700000000.0)
    registry = Registry(catalog, store, max_inline=3, on_change=lambda _, removed: gone.extend(removed))
    await registry.load()
    yield registry
    await database.close()


async def ready(registry: Registry, wanted: CocktailRequest) -> str:
    cocktail, _ = await registry.find_or_add("acme", wanted, score_items=(), warnings=())
    await registry.update(cocktail.uid, status="ready", recipe=one_hot(POOL, "base", dtype="float32"))
    return cocktail.id


@pytest.fixture
def one_digit_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of one hexadecimal digit, so that among seventeen requests two collide."""
    monkeypatch.setattr("cocktail_serve.cocktails.entries.DIGEST8", 1)
    monkeypatch.setattr("cocktail_serve.cocktails.catalog.DIGEST8", 1)
    monkeypatch.setattr("cocktail_serve.cocktails.cocktail.DIGEST8", 1)


@pytest.mark.usefixtures("one_digit_ids")
async def test_two_requests_whose_digests_begin_alike_never_share_an_id(registry: Registry) -> None:
    by_digit: dict[str, CocktailRequest] = {}
    for wanted in map(request, range(17)):
        digit = wanted.digest[0]
        if digit in by_digit:
            break
        by_digit[digit] = wanted
        await registry.find_or_add("acme", wanted, score_items=(), warnings=())
    with pytest.raises(ConflictError, match="change 'seed'") as caught:
        await registry.find_or_add("acme", wanted, score_items=(), warnings=())
    assert caught.value.param == "seed"
    assert registry.catalog.get("acme", f"films@{digit}").digest == by_digit[digit].digest
    assert len(registry.catalog.list("acme")) == len(by_digit)
    _, admission = await registry.find_or_add("other", wanted, score_items=(), warnings=())
    assert admission == "new", "another tenant's ids are its own"


async def test_a_cocktail_whose_name_a_new_pool_takes_stays_reachable_by_id() -> None:
    database = Database("sqlite:///:memory:")
    await database.open()
    store = Store(database)
    before = Registry(Catalog({"flan": POOL}, {"flan": "float32"}), store, max_inline=3)
    await before.load()
    version = await ready(before, request())
    films = Pool("films", "decoder", POOL.base, {}, "text")
    catalog = Catalog({"flan": POOL, "films": films}, {"flan": "float32", "films": "float32"})
    after = Registry(catalog, store, max_inline=3)
    await after.load()
    assert after.catalog.resolve("acme", "films").pool is films
    assert after.catalog.resolve("acme", version).pool is POOL
    assert list(after.catalog.models("acme")) == ["films", version, "flan"]
    with pytest.raises(PermissionDeniedError):
        await after.remove("acme", "films")
    await after.remove("acme", version)
    await database.close()


async def test_an_update_of_a_final_version_changes_nothing(registry: Registry) -> None:
    version = await ready(registry, request())
    uid = registry.catalog.get("acme", version).uid
    assert await registry.update(uid, status="failed") is None
    assert registry.catalog.get("acme", version).status == "ready"


async def test_an_inline_cocktail_at_work_is_not_the_one_to_go(registry: Registry, gone: list[Cocktail]) -> None:
    working, _ = await registry.find_or_add("acme", request(0, "flan", inline=True), score_items=(), warnings=())
    versions = [await ready(registry, request(seed, "flan", inline=True)) for seed in (1, 2)]
    await registry.find_or_add("acme", request(3, "flan", inline=True), score_items=(), warnings=())
    assert [cocktail.id for cocktail in gone] == versions[:1]
    assert registry.catalog.by_uid(working.uid) is not None


async def test_what_had_to_go_is_told_though_nothing_takes_its_place(
    registry: Registry, gone: list[Cocktail], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [await ready(registry, request(seed, "flan", inline=True)) for seed in (0, 1, 2)]

    async def refuse(store: Store, *args: Any, **options: Any) -> Cocktail:
        raise StorageError("the disk is full")

    monkeypatch.setattr(Store, "add", refuse)
    with pytest.raises(StorageError):
        await registry.find_or_add("acme", request(3, "flan", inline=True), score_items=(), warnings=())
    assert [cocktail.id for cocktail in gone] == versions[:1]


async def test_names_of_inline_cocktails_are_no_names(registry: Registry) -> None:
    version = await ready(registry, request(0, "flan", inline=True))
    with pytest.raises(NotFoundError):
        registry.catalog.get("acme", "flan")
    with pytest.raises(NotFoundError):
        await registry.pin("acme", "flan", version)


def all_errors(root: type[CocktailError] = CocktailError) -> Iterator[type[CocktailError]]:
    """Those that a job can end with; what another test has imported may have some of its own."""
    if root.__module__ == errors.__name__:
        yield root
    for child in root.__subclasses__():
        yield from all_errors(child)


@pytest.mark.parametrize("kind", sorted(set(all_errors()), key=lambda kind: kind.__name__))
def test_a_failure_is_the_same_error_again(kind: type[CocktailError]) -> None:
    error = kind("what went wrong", param="examples")
    again = Failure(**Failure.of(error).to_json()).exception()  # type: ignore[arg-type]
    assert type(again) is type(error)
    assert (again.message, again.param, again.code) == (error.message, error.param, error.code)


def test_a_failure_of_a_class_this_release_does_not_have_keeps_its_code() -> None:
    error = Failure(type="GoneError", code="gone", message="it was", param=None).exception()
    assert isinstance(error, errors.CocktailError)
    assert (error.code, error.message) == ("gone", "it was")
