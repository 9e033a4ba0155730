"""Files of models are replaced, written to or cut short while a server runs: its answers are right, or say why not."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sqlalchemy import select

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.cocktails.score_store import ScoreStore
from cocktail_serve.cocktails.scores import Scores, ScoreScope, score_items
from cocktail_serve.cocktails.store import Store
from cocktail_serve.config import PoolConfig, VLLMEngineConfig
from cocktail_serve.database import tables
from cocktail_serve.database.database import Database
from cocktail_serve.engines.in_process.encoder_engine import EncoderEngine
from cocktail_serve.engines.in_process.reranker_engine import RerankerEngine
from cocktail_serve.engines.vllm.build import build_vllm_engine
from cocktail_serve.errors import EngineError, ModelChangedError, NotFiniteError
from cocktail_serve.examples import parse_examples
from cocktail_serve.recipe import make_recipe, one_hot
from tests.cocktails import queued_cocktail
from tests.command_line import run
from tests.gateways import LiveGateway, live_gateway
from tests.merging import linear
from tests.models import make_decoder_pool, make_encoder_pool, make_reranker_pool, pool_section

WEIGHTS = "model.safetensors"
TEXTS = ["the dog", "my card was stolen at the bank", "what is the capital of france", "cat"]
ROWS = [
    {"query": "what is the capital of france", "pos": ["paris"], "neg": ["berlin"]},
    {"query": "my card was stolen", "pos": ["lost card"], "neg": ["open account"]},
]


def in_place(folder: Path, other: Path) -> None:
    (folder / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())


def renamed(folder: Path, other: Path) -> None:
    shutil.copy2(other / WEIGHTS, folder / "new")
    (folder / "new").rename(folder / WEIGHTS)


def cut_short(folder: Path, other: Path) -> None:
    os.truncate(folder / WEIGHTS, 4096)


def deleted(folder: Path, other: Path) -> None:
    (folder / WEIGHTS).unlink()


CHANGES = [in_place, renamed, cut_short, deleted]
Change = Callable[[Path, Path], None]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return make_encoder_pool(tmp_path / "pool")


@pytest.fixture
def kept(folders: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The models as they were."""
    return {name: Path(shutil.copytree(folder, tmp_path / "kept" / name)) for name, folder in folders.items()}


def config_of(folders: dict[str, Path], kind: str = "encoder", **engine: Any) -> PoolConfig:
    engine = {"type": "sentence_transformers", "dtype": "float32", "device": "cpu", **engine}
    return PoolConfig.model_validate(pool_section("mini", kind, folders, engine))


@asynccontextmanager
async def encoder(folders: dict[str, Path]) -> AsyncIterator[EncoderEngine]:
    config = config_of(folders)
    engine = EncoderEngine(open_pool(config, cache_dir=folders["base"].parent / "cache"), config)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def by_definition(folders: dict[str, Path], weights: dict[str, float]) -> np.ndarray:
    states = {name: SentenceTransformer(str(folders[name]), device="cpu").state_dict() for name in weights}
    model = SentenceTransformer(str(folders["base"]), device="cpu")
    model.load_state_dict(linear(states, weights, torch.float32))
    return model.encode(TEXTS)


async def vectors(engine: EncoderEngine, **weights: float) -> np.ndarray:
    return (await engine.embed(make_recipe(engine.pool, weights, dtype="float32"), TEXTS)).vectors


@pytest.mark.parametrize("change", CHANGES)
async def test_an_encoder_goes_on_with_what_it_holds_and_mixes_nothing_else(
    folders: dict[str, Path], kept: dict[str, Path], change: Change
) -> None:
    async with encoder(folders) as engine:
        base, cached = await vectors(engine, base=1.0), await vectors(engine, base=0.5, quora=0.5)
        change(folders["quora"], folders["hotpotqa"])
        change(folders["base"], folders["hotpotqa"])
        # what is in memory is not in the files any more, whatever the library did
        np.testing.assert_array_equal(await vectors(engine, base=1.0), base)
        np.testing.assert_array_equal(await vectors(engine, base=0.5, quora=0.5), cached)
        shutil.copy(kept["base"] / WEIGHTS, folders["base"] / WEIGHTS)
        for _ in range(2):
            with pytest.raises(ModelChangedError, match=r"'quora' are not what they were: .*model\.safetensors"):
                await vectors(engine, base=0.2, quora=0.8)
        np.testing.assert_allclose(
            await vectors(engine, base=0.2, hotpotqa=0.8),
            by_definition(kept, {"base": 0.2, "hotpotqa": 0.8}),
            rtol=1e-4,
            atol=1e-5,
        )
        shutil.copy(kept["quora"] / WEIGHTS, folders["quora"] / WEIGHTS)
        want = by_definition(kept, {"base": 0.2, "quora": 0.8})
        np.testing.assert_allclose(await vectors(engine, base=0.2, quora=0.8), want, rtol=1e-4, atol=1e-5)


