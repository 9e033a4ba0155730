"""Recipes that share a batch in real vLLM: every row answers by its own coefficients, or not at all."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

from cocktail_serve.checkpoints.opening import open_expert
from cocktail_serve.recipe import Recipe, make_recipe
from tests.adapters import parameters_of, train_adapter
from tests.e2e.conftest import API_KEY, VLLMServer, completion_body, running_vllm
from tests.e2e.reference import LOGPROB_TOLERANCE, assert_greedy_of, load_reference
from tests.merging import linear
from tests.models import make_decoder
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.replies import SCORE_PATH

pytestmark = pytest.mark.vllm

PROMPTS = [
    [1, 40, 41, 42, 43],
    [1, 100, 90, 80, 70, 60, 50],
    [1, *range(20, 45)],  # grows into its second KV block
    [1, *range(10, 90)],  # more than two KV blocks, so that prefix caching has something to find
]
LONG = PROMPTS[-1]
ROUNDING = 1e-5
"""Of a loss in float32, by how many rows are multiplied at once."""

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


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
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


def post_all(server: VLLMServer, requests: Sequence[dict[str, Any]]) -> list[httpx.Response]:
    """Sends them at once."""

    async def post() -> list[httpx.Response]:
        transport = httpx.AsyncHTTPTransport(uds=str(server.uds))
        headers = {"authorization": f"Bearer {API_KEY}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://engine", headers=headers, timeout=120
        ) as client:
            return await asyncio.gather(*(client.post(**request) for request in requests))

    return asyncio.run(post())


def assert_right(server: VLLMServer, repeats: int = 1) -> None:
    """Every mixture answers every prompt as its reference does, all of them in one batch."""
    asked = [(weights, prompt) for _ in range(repeats) for weights in MIXTURES for prompt in PROMPTS]
    answers = post_all(server, [request_of(server, server.recipe(**weights), prompt) for weights, prompt in asked])
    models = {str(weights): reference(server, weights) for weights in MIXTURES}
    for (weights, prompt), answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-cocktail-recipe"] == server.recipe(**weights).digest
        assert_greedy_of(models[str(weights)], prompt, answer.json()["choices"][0])


def test_rows_of_one_batch_answer_each_by_its_own_coefficients(server: VLLMServer) -> None:
    assert_right(server)


def test_models_of_the_pool_answer_differently(server: VLLMServer) -> None:
    """What the other tests of this file rest on."""
    answers = post_all(server, [request_of(server, server.recipe(**weights), PROMPTS[0]) for weights in MIXTURES])
    tokens = [tuple(answer.json()["choices"][0]["token_ids"]) for answer in answers]
    assert len(set(tokens)) == len(tokens)


def test_one_prefix_is_cached_for_each_recipe_apart(server: VLLMServer) -> None:
    """One after the other, with the same salt of their own: whoever comes second finds no blocks of the first."""
    for weights in (*MIXTURES, *MIXTURES):
        answer = server.client.post(**request_of(server, server.recipe(**weights), LONG))
        assert_greedy_of(reference(server, weights), LONG, answer.json()["choices"][0])


def test_beam_search_answers_by_the_requests_own_row(server: VLLMServer) -> None:
    """vLLM asks itself for each beam's next token, by parameters that it makes anew."""
    asked = [(weights, prompt) for weights in MIXTURES for prompt in PROMPTS]
    requests = [request_of(server, server.recipe(**w), prompt, use_beam_search=True) for w, prompt in asked]
    for (weights, prompt), answer in zip(asked, post_all(server, requests), strict=True):
        assert answer.status_code == 200, answer.text
        assert_greedy_of(reference(server, weights), prompt, answer.json()["choices"][0])


def assert_losses_right(server: VLLMServer) -> None:
    """Of every mixture on every prompt, all at once, and beside them clients that ask for their prompts' own."""
    examples = [{"token_ids": prompt, "output_start": 2} for prompt in PROMPTS]

    def request(weights: dict[str, float]) -> dict[str, Any]:
        recipe = server.recipe(**weights)
        xargs = {"cocktail_recipe": json.dumps(recipe.to_json())}
        headers = {"x-cocktail-recipe": recipe.digest}
        return {"url": SCORE_PATH, "json": {"examples": examples, "vllm_xargs": xargs}, "headers": headers}

    asked = [(weights, prompt) for weights in MIXTURES for prompt in PROMPTS]
    prompts = [request_of(server, server.recipe(**w), p, prompt_logprobs=0, max_tokens=1) for w, p in asked]
    answers = post_all(server, [*(request(weights) for weights in MIXTURES), *prompts])
    assert [answer.status_code for answer in answers] == [200] * len(answers), answers[-1].text
    losses = [loss for answer in answers[: len(MIXTURES)] for loss in answer.json()["losses"]]
    for (weights, prompt), loss, answer in zip(asked, losses, answers[len(MIXTURES) :], strict=True):
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            log_probs = reference(server, weights)(tokens).logits[0, :-1].double().log_softmax(-1)
        wanted = log_probs.gather(1, tokens[0, 1:, None])[:, 0].tolist()
        none, *of_tokens = answer.json()["choices"][0]["prompt_logprobs"]
        assert none is None
        found = [each[str(token)]["logprob"] for each, token in zip(of_tokens, prompt[1:], strict=True)]
        assert found == pytest.approx(wanted, abs=LOGPROB_TOLERANCE)
        # the same numbers, of the output's tokens alone
        assert loss == pytest.approx(-sum(found[1:]) / len(found[1:]), abs=ROUNDING)


