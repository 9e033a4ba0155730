"""Recipes that share a batch in real vLLM: every row answers by its own coefficients, or not at all."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import LlamaForCausalLM

from cocktail_serve.recipe import Recipe
from tests.adapters import parameters_of, train_adapter
from tests.e2e.conftest import API_KEY, VLLMServer, completion_body, running_vllm
from tests.e2e.reference import assert_greedy_of, load_reference
from tests.merging import linear
from tests.models import make_decoder

pytestmark = pytest.mark.vllm

PROMPTS = [
    [1, 40, 41, 42, 43],
    [1, 100, 90, 80, 70, 60, 50],
    [1, *range(10, 90)],  # more than two KV blocks, so that prefix caching has something to find
]
MIXTURES: list[dict[str, float]] = [
    {"base": 1.0},
    {"red": 1.0},
    {"green": 1.0},
    {"blue": 1.0},
    {"base": 0.5, "red": 0.5},
    {"base": 0.2, "red": 0.3, "green": 0.1, "blue": 0.4},
    {"base": 1.5, "green": -0.5},
]


def make_adapters(folder: Path, *, tied: bool) -> dict[str, Path]:
    """A base and adapters that change every kind of layer, by factors of several ranks and scalings."""
    base = make_decoder(folder / "base", tie_word_embeddings=tied)
    attention = ["q_proj", "v_proj"]
    outer = ["embed_tokens", "lm_head", "gate_proj", "o_proj"]
    train_adapter(base, folder / "red", seed=1)
    train_adapter(
        base, folder / "green", seed=2, r=8, use_rslora=True, target_modules=attention, rank_pattern={"v_proj": 3}
    )
    train_adapter(base, folder / "blue", seed=3, r=2, lora_alpha=2, target_modules=outer, ensure_weight_tying=tied)
    return {name: folder / name for name in ("base", "red", "green", "blue")}


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    folder = tmp_path_factory.mktemp("unmerged")
    folders = make_adapters(folder, tied=request.param)
    with running_vllm(folder, tied=request.param, managed=True, folders=folders, mode="unmerged") as running:
        yield running


def request_of(server: VLLMServer, recipe: Recipe, prompt: list[int], **options: Any) -> dict[str, Any]:
    """Arguments of a client's `post`."""
    xargs = {"cocktail_recipe": json.dumps(recipe.to_json())}
    return {
        "url": "/v1/completions",
        "json": completion_body(prompt, salt="of-the-test", vllm_xargs=xargs, **options),
        "headers": {"x-cocktail-recipe": recipe.digest},
    }


def reference(server: VLLMServer, weights: Mapping[str, float]) -> LlamaForCausalLM:
    """transformers on parameters folded by peft's rule and merged apart, in float64."""
    base = server.folders["base"]
    mixed = copy.deepcopy(load_reference(base))
    states = {name: parameters_of(server.folders[name], base) for name in weights if name != "base"}
    states["base"] = load_reference(base).state_dict()
    stored = set.intersection(*(set(states[name]) for name in ("base", *weights)))  # a tied head is stored once
    merged = linear({name: {key: states[name][key] for key in stored} for name in weights}, dict(weights))
    missing, unexpected = mixed.load_state_dict(merged, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return mixed


def test_rows_of_one_batch_answer_each_by_its_own_coefficients(server: VLLMServer) -> None:
    async def ask_all() -> list[httpx.Response]:
        transport = httpx.AsyncHTTPTransport(uds=str(server.uds))
        headers = {"authorization": f"Bearer {API_KEY}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://engine", headers=headers, timeout=60
        ) as client:
            return await asyncio.gather(
                *(
                    client.post(**request_of(server, server.recipe(**weights), prompt))
                    for weights in MIXTURES
                    for prompt in PROMPTS
                )
            )

    answers = iter(asyncio.run(ask_all()))
    for weights in MIXTURES:
        model = reference(server, weights)
        for prompt in PROMPTS:
            answer = next(answers)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-cocktail-recipe"] == server.recipe(**weights).digest
            assert_greedy_of(model, prompt, answer.json()["choices"][0])
