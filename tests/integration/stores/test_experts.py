"""Experts of several servers on one database: what one adds or removes, the others take over."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sqlalchemy import select

from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.cocktails.expert_roots import ExpertRoots
from cocktail_serve.cocktails.experts import Experts
from cocktail_serve.config import PoolConfig
from cocktail_serve.database import tables
from cocktail_serve.database.database import Database
from cocktail_serve.errors import ConflictError, ModelChangedError, StorageError
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import one_hot
from tests.models import make_decoder, make_decoder_pool


class Engine:
    """Takes note of its pool; refuses once told to."""

    def __init__(self) -> None:
        self.experts: list[str] = []
        self.refuses = False

    async def change_pool(self, pool: Pool) -> None:
        if self.refuses:
            raise StorageError("no space")
        self.experts = list(pool.experts)


class Server:
    def __init__(self, database: Database, pool: Pool, root: Path) -> None:
        self.pools = {pool.id: pool}
        self.engine = Engine()
        self.experts = Experts(
            database,
            self.pools,
            {pool.id: self.engine},  # type: ignore[dict-item]  # as much of an engine as is asked for
            roots=[root],
            cache_dir=root / "cache",
        )

    @property
    def names(self) -> list[str]:
        return list(self.pools["pico"].experts)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("roots")
    make_decoder_pool(root, ("red",))
    make_decoder(root / "green", perturbation_seed=5)
    make_decoder(root / "blue", perturbation_seed=6)
    return root


@pytest.fixture
async def servers(database_url: str, root: Path) -> AsyncIterator[tuple[Server, Server]]:
    config = {
        "id": "pico",
        "kind": "decoder",
        "base": str(root / "base"),
        "experts": {"red": str(root / "red")},
        "engine": {"type": "fake"},
    }
    pool = open_pool(PoolConfig.model_validate(config), cache_dir=root / "cache")
    database = Database(database_url)
    await database.open()
    yield Server(database, pool, root), Server(database, pool, root)
    await database.close()


async def test_another_server_takes_over_what_was_added_and_removed(servers: tuple[Server, Server]) -> None:
    one, other = servers
    await one.experts.add("pico", "green", "green")
    assert other.names == ["red"]
    assert await other.experts.load() == {}
    assert one.names == other.names == one.engine.experts == other.engine.experts == ["green", "red"]
    assert one.pools["pico"].fingerprint == other.pools["pico"].fingerprint
    await one.experts.remove("pico", "green", force=False)
    await other.experts.load()
    assert one.names == other.names == other.engine.experts == ["red"]


async def test_the_same_name_with_other_content_is_taken_over_too(servers: tuple[Server, Server]) -> None:
    one, other = servers
    await one.experts.add("pico", "new", "green")
    await other.experts.load()
    await one.experts.remove("pico", "new", force=False)
    await one.experts.add("pico", "new", "blue")
    await other.experts.load()
    assert other.pools["pico"].experts["new"].fingerprint == one.pools["pico"].experts["new"].fingerprint


async def test_two_servers_that_add_the_same_name_at_once(servers: tuple[Server, Server]) -> None:
    one, other = servers
    await one.experts.add("pico", "new", "green")
    with pytest.raises(ConflictError):
        await other.experts.add("pico", "new", "blue")
    await other.experts.load()
    assert other.pools["pico"].experts["new"].fingerprint == one.pools["pico"].experts["new"].fingerprint


async def test_an_engine_that_cannot_be_told_leaves_nothing_behind(servers: tuple[Server, Server]) -> None:
    one, other = servers
    one.engine.refuses = True
    with pytest.raises(StorageError):
        await one.experts.add("pico", "green", "green")
    assert one.names == ["red"]
    async with one.experts._database.read() as connection:
        assert (await connection.execute(select(tables.experts))).all() == []
    await other.experts.add("pico", "green", "green")
    # what another server added is tried again
    with pytest.raises(StorageError):
        await one.experts.load()
    one.engine.refuses = False
    await one.experts.load()
    assert one.names == ["green", "red"]


async def test_one_that_is_left_out_says_why(servers: tuple[Server, Server]) -> None:
    one, other = servers
    await one.experts.add("pico", "green", "green")
    other.experts._roots = ExpertRoots([Path("/nowhere")])
    left_out = await other.experts.load()
    assert "outside" in left_out["pico/green"]
    assert other.names == ["red"]
    other.experts._roots = one.experts._roots
    with pytest.raises(ConflictError, match="left out here"):
        await other.experts.add("pico", "green", "blue")
    await other.experts.remove("pico", "green", force=False)
    assert await other.experts.load() == {}
    await one.experts.load()
    assert one.names == ["red"]


async def test_an_expert_whose_files_were_replaced_is_deleted_and_added_again(
    servers: tuple[Server, Server], root: Path
) -> None:
    """What the refusal of a mix that needs its old files advises."""
    one, _ = servers
    folder = Path(shutil.copytree(root / "green", root / "grey", dirs_exist_ok=True))
    before, _, _ = await one.experts.add("pico", "grey", "grey")
    shutil.copy(root / "blue" / "model.safetensors", folder / "model.safetensors")
    recipe = one_hot(one.pools["pico"], "grey", dtype="float32")
    with pytest.raises(ModelChangedError, match="delete it and add it again"):
        iter_mixture(recipe, one.pools["pico"].by_fingerprint)
    with pytest.raises(ConflictError, match="delete it first"):
        await one.experts.add("pico", "grey", "grey")
    await one.experts.remove("pico", "grey", force=False)
    after, _, _ = await one.experts.add("pico", "grey", "grey")
    assert after.fingerprint != before.fingerprint
    pool = one.pools["pico"]
    mixed = dict(iter_mixture(one_hot(pool, "grey", dtype="float32"), pool.by_fingerprint))
    stored = load_file(root / "blue" / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in mixed.items())