async def test_a_base_that_is_replaced_before_it_is_loaded(folders: dict[str, Path]) -> None:
    config = config_of(folders)
    engine = EncoderEngine(open_pool(config, cache_dir=folders["base"].parent / "cache"), config)
    in_place(folders["base"], folders["quora"])
    await engine.start()
    try:
        with pytest.raises(EngineError, match="'base' are not what they were"):
            await engine.mix_ahead(one_hot(engine.pool, "base", dtype="float32"))
    finally:
        await engine.stop()


async def test_no_server_of_a_decoder_is_started_on_a_base_that_was_replaced(tmp_path: Path) -> None:
    folders = make_decoder_pool(tmp_path / "pool", ("red",))
    config = PoolConfig.model_validate(pool_section("flan", "decoder", folders, {"type": "vllm"}))
    assert isinstance(config.engine, VLLMEngineConfig)
    engine = build_vllm_engine(open_pool(config, cache_dir=tmp_path / "cache"), config.engine, run_dir=tmp_path / "run")
    in_place(folders["base"], folders["red"])
    await engine.start()
    try:
        async with asyncio.timeout(30):
            while (snapshot := await engine.snapshot(deadline_s=1)).state == "starting":  # noqa: ASYNC110  # only asked
                await asyncio.sleep(0.01)
        assert snapshot.state == "restarting"
        assert "'base' are not what they were" in snapshot.detail["reason"]
        assert not (tmp_path / "run" / "flan.log").exists(), "nothing was started"
    finally:
        await engine.stop()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'registry.sqlite'}")
    await database.open()
    yield database
    await database.close()


async def test_losses_are_kept_of_the_old_content_alone(database: Database, tmp_path: Path) -> None:
    folders = make_reranker_pool(tmp_path / "pool")
    config = config_of(folders, "reranker")
    examples = parse_examples(ROWS, "reranker", max_examples=10)
    await Store(database).add(queued_cocktail("1"), None, score_items(examples, "reranker"))
    engine = RerankerEngine(open_pool(config, cache_dir=tmp_path / "cache"), config)
    await engine.start()
    with ThreadPoolExecutor(1) as executor:
        scores = Scores(ScoreStore(database), executor, truncate={})
        score_scope = ScoreScope("acme", "1")
        try:
            expected = await scores.model_losses(engine, ["base", "hotpotqa"], examples, score_scope)
            in_place(folders["quora"], folders["hotpotqa"])
            in_place(folders["hotpotqa"], folders["base"])
            with pytest.raises(ModelChangedError, match="quora"):
                await scores.model_losses(engine, ["quora"], examples, score_scope)
            assert await scores.model_losses(engine, ["base", "hotpotqa"], examples, score_scope) == expected
        finally:
            await engine.stop()
        rows = await database.rows(select(tables.losses))
        assert {row["model"] for row in rows} == {engine.pool.member(n).fingerprint for n in ("base", "hotpotqa")}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with live_gateway(tmp_path_factory.mktemp("gateway")) as live:
        yield live


