"""The reranking engine on real cross-encoders, against sentence-transformers itself."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.engines import build_engine
from cocktail_serve.engines.base import RerankingEngine
from cocktail_serve.engines.in_process.reranker_engine import RerankerEngine
from cocktail_serve.errors import (
    ContextLengthError,
    EngineError,
    IncompatibleModelsError,
    InvalidMixError,
    InvalidRequestError,
)
from cocktail_serve.examples import parse_examples
from cocktail_serve.recipe import Recipe, make_recipe, one_hot
from tests.merging import linear
from tests.models import ENCODER_WORDS, make_decoder_reranker, make_reranker, make_reranker_pool, pool_section

WORDS = ENCODER_WORDS.split()
QUERY = "what is the capital of france"
DOCUMENTS = ["paris", "the capital of france is paris", "my card was stolen at the bank", "dog", "a cat"]
WEIGHTS = {"base": 0.2, "hotpotqa": 0.5, "quora": 0.3}


def documents(number: int, *, seed: int = 0, max_words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, max_words))) for _ in range(number)]


def config_of(folders: dict[str, Path], *, pool: dict[str, Any] | None = None, **engine: Any) -> PoolConfig:
    engine = {"type": "sentence_transformers", "dtype": "float32", "device": "cpu", **engine}
    return PoolConfig.model_validate(pool_section("mini", "reranker", folders, engine, **(pool or {})))


@asynccontextmanager
async def running(
    folders: dict[str, Path], *, pool: dict[str, Any] | None = None, **engine: Any
) -> AsyncIterator[RerankerEngine]:
    config = config_of(folders, pool=pool, **engine)
    opened = await asyncio.to_thread(open_pool, config, cache_dir=folders["base"].parent / "cache")
    made = build_engine(opened, config, run_dir=folders["base"].parent)
    assert isinstance(made, RerankerEngine)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


def merged_apart(folders: dict[str, Path], weights: dict[str, float], dtype: torch.dtype) -> CrossEncoder:
    """The cocktail by definition: each parameter a weighted sum in float64, rounded to the dtype."""
    states = {name: CrossEncoder(str(folders[name]), device="cpu").state_dict() for name in weights}
    mixed = CrossEncoder(str(folders["base"]), device="cpu")
    mixed.load_state_dict(linear(states, weights, dtype))
    return mixed.to(dtype)


def predicted(model: CrossEncoder, query: str, texts: list[str], **options: Any) -> np.ndarray:
    return model.predict([(query, text) for text in texts], show_progress_bar=False, **options)


def recipe_of(engine: RerankerEngine, weights: dict[str, float]) -> Recipe:
    return make_recipe(engine.pool, weights, dtype=engine.dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_reranker_pool(tmp_path_factory.mktemp("pool"))


class TestEqualsCrossEncoder:
    @pytest.mark.parametrize("architecture", ["bert", "xlm-roberta"])
    async def test_experts_and_cocktails(self, tmp_path: Path, architecture: Any) -> None:
        folders = make_reranker_pool(tmp_path, architecture=architecture)
        texts = documents(40)
        async with running(folders) as engine:
            everyone = []
            for name in folders:
                got = await engine.rerank(one_hot(engine.pool, name, dtype="float32"), QUERY, texts)
                np.testing.assert_allclose(
                    got.scores, predicted(CrossEncoder(str(folders[name]), device="cpu"), QUERY, texts), rtol=1e-4
                )
                everyone.append(got.scores)
            assert isinstance(engine, RerankingEngine)
            assert engine.max_length == 128
            got = await engine.rerank(recipe_of(engine, WEIGHTS), QUERY, texts)
            np.testing.assert_allclose(
                got.scores, predicted(merged_apart(folders, WEIGHTS, torch.float32), QUERY, texts), rtol=1e-4
            )
        assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.pairwise([*everyone, got.scores]))

    @pytest.mark.parametrize("pad_token_id", [None, 2, -1])
    async def test_a_decoder_without_padding_token(self, tmp_path: Path, pad_token_id: int | None) -> None:
        """Told of no padding, it takes one pair at a time; of one that its tokenizer does not pad with, or that is no
        token, it would score the padding. Each pair scores as it does alone."""
        folder = make_decoder_reranker(tmp_path / "base", pad_token_id=pad_token_id)
        texts = [*documents(20, max_words=20), "a dog</s>", "<pad> a dog"]
        async with running({"base": folder}) as engine:
            recipe = one_hot(engine.pool, "base", dtype="float32")
            got = await engine.rerank(recipe, QUERY, texts, use_activation=False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        alone = AutoModelForSequenceClassification.from_pretrained(folder)
        if pad_token_id == -1:
            alone.config.pad_token_id = None  # the last token of all, as of one pair it is
        with torch.inference_mode():
            inputs = [tokenizer(QUERY, text, return_tensors="pt") for text in texts]
            expected = [alone(**one).logits[0, 0].item() for one in inputs]
        np.testing.assert_allclose(got.scores, expected, rtol=1e-4, atol=1e-4)
        assert np.ptp(expected[:20]) > 0.1

    async def test_bfloat16(self, folders: dict[str, Path]) -> None:
        async with running(folders, dtype="bfloat16") as engine:
            got = await engine.rerank(recipe_of(engine, WEIGHTS), QUERY, DOCUMENTS)
        want = predicted(merged_apart(folders, WEIGHTS, torch.bfloat16), QUERY, DOCUMENTS)
        np.testing.assert_allclose(got.scores, want, atol=2**-5)  # sums in bf16 depend on the padding of a pass

    async def test_the_models_own_activation(self, folders: dict[str, Path], tmp_path: Path) -> None:
        model = CrossEncoder(str(folders["base"]), device="cpu", activation_fn=torch.nn.Tanh())
        model.save_pretrained(str(tmp_path / "base"), create_model_card=False)
        async with running({"base": tmp_path / "base"}) as engine:
            recipe = one_hot(engine.pool, "base", dtype="float32")
            scores = (await engine.rerank(recipe, QUERY, DOCUMENTS)).scores
            logits = (await engine.rerank(recipe, QUERY, DOCUMENTS, use_activation=False)).scores
        np.testing.assert_allclose(scores, predicted(model, QUERY, DOCUMENTS), rtol=1e-4)
        np.testing.assert_allclose(np.tanh(logits), scores, rtol=1e-4)
        assert (scores < 0).any()  # which the default, a sigmoid, never is

    async def test_the_models_own_prompt(self, folders: dict[str, Path], tmp_path: Path) -> None:
        model = CrossEncoder(
            str(folders["base"]), device="cpu", prompts={"query": "find : "}, default_prompt_name="query"
        )
        model.save_pretrained(str(tmp_path / "base"), create_model_card=False)
        async with running({"base": tmp_path / "base"}) as engine:
            got = await engine.rerank(one_hot(engine.pool, "base", dtype="float32"), QUERY, DOCUMENTS)
        np.testing.assert_allclose(got.scores, predicted(model, QUERY, DOCUMENTS), rtol=1e-4)
        bare = predicted(CrossEncoder(str(folders["base"]), device="cpu"), QUERY, DOCUMENTS)
        assert np.abs(got.scores - bare).max() > 1e-3

    async def test_truncation_is_cross_encoders(self, folders: dict[str, Path]) -> None:
        """Of query and document the longer is cut first."""
        texts = ["dog " * 200, "cat", "paris is a city " * 60]
        query = "what is the capital " * 30
        model = CrossEncoder(str(folders["base"]), device="cpu")
        short = CrossEncoder(str(folders["base"]), device="cpu", max_length=16)
        async with running(folders, pool={"truncate": True}) as engine:
            recipe = one_hot(engine.pool, "base", dtype="float32")
            whole = await engine.rerank(recipe, query, texts)
            cut = await engine.rerank(recipe, query, texts, truncate_to=16)
        np.testing.assert_allclose(whole.scores, predicted(model, query, texts), rtol=1e-4)
        np.testing.assert_allclose(cut.scores, predicted(short, query, texts), rtol=1e-4)
        assert cut.num_tokens == 3 * 16

    async def test_every_answer_is_of_its_own_recipe(self, folders: dict[str, Path]) -> None:
        mixtures: list[dict[str, float]] = [{"base": 1.0}, {"quora": 1.0}, {"hotpotqa": 0.5, "quora": 0.5}, WEIGHTS]
        texts = documents(30)
        expected = [predicted(merged_apart(folders, weights, torch.float32), QUERY, texts) for weights in mixtures]
        rng = random.Random(0)
        async with running(folders, cache_bytes=250_000, max_batch_tokens=128) as engine:
            recipes = [recipe_of(engine, weights) for weights in mixtures]

            async def caller() -> None:
                for _ in range(5):
                    which, rows = rng.randrange(len(mixtures)), rng.sample(range(len(texts)), rng.randint(1, 6))
                    got = await engine.rerank(recipes[which], QUERY, [texts[row] for row in rows])
                    np.testing.assert_allclose(got.scores, expected[which][rows], rtol=1e-4)

            async with asyncio.timeout(120):
                await asyncio.gather(*(caller() for _ in range(24)))
            snapshot = await engine.snapshot(deadline_s=10)
            assert engine.stats.num_swaps_by_source["files"] > len(mixtures)  # room for two of the three
        assert (snapshot.state, snapshot.num_queued) == ("ready", 0)


class TestScoring:
    async def test_losses_come_from_raw_logits(self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        # an example's pairs in two calls
        monkeypatch.setattr("cocktail_serve.engines.in_process.reranker_engine.PAIRS_PER_CALL", 3)
        rows = [
            {"query": "dog", "pos": ["cat"], "neg": ["bank", "river city"]},
            {"query": QUERY, "pos": ["paris"], "neg": ["berlin", "madrid"]},
        ]
        async with running(folders) as engine:
            got = await engine.score(recipe_of(engine, WEIGHTS), parse_examples(rows, "reranker"))
        model = merged_apart(folders, WEIGHTS, torch.float32)
        assert 0 < got.engine_time.scoring_s < 60
        for loss, row in zip(got.losses, rows, strict=True):
            texts = [*row["pos"], *row["neg"]]
            logits = torch.from_numpy(predicted(model, row["query"], texts, activation_fn=torch.nn.Identity()))
            want = torch.nn.functional.cross_entropy(logits.double()[None], torch.tensor([0]))
            assert loss == pytest.approx(want.item(), rel=1e-4)

    async def test_check_examples_names_the_row(self, folders: dict[str, Path]) -> None:
        rows = [{"query": "dog", "pos": ["cat"], "neg": ["a"]}, {"query": "dog", "pos": ["cat"], "neg": ["dog " * 200]}]
        examples = parse_examples(rows, "reranker")
        async with running(folders) as engine:
            with pytest.raises(ContextLengthError, match=r"row 2: .* 204 tokens together"):
                await engine.check_examples(examples)
        async with running(folders, pool={"truncate": True}) as engine:
            await engine.check_examples(examples)
            scored = await engine.score(one_hot(engine.pool, "base", dtype="float32"), examples)
            assert len(scored.losses) == 2


class TestRefuses:
    async def test_too_long_is_an_error_with_its_index(self, folders: dict[str, Path]) -> None:
        async with running(folders) as engine:
            with pytest.raises(ContextLengthError, match=r"documents 1 has 204 tokens together.*at most 128") as caught:
                await engine.rerank(one_hot(engine.pool, "base", dtype="float32"), "cat", ["dog", "dog " * 200])
        assert caught.value.param == "documents.1"

    async def test_truncation_to_nothing(self, folders: dict[str, Path]) -> None:
        async with running(folders) as engine:
            with pytest.raises(InvalidRequestError, match="at least 4"):
                await engine.rerank(one_hot(engine.pool, "base", dtype="float32"), "cat", ["dog"], truncate_to=3)

    async def test_too_many_tokens_in_one_request(self, folders: dict[str, Path]) -> None:
        async with running(folders, max_input_tokens=50) as engine:
            with pytest.raises(InvalidRequestError, match="one request may have 50") as caught:
                await engine.rerank(one_hot(engine.pool, "base", dtype="float32"), "cat", ["dog cat bird"] * 20)
        assert caught.value.param == "documents"

    async def test_a_recipe_of_another_dtype(self, folders: dict[str, Path]) -> None:
        async with running(folders) as engine:
            with pytest.raises(InvalidMixError, match="float32"):
                await engine.rerank(one_hot(engine.pool, "base", dtype="bfloat16"), "cat", ["dog"])

    async def test_a_classifier_of_several_labels(self, tmp_path: Path) -> None:
        async with running({"base": make_reranker(tmp_path / "base", num_labels=3)}) as engine:
            with pytest.raises(EngineError, match=r"one label.*3 labels"):
                await engine.mix_ahead(one_hot(engine.pool, "base", dtype="float32"))

    def test_an_expert_of_another_number_of_labels(self, folders: dict[str, Path], tmp_path: Path) -> None:
        other = make_reranker(tmp_path / "other", num_labels=2)
        config = config_of({"base": folders["base"], "other": other})
        with pytest.raises(IncompatibleModelsError, match=r"(?s)'other'.*classifier\.weight") as caught:
            open_pool(config, cache_dir=tmp_path / "cache")
        assert "[1, 32]" in caught.value.message
        assert "[2, 32]" in caught.value.message

    async def test_no_documents(self, folders: dict[str, Path]) -> None:
        async with running(folders) as engine:
            answer = await engine.rerank(one_hot(engine.pool, "base", dtype="float32"), "cat", [])
        assert (answer.scores.shape, answer.num_tokens) == ((0,), 0)