def test_losses_are_of_each_requests_own_row(server: VLLMServer) -> None:
    """Also where the output head is adapted: it computes the rows of several requests at once."""
    assert_losses_right(server)


def test_only_what_is_bound_to_its_recipe_comes_in(server: VLLMServer) -> None:
    red, green = server.recipe(red=1.0), server.recipe(green=1.0)
    right = request_of(server, red, PROMPTS[0])
    assert server.client.post(**right).status_code == 200
    refused = {
        "no header": ({**right, "headers": {}}, 409),
        "another recipe's": ({**right, "headers": {"x-cocktail-recipe": green.digest}}, 400),
        "no recipe": ({**right, "json": completion_body(PROMPTS[0])}, 400),
        "a row": ({**right, "json": completion_body(PROMPTS[0], vllm_xargs={"cocktail_row": []})}, 400),
        "another path": ({**right, "url": "/inference/v1/generate"}, 400),
    }
    for case, (request, status) in refused.items():
        answer = server.client.post(**request)
        assert answer.status_code == status, case
        assert answer.json()["error"]["code"] in ("invalid_recipe", "recipe_not_resident")
    mix = server.client.post("/v1/cocktail/mix", json={"recipe": red.to_json()})
    assert (mix.status_code, "share a batch" in mix.json()["error"]["message"]) == (400, True)


def test_an_expert_that_the_manifest_gains_is_loaded_when_it_is_asked_for(server: VLLMServer) -> None:
    folder = server.log.parent
    train_adapter(server.folders["base"], folder / "late", seed=9, r=5, target_modules=["k_proj", "up_proj"])
    manifest = Manifest.read(folder / "pool.json")
    late = open_expert(server.pool, "late", folder / "late", cache_dir=folder / "cache")
    later = replace(server.pool, experts={**server.pool.experts, "late": late})
    recipe = make_recipe(later, {"base": 0.4, "late": 0.6}, dtype="float32", mode="unmerged")
    request = request_of(server, recipe, PROMPTS[1])
    unknown = server.client.post(**request)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "invalid_recipe")

    replace(manifest, members=later.by_fingerprint).write(folder / "pool.json")
    others = [request_of(server, server.recipe(**weights), prompt) for weights in MIXTURES for prompt in PROMPTS]
    *_, answer = post_all(server, [*others, request])
    assert answer.status_code == 200, answer.text
    assert late.fingerprint in server.status()["captured"]
    server.folders["late"] = folder / "late"  # type: ignore[index]  # a dict of the fixture's own
    assert_greedy_of(reference(server, {"base": 0.4, "late": 0.6}), PROMPTS[1], answer.json()["choices"][0])
    assert_right(server)


def test_chunks_of_prompts_and_preempted_requests_keep_their_rows(tmp_path: Path) -> None:
    """Prompts come in pieces of 24 tokens, and the KV cache holds fewer than are let in."""
    args = {"max-num-batched-tokens": 24, "max-num-seqs": 8, "num-gpu-blocks-override": 7}
    folders = make_adapters(tmp_path, tied=False)
    with running_vllm(tmp_path, tied=False, managed=True, folders=folders, mode="unmerged", args=args) as running:
        assert_right(running, repeats=3)
        assert_losses_right(running)
        metrics = running.client.get("/metrics").text
    preempted = [line for line in metrics.splitlines() if line.startswith("vllm:num_preemptions_total")]
    assert float(preempted[0].rpartition(" ")[2]) > 0


@pytest.mark.slow
def test_compiled_graphs_answer_by_rows_too(tmp_path: Path) -> None:
    folders = make_adapters(tmp_path, tied=False)
    args = {"no-enforce-eager": True}
    with running_vllm(
        tmp_path,
        tied=False,
        managed=True,
        folders=folders,
        mode="unmerged",
        args=args,
        environ={"VLLM_CACHE_ROOT": str(tmp_path / "graphs")},
        deadline_s=400,
    ) as running:
        assert_right(running)
        assert "Warming up model for the compilation" in running.log.read_text()
