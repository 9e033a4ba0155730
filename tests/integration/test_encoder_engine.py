"""The embedding engine on real sentence-transformers models, against sentence-transformers itself."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import pickle
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, WordWeights

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.engines.base import EmbeddingEngine
from cocktail_serve.engines.in_process.encoder_engine import EncoderEngine
from cocktail_serve.engines.in_process.encoder_model import Encoder
from cocktail_serve.errors import (
    CheckpointError,
    CocktailError,
    ConfigError,
    ContextLengthError,
    EngineError,
    InvalidMixError,
    InvalidRequestError,
    ModelNotReadyError,
    QueueTimeoutError,
)
from cocktail_serve.examples import parse_examples
from cocktail_serve.recipe import Recipe, make_recipe, one_hot
from tests.merging import linear, merged
from tests.models import ENCODER_WORDS, make_encoder, make_encoder_pool, pool_section

WORDS = ENCODER_WORDS.split()
TEXTS = ["the dog", "my card was stolen at the bank", "what is the capital of france", "cat"]
WEIGHTS = {"base": 0.2, "hotpotqa": 0.5, "quora": 0.3}


def texts(number: int, *, seed: int = 0, max_words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, max_words))) for _ in range(number)]


def config_of(folders: dict[str, Path], *, pool: dict[str, Any] | None = None, **engine: Any) -> PoolConfig:
    engine = {"type": "sentence_transformers", "dtype": "float32", "device": "cpu", **engine}
    return PoolConfig.model_validate(pool_section("mini", "encoder", folders, engine, **(pool or {})))


@asynccontextmanager
async def running(
    folders: dict[str, Path], *, pool: dict[str, Any] | None = None, **engine: Any
) -> AsyncIterator[EncoderEngine]:
    config = config_of(folders, pool=pool, **engine)
    opened = await asyncio.to_thread(open_pool, config, cache_dir=folders["base"].parent / "cache")
    made = EncoderEngine(opened, config)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


def merged_apart(folders: dict[str, Path], weights: dict[str, float], dtype: torch.dtype) -> SentenceTransformer:
    """The cocktail by definition: each parameter a weighted sum in float64, rounded to the dtype."""
    states = {name: SentenceTransformer(str(folders[name]), device="cpu").state_dict() for name in weights}
    mixed = SentenceTransformer(str(folders["base"]), device="cpu")
    mixed.load_state_dict(linear(states, weights, dtype))
    return mixed.to(dtype)


def recipe_of(engine: EncoderEngine, weights: dict[str, float]) -> Recipe:
    return make_recipe(engine.pool, weights, dtype=engine.dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_encoder_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def reference(folders: dict[str, Path]) -> SentenceTransformer:
    return SentenceTransformer(str(folders["base"]), device="cpu")


class TestEqualsSentenceTransformers:
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
    async def test_experts_and_cocktails(self, tmp_path: Path, pooling: Any, normalize: bool) -> None:
        folders = make_encoder_pool(tmp_path, pooling=pooling, normalize=normalize)
        inputs = texts(40)
        async with running(folders) as engine:
            for name in folders:
                got = await engine.embed(one_hot(engine.pool, name, dtype="float32"), inputs)
                want = SentenceTransformer(str(folders[name]), device="cpu").encode(inputs)
                np.testing.assert_allclose(got.vectors, want, rtol=1e-4, atol=1e-5)
            got = await engine.embed(recipe_of(engine, WEIGHTS), inputs)
            want = merged_apart(folders, WEIGHTS, torch.float32).encode(inputs)
            np.testing.assert_allclose(got.vectors, want, rtol=1e-4, atol=1e-5)
        is_unit = np.allclose(np.linalg.norm(got.vectors, axis=1), 1, atol=1e-5)
        assert is_unit == normalize

    @pytest.mark.parametrize(
        ("method", "coefficients", "method_params"),
        [
            ("task_arithmetic", {"hotpotqa": 0.9, "quora": -0.4}, {"lambda": 0.7}),
            ("ties", {"hotpotqa": 0.9, "quora": 0.4}, {"density": 0.3}),
            ("slerp", {"quora": 0.6}, {}),
        ],
    )
    async def test_other_methods(
        self,
        folders: dict[str, Path],
        method: str,
        coefficients: dict[str, float],
        method_params: dict[str, float],
    ) -> None:
        weights = {"base": 0.4, **coefficients} if method == "slerp" else coefficients
        async with running(folders) as engine:
            recipe = make_recipe(engine.pool, weights, dtype="float32", method=method, method_params=method_params)
            got = await engine.embed(recipe, TEXTS)
            linear = await engine.embed(one_hot(engine.pool, "base", dtype="float32"), TEXTS)
        options = {"scale" if name == "lambda" else name: value for name, value in method_params.items()}
        models = {name: SentenceTransformer(str(folders[name]), device="cpu") for name in ("base", *coefficients)}
        states = {name: model.state_dict() for name, model in models.items()}
        models["base"].load_state_dict(
            {
                key: torch.from_numpy(
                    merged(method, {n: s[key].double().numpy() for n, s in states.items()}, coefficients, **options)
                )
                for key in states["base"]
            }
        )
        np.testing.assert_allclose(got.vectors, models["base"].encode(TEXTS), rtol=1e-4, atol=1e-5)
        assert np.abs(got.vectors - linear.vectors).max() > 0.1

    async def test_bfloat16(self, folders: dict[str, Path]) -> None:
        async with running(folders, dtype="bfloat16") as engine:
            got = await engine.embed(recipe_of(engine, WEIGHTS), TEXTS)
        want = merged_apart(folders, WEIGHTS, torch.bfloat16).encode(TEXTS, convert_to_tensor=True).float().numpy()
        np.testing.assert_allclose(got.vectors, want, atol=2**-6)  # sums in bf16 depend on the padding of a pass

    async def test_experts_differ(self, folders: dict[str, Path]) -> None:
        """Otherwise the tests above could not tell whose parameters answered."""
        async with running(folders) as engine:
            vectors = [
                (await engine.embed(one_hot(engine.pool, name, dtype="float32"), TEXTS)).vectors for name in folders
            ]
        assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.pairwise(vectors))

    async def test_modules_with_parameters_of_their_own_are_mixed_too(self, tmp_path: Path) -> None:
        folders = {}
        for seed, name in enumerate(("base", "quora")):
            plain = SentenceTransformer(
                str(make_encoder(tmp_path / f"plain-{name}", perturbation_seed=seed or None)), device="cpu"
            )
            torch.manual_seed(seed)
            chain = [plain[0], plain[1], Dense(32, 16), Normalize()]
            folders[name] = tmp_path / name
            SentenceTransformer(modules=chain, device="cpu").save(str(folders[name]), create_model_card=False)
        weights = {"base": 0.25, "quora": 0.75}
        async with running(folders) as engine:
            got = await engine.embed(recipe_of(engine, weights), TEXTS)
            assert engine.dimension == got.vectors.shape[1] == 16
        want = merged_apart(folders, weights, torch.float32).encode(TEXTS)
        np.testing.assert_allclose(got.vectors, want, rtol=1e-4, atol=1e-5)

    async def test_prompts(self, folders: dict[str, Path]) -> None:
        async with running(folders) as engine:
            got = await engine.embed(one_hot(engine.pool, "base", dtype="float32"), TEXTS, prompt="what is ")
        want = SentenceTransformer(str(folders["base"]), device="cpu").encode(TEXTS, prompt="what is ")
        np.testing.assert_allclose(got.vectors, want, rtol=1e-4, atol=1e-5)

    async def test_prompts_that_pooling_leaves_out(self, tmp_path: Path) -> None:
        model = SentenceTransformer(str(make_encoder(tmp_path / "plain")), device="cpu")
        model.set_pooling_include_prompt(False)
        model.save(str(tmp_path / "base"), create_model_card=False)
        prompts = ["", "what is ", "how can i open "]
        async with running({"base": tmp_path / "base"}) as engine:
            recipe = one_hot(engine.pool, "base", dtype="float32")
            got = await asyncio.gather(*(engine.embed(recipe, TEXTS, prompt=prompt) for prompt in prompts))
        for embedded, prompt in zip(got, prompts, strict=True):
            want = model.encode(TEXTS, prompt=prompt)
            np.testing.assert_allclose(embedded.vectors, want, rtol=1e-4, atol=1e-5)


class TestRequests:
    @asynccontextmanager
    async def base(self, folders: dict[str, Path], **options: Any) -> AsyncIterator[tuple[EncoderEngine, Recipe]]:
        async with running(folders, **options) as engine:
            yield engine, one_hot(engine.pool, "base", dtype="float32")

    async def test_is_an_embedding_engine(self, folders: dict[str, Path]) -> None:
        async with self.base(folders) as (engine, recipe):
            await engine.mix_ahead(recipe)
            assert isinstance(engine, EmbeddingEngine)
            snapshot = await engine.snapshot(deadline_s=10)
            assert pickle.loads(pickle.dumps(snapshot)) == snapshot
            assert (engine.dimension, engine.max_length) == (32, 128)

    async def test_a_mixture_is_named_in_the_log(
        self, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "cocktail_serve.engines")
        async with self.base(folders) as (engine, _):
            recipe = recipe_of(engine, {"base": 0.5, "quora": 0.5})
            engine.name_recipes(lambda digest: ["faq@1a2b3c4d of acme"] if digest == recipe.digest else [])
            await engine.mix_ahead(recipe)
            await engine.mix_ahead(recipe)
        (told,) = [record.getMessage() for record in caplog.records]
        assert told.startswith(f"mini: recipe {recipe.digest[:8]} (faq@1a2b3c4d of acme) from files in ")

    async def test_a_large_request_is_split_and_put_together_in_order(
        self, folders: dict[str, Path], reference: SentenceTransformer
    ) -> None:
        inputs = texts(700, max_words=60)
        async with self.base(folders, max_batch_tokens=256) as (engine, recipe):
            got = await engine.embed(recipe, inputs)
        np.testing.assert_allclose(got.vectors, reference.encode(inputs), rtol=1e-4, atol=1e-5)
        assert got.vectors.dtype == np.float32
        assert got.num_tokens == sum(len(reference.tokenizer(text).input_ids) for text in inputs)

    async def test_token_ids(self, folders: dict[str, Path], reference: SentenceTransformer) -> None:
        ids = [reference.tokenizer(text).input_ids for text in TEXTS]
        async with self.base(folders) as (engine, recipe):
            got = await engine.embed(recipe, ids)
        np.testing.assert_allclose(got.vectors, reference.encode(TEXTS), rtol=1e-4, atol=1e-5)
        assert got.num_tokens == sum(map(len, ids))

    @pytest.mark.parametrize(
        ("inputs", "options", "param", "message"),
        [
            ([[2, 5, 3], []], {}, "input.1", "empty"),
            ([[2, 5, 3], [2, 10_000]], {}, "input.1", "outside 0 to"),
            ([[2, -1]], {}, "input.0", "outside 0 to"),
            ([[2, 3]], {"prompt": "what is "}, "prompt_name", "token ids"),
            (["fine", "not \ud800 fine"], {}, "input.1", "surrogate"),
            (["fine"], {"dimensions": 33}, "dimensions", "between 1 and 32"),
            (["fine"], {"truncate_to": 2}, "truncate_prompt_tokens", "at least 3"),
        ],
    )
    async def test_refuses(
        self, folders: dict[str, Path], inputs: Any, options: dict[str, Any], param: str, message: str
    ) -> None:
        async with self.base(folders) as (engine, recipe):
            with pytest.raises(InvalidRequestError, match=message) as caught:
                await engine.embed(recipe, inputs, **options)
            assert caught.value.param == param
            assert len((await engine.embed(recipe, TEXTS)).vectors) == len(TEXTS)

    async def test_too_long_is_an_error_with_its_index(self, folders: dict[str, Path]) -> None:
        async with self.base(folders) as (engine, recipe):
            with pytest.raises(ContextLengthError, match=r"202 tokens.*at most 128") as caught:
                await engine.embed(recipe, ["dog", "dog " * 200])
            assert caught.value.param == "input.1"

    async def test_truncates_on_request(self, folders: dict[str, Path], reference: SentenceTransformer) -> None:
        async with self.base(folders) as (engine, recipe):
            whole = await engine.embed(recipe, ["dog " * 200], truncate_to=10_000)
            short = await engine.embed(recipe, ["dog cat " * 200, "dog"], truncate_to=8)
        np.testing.assert_allclose(whole.vectors, reference.encode(["dog " * 200]), rtol=1e-4, atol=1e-5)
        assert (whole.num_tokens, short.num_tokens) == (128, 8 + 3)
        np.testing.assert_allclose(short.vectors, reference.encode(["dog cat " * 3, "dog"]), rtol=1e-4, atol=1e-5)

    async def test_a_pool_that_truncates(self, folders: dict[str, Path]) -> None:
        async with self.base(folders, pool={"truncate": True}) as (engine, recipe):
            assert (await engine.embed(recipe, ["dog " * 200])).num_tokens == 128

    async def test_too_many_tokens_in_one_request(self, folders: dict[str, Path]) -> None:
        async with self.base(folders, max_input_tokens=50) as (engine, recipe):
            with pytest.raises(InvalidRequestError, match="one request may have 50") as caught:
                await engine.embed(recipe, ["dog cat bird"] * 20)
            assert caught.value.param == "input"

    @pytest.mark.parametrize("normalize", [True, False])
    async def test_dimensions(self, tmp_path: Path, normalize: bool) -> None:
        base = make_encoder(tmp_path / "base", normalize=normalize)
        async with self.base({"base": base}) as (engine, recipe):
            whole, short = await engine.embed(recipe, TEXTS), await engine.embed(recipe, TEXTS, dimensions=8)
        want = whole.vectors[:, :8]
        if normalize:
            want = want / np.linalg.norm(want, axis=1, keepdims=True)
        np.testing.assert_allclose(short.vectors, want, rtol=1e-5)

    async def test_no_inputs(self, folders: dict[str, Path]) -> None:
        async with self.base(folders) as (engine, recipe):
            assert (await engine.embed(recipe, [])).vectors.shape == (0, 32)

    async def test_a_recipe_of_another_dtype(self, folders: dict[str, Path]) -> None:
        async with self.base(folders) as (engine, _):
            with pytest.raises(InvalidMixError, match="float32"):
                await engine.embed(one_hot(engine.pool, "base", dtype="bfloat16"), TEXTS)

    async def test_check_examples_names_the_row(self, folders: dict[str, Path]) -> None:
        rows = [{"query": "dog", "pos": ["cat"], "neg": ["bird"]}, {"query": "dog", "pos": ["cat", "dog " * 200]}]
        async with self.base(folders) as (engine, _):
            with pytest.raises(ContextLengthError, match=r"row 2: 'pos\[1\]' has 202 tokens"):
                await engine.check_examples(parse_examples(rows, "encoder"))
            await engine.check_examples(parse_examples(rows[:1], "encoder"))


class TestUnderLoad:
    async def test_every_answer_is_of_its_own_recipe(self, folders: dict[str, Path]) -> None:
        """Four cocktails, three models, room for two mixtures, 48 callers: no answer by the parameters of others."""
        mixtures: list[dict[str, float]] = [
            {"base": 1.0},
            {"hotpotqa": 1.0},
            {"quora": 1.0},
            {"hotpotqa": 0.5, "quora": 0.5},
            {"base": 0.2, "hotpotqa": 0.8},
            {"base": 0.7, "quora": 0.3},
            WEIGHTS,
        ]
        inputs = texts(30)
        expected = [merged_apart(folders, weights, torch.float32).encode(inputs) for weights in mixtures]
        rng = random.Random(0)
        async with running(folders, cache_bytes=2 * num_bytes(folders) + 1000, max_batch_tokens=128) as engine:
            recipes = [recipe_of(engine, weights) for weights in mixtures]

            async def caller() -> None:
                for _ in range(8):
                    which = rng.randrange(len(mixtures))
                    rows = rng.sample(range(len(inputs)), rng.randint(1, 6))
                    got = await engine.embed(recipes[which], [inputs[row] for row in rows])
                    np.testing.assert_allclose(got.vectors, expected[which][rows], rtol=1e-4, atol=1e-5)
                    if rng.random() < 0.1:
                        engine.forget(recipes[rng.randrange(len(mixtures))].digest)

            async with asyncio.timeout(120):
                await asyncio.gather(*(caller() for _ in range(48)))
            snapshot = await engine.snapshot(deadline_s=10)
            assert snapshot.num_queued == 0
            assert snapshot.detail["cached_bytes"] <= 2 * num_bytes(folders)

    async def test_callers_are_joined(self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []
        record_passes(monkeypatch, lambda token_ids: sizes.append(len(token_ids)))
        async with running(folders) as engine:
            recipe = one_hot(engine.pool, "base", dtype="float32")
            async with engine_held(engine):
                requests = [asyncio.create_task(engine.embed(recipe, [text])) for text in texts(16, max_words=8)]
                await tokenized(engine)
            await asyncio.gather(*requests)
        assert sum(sizes) == 16
        assert len(sizes) <= 4

    async def test_a_caller_that_goes_is_dropped_before_it_starts(
        self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        record_passes(monkeypatch, lambda token_ids: seen.extend(map(len, token_ids)))
        async with running(folders) as engine:
            recipe = one_hot(engine.pool, "base", dtype="float32")
            async with engine_held(engine):
                gone = asyncio.create_task(engine.embed(recipe, ["dog"]))
                stays = asyncio.create_task(engine.embed(recipe, ["dog cat bird"]))
                await tokenized(engine)
                gone.cancel()
                await asyncio.wait([gone])
            await stays
            assert (await engine.snapshot(deadline_s=10)).num_queued == 0
        assert seen == [5]

    async def test_a_request_that_waits_too_long(self, folders: dict[str, Path]) -> None:
        async with running(folders, queue_timeout_s=0.05) as engine:
            await ready(engine)
            recipe = one_hot(engine.pool, "base", dtype="float32")
            async with engine_held(engine):
                with pytest.raises(QueueTimeoutError, match="busy"):
                    await engine.embed(recipe, TEXTS)
            assert engine.stats.num_queue_timeouts == 1
            assert len((await engine.embed(recipe, TEXTS, background=True)).vectors) == len(TEXTS)

    async def test_too_many_inputs_at_once(self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cocktail_serve.engines.in_process.engine.MAX_WAITING_INPUTS", 5)
        async with running(folders) as engine:
            await ready(engine)
            recipe = one_hot(engine.pool, "base", dtype="float32")
            async with engine_held(engine):
                first = asyncio.create_task(engine.embed(recipe, TEXTS))
                await asyncio.sleep(0)
                with pytest.raises(QueueTimeoutError, match="takes no more"):
                    await engine.embed(recipe, TEXTS)
            await first

    async def test_a_failing_pass_fails_its_requests_and_no_others(
        self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(token_ids: Any) -> None:
            if any(len(ids) == 100 for ids in token_ids):
                raise RuntimeError("out of memory")

        record_passes(monkeypatch, fail)
        async with running(folders) as engine:
            recipe = one_hot(engine.pool, "base", dtype="float32")
            with pytest.raises(EngineError, match="out of memory"):
                await engine.embed(recipe, ["dog", "dog " * 98])
            assert len((await engine.embed(recipe, TEXTS)).vectors) == len(TEXTS)
            assert (await engine.snapshot(deadline_s=10)).state == "ready"


class TestLifecycle:
    async def test_a_request_waits_for_the_model_to_load(self, folders: dict[str, Path]) -> None:
        async with running(folders) as engine:
            with pytest.raises(ModelNotReadyError, match="starting"):
                _ = engine.dimension
            assert (await engine.snapshot(deadline_s=10)).state in ("starting", "ready")
            await engine.embed(one_hot(engine.pool, "base", dtype="float32"), TEXTS)
            assert (await engine.snapshot(deadline_s=10)).state == "ready"

    async def test_stop_ends_what_waits_and_may_be_called_twice(self, folders: dict[str, Path]) -> None:
        async with running(folders) as engine:
            await ready(engine)
            recipe = one_hot(engine.pool, "base", dtype="float32")
            async with engine_held(engine):
                waiting = asyncio.create_task(engine.embed(recipe, TEXTS))
                await tokenized(engine)
                stopping = asyncio.create_task(engine.stop())
                with pytest.raises(ModelNotReadyError):
                    await waiting
            await stopping
            await engine.stop()
            assert (await engine.snapshot(deadline_s=10)).state == "stopped"
            with pytest.raises(ModelNotReadyError):
                await engine.embed(recipe, TEXTS)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("mini-model")]

    async def test_a_snapshot_asks_the_thread_itself(self, folders: dict[str, Path]) -> None:
        async with running(folders) as engine:
            await ready(engine)
            async with engine_held(engine):
                snapshot = await engine.snapshot(deadline_s=0.05)
            assert snapshot.state == "failed"
            assert "did not answer" in snapshot.detail["reason"]
            assert (await engine.snapshot(deadline_s=10)).state == "ready"

    async def test_a_model_that_cannot_be_served_is_said_so(self, folders: dict[str, Path]) -> None:
        async with running(folders, cache_bytes=1000) as engine:
            with pytest.raises(EngineError, match=r"cache_bytes.*one mixture") as caught:
                await engine.mix_ahead(one_hot(engine.pool, "base", dtype="float32"))
            assert isinstance(caught.value.__cause__, ConfigError)
            snapshot = await engine.snapshot(deadline_s=1)
            assert snapshot.state == "failed"
            assert "cache_bytes" in snapshot.detail["reason"]

    async def test_an_expert_that_goes_missing_fails_its_cocktails_only(self, tmp_path: Path) -> None:
        folders = make_encoder_pool(tmp_path)
        async with running(folders) as engine:
            await ready(engine)
            (folders["quora"] / "model.safetensors").unlink()
            with pytest.raises(CocktailError):
                await engine.embed(one_hot(engine.pool, "quora", dtype="float32"), TEXTS)
            await engine.embed(one_hot(engine.pool, "hotpotqa", dtype="float32"), TEXTS)


class TestEncoder:
    def load(self, folder: Path) -> Encoder:
        return Encoder(folder, dtype="float32", device=torch.device("cpu"))

    def test_refuses_a_model_without_pooling_modules(self, tmp_path: Path) -> None:
        folder = make_encoder(tmp_path / "base")
        (folder / "modules.json").unlink()
        with pytest.raises(ConfigError, match=r"no modules\.json"):
            self.load(folder)

    def test_refuses_parameters_that_are_not_the_checkpoints(self, folders: dict[str, Path], tmp_path: Path) -> None:
        encoder = self.load(folders["base"])
        name, params = next(iter(encoder.own_params.items()))
        params.view(-1)[0] += 1
        pool = open_pool(config_of({"base": folders["base"]}), cache_dir=tmp_path)
        with pytest.raises(CheckpointError, match=name):
            encoder.check_names(one_hot(pool, "base", dtype="float32"), pool.by_fingerprint)

    def test_names_with_and_without_the_model_prefix(self, folders: dict[str, Path], tmp_path: Path) -> None:
        """BERT checkpoints saved with a head carry the prefix `bert.`, and the head."""
        from safetensors.torch import load_file, save_file

        plain = load_file(folders["base"] / "model.safetensors")
        headed = {f"bert.{name}": tensor for name, tensor in plain.items()}
        headed["cls.predictions.bias"] = torch.zeros(3)
        folder = make_encoder(tmp_path / "base")
        save_file(headed, folder / "model.safetensors", metadata={"format": "pt"})
        encoder = self.load(folder)
        pool = open_pool(config_of({"base": folder}), cache_dir=tmp_path)
        encoder.check_names(one_hot(pool, "base", dtype="float32"), pool.by_fingerprint)
        expected = self.load(folders["base"])
        assert encoder.own_params.keys() == expected.own_params.keys()
        assert all(torch.equal(value, expected.own_params[name]) for name, value in encoder.own_params.items())

    @pytest.mark.parametrize("kind", ["another layer's states", "weights of words"])
    def test_computes_what_packing_does_not_know(self, tmp_path: Path, kind: str) -> None:
        folder = make_encoder(tmp_path / "base")
        if kind == "another layer's states":
            path = folder / "sentence_bert_config.json"
            settings = json.loads(path.read_text())
            settings["modality_config"]["text"]["method_output_name"] = ["hidden_states", -2]
            path.write_text(json.dumps(settings))
        else:
            model = SentenceTransformer(str(folder), device="cpu")
            vocab = sorted(model.tokenizer.get_vocab(), key=model.tokenizer.get_vocab().__getitem__)
            model.insert(1, WordWeights(vocab, {word: 1.0 + number % 5 for number, word in enumerate(vocab)}))
            model.save(str(folder), create_model_card=False)
        expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
        encoder = self.load(folder)
        rows = encoder.forward(encoder.tokenizer.encode(TEXTS, truncate_to=None))
        np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)


def num_bytes(folders: dict[str, Path]) -> int:
    return Encoder(folders["base"], dtype="float32", device=torch.device("cpu")).mixture_bytes


def record_passes(monkeypatch: pytest.MonkeyPatch, record: Callable[[Any], None]) -> None:
    forward = Encoder.forward
    number = itertools.count()

    def recording(self: Encoder, token_ids: Any, **options: Any) -> np.ndarray:
        if next(number) > 0:  # the first is the start's own
            record(token_ids)
        return forward(self, token_ids, **options)

    monkeypatch.setattr(Encoder, "forward", recording)


async def ready(engine: EncoderEngine) -> None:
    await engine._is_settled.wait()  # however short its queue_timeout_s
    await engine.mix_ahead(one_hot(engine.pool, "base", dtype="float32"))


@asynccontextmanager
async def engine_held(engine: EncoderEngine) -> AsyncIterator[None]:
    """The threads that compute do nothing else until the block ends."""
    await ready(engine)
    release = threading.Event()
    entered = [threading.Event() for _ in engine._pipeline._replicas]
    waiting = iter(entered)

    def hold(_: Encoder) -> None:
        next(waiting).set()
        release.wait(timeout=60)

    engine._pipeline.call_each(hold)
    for event in entered:
        await asyncio.to_thread(event.wait, 60)
    try:
        yield
    finally:
        release.set()


async def tokenized(engine: EncoderEngine) -> None:
    """Everything submitted so far has gone through the tokenizer's one thread."""
    await asyncio.sleep(0)
    await asyncio.wrap_future(engine._pipeline.with_tokenizer(lambda: None))
