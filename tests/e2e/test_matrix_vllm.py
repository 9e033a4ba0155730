"""The decoders people have, in real vLLM: every family of the zoo in one server, against transformers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig, VLLMEngineConfig
from cocktail_serve.engines.vllm.build import build_vllm_engine
from cocktail_serve.engines.vllm.engine import VLLMEngine
from cocktail_serve.examples import parse_examples
from cocktail_serve.recipe import make_recipe
from cocktail_serve.scoring.decoder import score_with_transformers, tokenize_examples
from tests.e2e.reference import assert_greedy_of
from tests.zoo.families import MAX_MODEL_LEN, Family, Zoo, cases
from tests.zoo.making import BASE, FULL, LORA
from tests.zoo.specimens import DECODERS, Specimen

pytestmark = pytest.mark.vllm

START_S = 240.0
PROMPT = "what is the capital of france"
EXAMPLES = [
    {"input": "the capital of france is", "output": "paris"},
    {"input": "the film was", "output": "a joy"},
]
LOSS_TOLERANCE = 2e-3

IN_VLLM = [specimen for specimen in DECODERS if specimen.unserved is None]
WITH_ADAPTERS = [specimen for specimen in IN_VLLM if LORA not in specimen.refused]
NOT_IN_VLLM = [specimen for specimen in DECODERS if specimen.unserved is not None]


@pytest.fixture
def family(specimen: Specimen, zoo: Zoo) -> Family:
    return zoo.family(specimen)


@asynccontextmanager
async def running_engine(config: PoolConfig, folder: Path) -> AsyncIterator[VLLMEngine]:
    """A vLLM of its own for a pool, ready; what it says where it does not get so is raised as AssertionError."""
    assert isinstance(config.engine, VLLMEngineConfig)
    pool = await asyncio.to_thread(open_pool, config, cache_dir=folder / "cache")
    engine = build_vllm_engine(pool, config.engine, run_dir=folder / "run")
    await engine.start()
    try:
        deadline = time.monotonic() + START_S
        while (snapshot := await engine.snapshot(deadline_s=5)).state != "ready":
            assert snapshot.state != "failed", snapshot.detail
            assert time.monotonic() < deadline, snapshot.detail
            await asyncio.sleep(0.3)
        yield engine
    finally:
        await engine.stop()


async def complete(engine: VLLMEngine, merging_weights: Mapping[str, float]) -> dict[str, Any]:
    """A greedy completion of `PROMPT`, with the ids of both and log-probabilities."""
    recipe = make_recipe(engine.pool, merging_weights, dtype="float32", mode=engine.pool.mode)
    body = {"prompt": PROMPT, "temperature": 0.0, "max_tokens": 16, "ignore_eos": True, "logprobs": 1}
    # a publisher's own sampling defaults are not asked for
    body |= {"repetition_penalty": 1.0, "return_token_ids": True}
    async with engine.forward(recipe, "/v1/completions", body, tenant="t") as answer:
        assert answer.body is not None
        choice: dict[str, Any] = json.loads(answer.body)["choices"][0]
        return choice


@pytest.mark.parametrize("specimen", cases(IN_VLLM))
async def test_members_and_mixtures_answer_and_score_as_in_transformers(family: Family, tmp_path: Path) -> None:
    config = family.pool()
    ids = AutoTokenizer.from_pretrained(family.folders[BASE])(PROMPT).input_ids
    mixtures = [{name: 1.0} for name in (BASE, *family.experts)]
    mixtures.append({BASE: 0.25} | dict.fromkeys(family.experts, 0.75 / len(family.experts)))
    examples = parse_examples(EXAMPLES, "decoder", max_examples=100)
    async with running_engine(config, tmp_path) as engine:
        said = [await complete(engine, mixture) for mixture in mixtures]
        losses = [
            (await engine.score(make_recipe(engine.pool, mixture, dtype="float32"), examples)).losses
            for mixture in mixtures
        ]
    tokenized = tokenize_examples(
        AutoTokenizer.from_pretrained(family.folders[BASE]), examples, max_tokens=MAX_MODEL_LEN - 1
    )
    for mixture, choice, loss in zip(mixtures, said, losses, strict=True):
        reference = family.reference.mixed(mixture)
        assert choice["prompt_token_ids"] == ids
        assert_greedy_of(reference, ids, choice)
        assert loss == pytest.approx(score_with_transformers(reference, tokenized), abs=LOSS_TOLERANCE), mixture
    told = {tuple(round(log_prob, 2) for log_prob in choice["logprobs"]["token_logprobs"]) for choice in said}
    assert len(told) >= 3, "base, full expert and mixture answer alike"


@pytest.mark.full
@pytest.mark.parametrize("specimen", WITH_ADAPTERS, ids=str)
async def test_adapters_answer_and_score_by_their_coefficients(family: Family, tmp_path: Path) -> None:
    """However vLLM fuses and renames the layers: all mixtures in one batch."""
    ids = AutoTokenizer.from_pretrained(family.folders[BASE])(PROMPT).input_ids
    mixtures = [{BASE: 1.0}, {LORA: 1.0}, {BASE: 0.4, LORA: 0.6}]
    examples = parse_examples(EXAMPLES, "decoder", max_examples=100)
    config = family.pool([LORA])
    async with running_engine(config, tmp_path) as engine:
        assert engine.pool.mode == "unmerged"
        said = await asyncio.gather(*(complete(engine, mixture) for mixture in mixtures))
        recipes = [make_recipe(engine.pool, mixture, dtype="float32", mode="unmerged") for mixture in mixtures]
        scored = await asyncio.gather(*(engine.score(recipe, examples) for recipe in recipes))
    tokenized = tokenize_examples(
        AutoTokenizer.from_pretrained(family.folders[BASE]), examples, max_tokens=MAX_MODEL_LEN - 1
    )
    for mixture, choice, score in zip(mixtures, said, scored, strict=True):
        reference = family.reference.mixed(mixture)
        assert_greedy_of(reference, ids, choice)
        assert score.losses == pytest.approx(score_with_transformers(reference, tokenized), abs=LOSS_TOLERANCE)
    told = {tuple(round(log_prob, 4) for log_prob in choice["logprobs"]["token_logprobs"]) for choice in said}
    assert len(told) == len(mixtures), "base, expert and mixture answer alike"


@pytest.mark.full
@pytest.mark.parametrize("specimen", IN_VLLM, ids=str)
async def test_a_mixture_written_by_mix_is_loaded_by_vllm(family: Family, tmp_path: Path) -> None:
    experts = [name for name in (FULL, LORA) if name in family.experts]
    pool = open_pool(family.pool(experts), cache_dir=tmp_path / "cache")
    weights = {BASE: 0.2} | dict.fromkeys(experts, 0.8 / len(experts))
    save_mixture(make_recipe(pool, weights, dtype="float32"), pool, tmp_path / "mixed")
    async with running_engine(family.pool([FULL], base=tmp_path / "mixed"), tmp_path) as engine:
        written, mixed = await complete(engine, {BASE: 1.0}), await complete(engine, {BASE: 0.5, FULL: 0.5})
    ids = AutoTokenizer.from_pretrained(family.folders[BASE])(PROMPT).input_ids
    assert_greedy_of(family.reference.mixed(weights), ids, written)
    # the folder is a base as any other
    again = {name: weight / 2 for name, weight in weights.items()}
    assert_greedy_of(family.reference.mixed(again | {FULL: again[FULL] + 0.5}), ids, mixed)


@pytest.mark.full
@pytest.mark.parametrize("specimen", NOT_IN_VLLM, ids=str)
async def test_what_vllm_does_not_run_on_a_cpu_is_said(family: Family, tmp_path: Path) -> None:
    assert family.specimen.unserved is not None
    with pytest.raises(AssertionError, match=family.specimen.unserved.says):
        async with running_engine(family.pool([FULL]), tmp_path):
            pass