def test_over_http_it_is_a_422_that_names_the_file(gateway: LiveGateway) -> None:
    folders = {name: Path(gateway.settings.pools[1].experts[name].path) for name in ("hotpotqa", "quora")}
    content = (folders["quora"] / WEIGHTS).read_bytes()

    def create(name: str, **weights: float) -> httpx.Response:
        body = {"name": name, "pool": "bge", "merging_weights": weights}
        return httpx.post(f"{gateway.base_url}/cocktails?wait=30", json=body, timeout=60)

    def embed(model: str) -> httpx.Response:
        body = {"model": model, "input": TEXTS}
        return httpx.post(f"{gateway.base_url}/embeddings", json=body, timeout=60)

    ready = create("before", base=0.5, quora=0.5)
    assert ready.status_code == 201, ready.text
    in_place(folders["quora"], folders["hotpotqa"])
    refused = create("after", base=0.4, quora=0.6)
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["code"] == "model_changed"
    assert str(folders["quora"] / WEIGHTS) in error["message"]
    assert embed("bge/quora").status_code == 422
    assert embed("before").status_code == 200  # in memory
    assert embed("bge").status_code == 200
    (folders["quora"] / WEIGHTS).write_bytes(content)
    assert create("again", base=0.4, quora=0.6).status_code in (200, 201)
    assert embed("bge/quora").status_code == 200


async def test_a_mixture_that_overflows_is_refused_before_it_serves(tmp_path: Path) -> None:
    folders = make_encoder_pool(tmp_path / "pool", dtype=torch.bfloat16)
    tensors = load_file(folders["quora"] / WEIGHTS)
    tensors["encoder.layer.0.output.dense.weight"][0, 0] = 70_000.0
    save_file(tensors, folders["quora"] / WEIGHTS, metadata={"format": "pt"})
    config = config_of(folders, dtype="float16")
    engine = EncoderEngine(open_pool(config, cache_dir=tmp_path / "cache"), config)
    await engine.start()
    try:
        with pytest.raises(NotFiniteError, match=r"tensor 'encoder\.layer\.0\.output\.dense\.weight' .*1 quora"):
            await engine.mix_ahead(one_hot(engine.pool, "quora", dtype="float16"))
        await engine.mix_ahead(one_hot(engine.pool, "hotpotqa", dtype="float16"))
    finally:
        await engine.stop()


class TestTheCommandLine:
    @pytest.fixture
    def decoders(self, tmp_path: Path) -> dict[str, Path]:
        return make_decoder_pool(tmp_path / "pool", ("red", "green"), dtype=torch.bfloat16)

    def mix(self, capsys: pytest.CaptureFixture[str], folders: dict[str, Path], out: Path) -> tuple[int, str]:
        pool = pool_section("flan", "decoder", folders, {"type": "vllm", "dtype": "float16"})
        config = out.parent / "config.json"
        config.write_text(json.dumps({"store": {"cache_dir": str(out.parent / "cache")}, "pools": [pool]}))
        arguments = ("mix", config, "--pool", "flan", "--weights", "base=0.1,red=0.9", "--out", out)
        code, _, stderr = run(capsys, *arguments)
        return code, " ".join(stderr.split())

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (80_000.0, "tensor 'lm_head.weight' of the mixture (linear: 0.1 base, 0.9 red) has 1 elements"),
            (math.nan, "pool 'flan', expert 'red': "),
        ],
    )
    def test_writes_nothing_that_is_not_finite(
        self, capsys: pytest.CaptureFixture[str], decoders: dict[str, Path], tmp_path: Path, value: float, message: str
    ) -> None:
        tensors = load_file(decoders["red"] / WEIGHTS)
        tensors["lm_head.weight"][0, 0] = value
        save_file(tensors, decoders["red"] / WEIGHTS, metadata={"format": "pt"})
        code, stderr = self.mix(capsys, decoders, tmp_path / "out")
        assert code == 2
        assert message in stderr
        assert not (tmp_path / "out").exists()

    def test_reads_a_replaced_expert_anew(
        self, capsys: pytest.CaptureFixture[str], decoders: dict[str, Path], tmp_path: Path
    ) -> None:
        assert self.mix(capsys, decoders, tmp_path / "first")[0] == 0
        halved = {name: tensor / 2 for name, tensor in load_file(decoders["red"] / WEIGHTS).items()}
        save_file(halved, decoders["red"] / WEIGHTS, metadata={"format": "pt"})
        assert self.mix(capsys, decoders, tmp_path / "second")[0] == 0
        first, second = (
            json.loads((tmp_path / name / "recipe.json").read_text())["fingerprints"] for name in ("first", "second")
        )
        assert first["base"] == second["base"]
        assert first["red"] != second["red"]
