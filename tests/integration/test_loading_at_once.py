"""Several pools in one process: what loads at once, and what was not there at the first try, comes up all the same."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel
from transformers.utils import logging as transformers_logging

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import FakeEngineConfig, PoolConfig
from cocktail_serve.engines.in_process.encoder_engine import EncoderEngine
from cocktail_serve.engines.in_process.encoder_model import Encoder
from cocktail_serve.engines.in_process.packing import Packing
from cocktail_serve.engines.vllm import example_tokens
from cocktail_serve.engines.vllm.build import build_vllm_engine
from cocktail_serve.errors import ConfigError, EngineError, ModelNotReadyError
from cocktail_serve.examples import parse_examples
from cocktail_serve.recipe import one_hot
from tests.fakes import make_fake_pool
from tests.models import make_decoder_tokenizer, make_encoder, make_t5_encoder, pool_section

DEADLINE_S = 30.0

TWO_TOKENIZERS = """
    # a second thread needs transformers in the moment when a first one imports it
    import sys, time
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    import torch
    from cocktail_serve.scoring.tokenizer import load_fast_tokenizer

    assert "transformers" not in sys.modules
    with ThreadPoolExecutor(2) as threads:
        loading = [threads.submit(load_fast_tokenizer, Path(sys.argv[1]))]
        while "transformers" not in sys.modules:
            time.sleep(0)
        loading.append(threads.submit(load_fast_tokenizer, Path(sys.argv[1])))
        print([future.result()("a dog")["input_ids"] for future in loading])
"""


async def until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def test_two_threads_need_transformers_at_once(tmp_path: Path) -> None:
    tokenizer = make_decoder_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TWO_TOKENIZERS), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == str([tokenizer("a dog")["input_ids"]] * 2)


async def test_a_tokenizer_that_was_not_there_is_loaded_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_tokens, "TOKENIZER_RETRY_S", 0.5)
    pool = make_fake_pool(tmp_path / "pool")
    shutil.move(tmp_path / "pool", tmp_path / "away")
    (tmp_path / "pool").mkdir()
    engine = build_vllm_engine(pool, FakeEngineConfig.model_validate({"max_model_len": 256}), run_dir=tmp_path / "run")
    examples = parse_examples([{"input": "a", "output": "b"}], kind="decoder")
    await engine.start()
    try:
        with pytest.raises(ConfigError, match=r"copy tokenizer\.json and tokenizer_config\.json there"):
            await engine.check_examples(examples)
        (tmp_path / "pool").rmdir()
        shutil.move(tmp_path / "away", tmp_path / "pool")
        with pytest.raises(ConfigError, match=r"copy tokenizer\.json"):  # not tried for every request
            await engine.check_examples(examples)
        await asyncio.sleep(0.5)
        await engine.check_examples(examples)
    finally:
        await engine.stop()


def encoder_engine(folder: Path, **engine: Any) -> EncoderEngine:
    settings = {"type": "sentence_transformers", "dtype": "float32", "device": "cpu", "concurrent_passes": 1, **engine}
    config = PoolConfig.model_validate(pool_section("mini", "encoder", {"base": folder}, settings))
    return EncoderEngine(open_pool(config, cache_dir=folder.parent / "cache"), config)


@asynccontextmanager
async def started(*engines: EncoderEngine) -> AsyncIterator[None]:
    await asyncio.gather(*(engine.start() for engine in engines))
    try:
        yield
    finally:
        await asyncio.gather(*(engine.stop() for engine in engines))


async def test_encoders_with_tied_parameters_load_side_by_side(tmp_path: Path) -> None:
    """T5 shares one table between its stacks: without it, two at once keep parameters without memory."""
    folders = [make_t5_encoder(tmp_path / str(number), seed=number) for number in range(3)]
    texts = ["the dog", "my card was stolen at the bank"]
    expected = [SentenceTransformer(str(folder), device="cpu").encode(texts) for folder in folders]
    for _ in range(3):
        engines = [encoder_engine(folder) for folder in folders]
        async with started(*engines):
            for engine, want in zip(engines, expected, strict=True):
                got = await engine.embed(one_hot(engine.pool, "base", dtype="float32"), texts)
                np.testing.assert_allclose(got.vectors, want, rtol=1e-4, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.1


async def test_pools_of_different_dtypes_load_side_by_side(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "base")
    engines = [encoder_engine(folder, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    async with started(*engines):
        for engine in engines:
            await engine.mix_ahead(one_hot(engine.pool, "base", dtype=engine.dtype))
            assert engine._model is not None
            assert {tensor.dtype for tensor in engine._model.own_params.values()} == {getattr(torch, engine.dtype)}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("failure", [MemoryError("no room"), OSError(5, "the disk did not answer")])
async def test_a_model_whose_loading_may_pass_is_loaded_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    monkeypatch.setattr("cocktail_serve.engines.start_failures.BACKOFF_S", (0.2,))
    engine = encoder_engine(make_encoder(tmp_path / "base"), queue_timeout_s=5)
    recipe = one_hot(engine.pool, "base", dtype="float32")
    load, failures = Encoder.__init__, [failure, failure]

    def loading(self: Encoder, *args: Any, **options: Any) -> None:
        if failures:
            raise ConfigError("it cannot be loaded") from failures.pop()
        load(self, *args, **options)

    monkeypatch.setattr(Encoder, "__init__", loading)
    async with started(engine):
        with pytest.raises(ModelNotReadyError, match="is restarting: it cannot be loaded"):
            await engine.embed(recipe, ["a dog"])
        snapshot = await engine.snapshot(deadline_s=5)
        assert (snapshot.state, snapshot.detail["reason"]) == ("restarting", "it cannot be loaded")
        await until(lambda: engine._state == "ready")
        assert len((await engine.embed(recipe, ["a dog"])).vectors) == 1
        snapshot = await engine.snapshot(deadline_s=5)
        assert (snapshot.state, "reason" in snapshot.detail, engine.stats.num_restarts) == ("ready", False, 2)


async def test_a_model_that_can_never_be_loaded_says_what_clears_it(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "base")
    engine = encoder_engine(folder)
    (folder / "tokenizer.json").unlink()
    async with started(engine):
        with pytest.raises(EngineError, match=r"sentence-transformers cannot load .*; mend it and start the server"):
            await engine.embed(one_hot(engine.pool, "base", dtype="float32"), ["a dog"])
        snapshot = await engine.snapshot(deadline_s=5)
        assert snapshot.state == "failed"
        assert "`cocktail-serve doctor CONFIG`" in snapshot.detail["reason"]
        assert engine.stats.num_restarts == 0


async def test_an_engine_stops_while_it_waits_to_load_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Encoder, *args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Encoder, "__init__", failing)
    monkeypatch.setattr("cocktail_serve.engines.start_failures.BACKOFF_S", (600.0,))
    engine = encoder_engine(make_encoder(tmp_path / "base"))
    async with started(engine):
        await until(lambda: engine._state == "restarting")
        begun = time.monotonic()
    assert time.monotonic() - begun < 10
    assert (await engine.snapshot(deadline_s=1)).state == "stopped"


def test_models_loaded_side_by_side_leave_warnings_as_they_were_and_say_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    models = [BertModel(config).eval().requires_grad_(False) for _ in range(3)]
    verbosity = transformers_logging.get_verbosity()
    before = list(warnings.filters)
    for _ in range(5):
        with ThreadPoolExecutor(len(models)) as threads:
            packings = list(threads.map(Packing.of, models))
        assert all(packing and isinstance(packing._forward, torch.jit.ScriptModule) for packing in packings)
        assert warnings.filters == before
        assert transformers_logging.get_verbosity() == verbosity
    assert capfd.readouterr().err == ""
