"""The plugin in real vLLM: each trap of mixing in place is a test."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

from cocktail_serve.recipe import make_recipe
from cocktail_serve.scoring.decoder import TokenizedExample, token_log_probs
from tests.e2e.conftest import API_KEY, BLOCK_SIZE, MAX_MODEL_LEN, VLLMServer, completion_body
from tests.e2e.reference import LOGPROB_TOLERANCE, assert_greedy_of, load_reference, reference
from tests.gateways import eventually
from tests.merging import merged
from vllm_cocktail.launch import is_cpu_build

pytestmark = pytest.mark.vllm

PROMPTS = [
    [1, 40, 41, 42, 43],
    [1, 100, 90, 80, 70, 60, 50],
    [1, *range(10, 90)],  # more than two KV blocks, so that prefix caching has something to find
]
MIXTURES = [
    {"red": 1.0},
    {"base": 0.5, "red": 0.5},
    {"base": 0.2, "red": 0.3, "green": 0.5},
    {"base": 1.5, "green": -0.5},
]


@pytest.fixture(params=["untied_vllm", "tied_vllm"])
def server(request: pytest.FixtureRequest) -> VLLMServer:
    """Either server, holding its base."""
    running: VLLMServer = request.getfixturevalue(request.param)
    running.mix(running.recipe(base=1.0))
    return running


@pytest.fixture
def managed(untied_vllm: VLLMServer) -> VLLMServer:
    untied_vllm.mix(untied_vllm.recipe(base=1.0))
    return untied_vllm


@pytest.fixture
def plain(tied_vllm: VLLMServer) -> VLLMServer:
    tied_vllm.mix(tied_vllm.recipe(base=1.0))
    return tied_vllm


@pytest.mark.parametrize("merging_weights", MIXTURES, ids=str)
def test_a_mixture_answers_as_transformers_does(server: VLLMServer, merging_weights: dict[str, float]) -> None:
    server.mix(server.recipe(**merging_weights))
    model = reference(server, merging_weights)
    for prompt in PROMPTS:
        assert_greedy_of(model, prompt, server.complete(prompt))


def test_a_cocktail_of_ties_answers_as_transformers_does(server: VLLMServer) -> None:
    """Any method goes the way of the linear mixture: parameters in checkpoint format, one at a time."""
    weights, params = {"red": 0.8, "green": 0.5}, {"density": 0.3, "normalize": True, "lambda": 0.9}
    server.mix(make_recipe(server.pool, weights, dtype="float32", method="ties", method_params=params))
    states = {name: load_reference(server.folders[name]).state_dict() for name in ("base", *weights)}
    model = copy.deepcopy(load_reference(server.folders["base"]))
    model.load_state_dict(
        {
            key: torch.from_numpy(
                merged(
                    "ties",
                    {name: s[key].double().numpy() for name, s in states.items()},
                    weights,
                    density=0.3,
                    scale=0.9,
                )
            ).float()
            for key in model.state_dict()
        }
    )
    for prompt in PROMPTS:
        assert_greedy_of(model, prompt, server.complete(prompt))


def test_models_of_the_pool_answer_differently(server: VLLMServer) -> None:
    """What the other tests of this file rest on."""
    answers = []
    for name in ("base", "red", "green"):
        server.mix(server.recipe(**{name: 1.0}))
        answers.append(server.complete(PROMPTS[0])["token_ids"])
    assert all(a != b for a, b in itertools.combinations(answers, 2))


def test_mixing_the_base_again_gives_its_answers_back_exactly(server: VLLMServer) -> None:
    before = [server.complete(prompt)["logprobs"]["token_logprobs"] for prompt in PROMPTS]
    server.mix(server.recipe(base=0.4, green=0.6))
    server.mix(server.recipe(base=1.0))
    assert [server.complete(prompt)["logprobs"]["token_logprobs"] for prompt in PROMPTS] == before


def test_parameters_from_memory_give_identical_answers(server: VLLMServer) -> None:
    recipe = server.recipe(base=0.25, red=0.25, green=0.5)
    server.client.post("/v1/cocktail/forget", json={"digest": recipe.digest}).raise_for_status()
    assert server.mix(recipe)["source"] == "files"
    assert recipe.digest in server.status()["cached"]
    before = server.complete(PROMPTS[1])["logprobs"]
    server.mix(server.recipe(red=1.0))
    assert server.mix(recipe)["source"] == "cache"
    assert server.complete(PROMPTS[1])["logprobs"] == before
    assert server.mix(recipe)["source"] == "resident"
    server.client.post("/v1/cocktail/forget", json={"digest": recipe.digest}).raise_for_status()
    assert recipe.digest not in server.status()["cached"]
    assert server.complete(PROMPTS[1])["logprobs"] == before


def test_a_model_of_the_pool_is_not_kept_in_memory(server: VLLMServer) -> None:
    recipe = server.recipe(green=1.0)
    assert server.mix(recipe)["source"] == "files"
    assert recipe.digest not in server.status()["cached"]


def test_status_tells_what_is_resident(server: VLLMServer) -> None:
    recipe = server.recipe(base=0.5, red=0.5)
    server.mix(recipe)
    status = server.status()
    assert status["resident"] == status["weight_version"] == recipe.digest
    assert (status["state"], status["in_flight"], status["model_dtype"]) == ("open", 0, "float32")
    assert 0 < status["cached_bytes"] <= status["cache_bytes"]


def test_packed_parameters_are_found_out_and_streamed(server: VLLMServer) -> None:
    """On a CPU vLLM keeps linear layers in opaque handles, which no sum reaches."""
    if not is_cpu_build():
        pytest.skip("parameters are plain on a GPU")
    status = server.status()
    assert (status["mixing_path"], status["captured"], status["captured_bytes"]) == ("stream", [], 0)
    assert "is packed by its layer" in status["streams_because"]


def _broken_recipes(server: VLLMServer) -> Iterator[tuple[str, dict[str, Any]]]:
    good = server.recipe(base=0.5, red=0.5).to_json()
    red = server.pool.experts["red"].fingerprint
    yield "no recipe at all", {}
    yield "another version", good | {"version": 99}
    yield "an unknown model", good | {"coefficients": [["0" * 64, 1.0]]}
    yield "another base", good | {"base": red}
    yield "another dtype", good | {"dtype": "bfloat16"}
    yield "another method", good | {"method": "fisher"}
    yield "a parameter of another method", good | {"method_params": {"density": 0.5}}
    yield "a base that does not count 1", good | {"method": "ties"}
    yield "no coefficients", good | {"coefficients": []}


def test_an_invalid_recipe_changes_nothing(server: VLLMServer) -> None:
    before, answer = server.status(), server.complete(PROMPTS[0])["logprobs"]
    for what, recipe in _broken_recipes(server):
        response = server.client.post("/v1/cocktail/mix", json={"recipe": recipe})
        assert response.status_code == 400, what
        assert response.json()["error"]["code"] in ("invalid_recipe", "invalid_mix"), what
        assert response.json()["resident"] == before["resident"], what
    assert server.status() == before
    assert server.complete(PROMPTS[0])["logprobs"] == answer


def test_a_broken_file_is_found_before_anything_is_touched(managed: VLLMServer) -> None:
    """The engine must not learn of a truncated shard from inside a reload."""
    file = managed.folders["green"] / "model.safetensors"
    whole = file.read_bytes()
    answer = managed.complete(PROMPTS[0])["logprobs"]
    recipe = managed.recipe(base=0.61, green=0.39)
    replacement = file.with_suffix(".truncated")  # a new file: the old one stays mapped
    replacement.write_bytes(whole[:-64])
    replacement.replace(file)
    try:
        response = managed.client.post("/v1/cocktail/mix", json={"recipe": recipe.to_json()})
    finally:
        replacement.write_bytes(whole)
        replacement.replace(file)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "model_changed"
    assert "model.safetensors" in response.json()["error"]["message"]
    assert managed.complete(PROMPTS[0])["logprobs"] == answer
    managed.mix(recipe)


def test_an_expert_that_is_written_over_is_not_mixed_under_its_old_name(managed: VLLMServer) -> None:
    file = managed.folders["green"] / "model.safetensors"
    whole, other = file.read_bytes(), (managed.folders["red"] / "model.safetensors").read_bytes()
    kept, needs_it = managed.recipe(base=0.3, green=0.7), managed.recipe(base=0.32, green=0.68)
    managed.mix(kept)
    answer = managed.complete(PROMPTS[0])["logprobs"]
    try:
        for content in (other, whole[:4096]):  # the same file, which the worker has mapped, with other content
            file.write_bytes(content)
            response = managed.client.post("/v1/cocktail/mix", json={"recipe": needs_it.to_json()})
            assert response.status_code == 400, response.text
            assert response.json()["error"]["code"] == "model_changed"
            assert "'green' are not what they were" in response.json()["error"]["message"]
            assert managed.status()["state"] == "open"
            assert managed.complete(PROMPTS[0])["logprobs"] == answer
        managed.mix(managed.recipe(base=1.0))
        assert_greedy_of(reference(managed, {"base": 1.0}), PROMPTS[0], managed.complete(PROMPTS[0]))
        assert managed.mix(kept)["source"] == "cache"
        assert managed.complete(PROMPTS[0])["logprobs"] == answer
    finally:
        file.write_bytes(whole)
    managed.mix(needs_it)
    assert_greedy_of(reference(managed, {"base": 0.32, "green": 0.68}), PROMPTS[0], managed.complete(PROMPTS[0]))


@pytest.mark.parametrize(
    "body", [{"recipe": {}, "drain_s": -1}, {}, {"digest": "x"}, {"merging_weights": {"red": "a"}}]
)
def test_a_malformed_body_is_a_client_error(managed: VLLMServer, body: dict[str, Any]) -> None:
    response = managed.client.post("/v1/cocktail/mix", json=body)
    assert response.status_code == 400, response.text
    assert managed.status()["state"] == "open"


ENGINE_ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/cocktail/score"),
    ("POST", "/v1/cocktail/decide"),
    ("POST", "/inference/v1/generate"),
    ("POST", "/invocations"),
    ("POST", "/pooling"),
    ("POST", "/generative_scoring"),
    ("GET", "/a-route-of-the-future"),
]


@pytest.mark.parametrize(("method", "path"), ENGINE_ROUTES)
@pytest.mark.parametrize("headers", [{}, {"x-cocktail-recipe": "f" * 64}], ids=["absent", "wrong"])
def test_the_fence_turns_away_what_does_not_name_the_resident_recipe(
    managed: VLLMServer, method: str, path: str, headers: dict[str, str]
) -> None:
    response = managed.client.request(method, path, json={"model": "pico", "prompt": "x"}, headers=headers)
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "recipe_not_resident"
    assert response.json()["resident"] == managed.resident


def test_the_fence_lets_through_what_never_reaches_the_engine(managed: VLLMServer) -> None:
    for path in ("/health", "/v1/models", "/version", "/metrics"):
        assert managed.client.get(path).status_code == 200, path
    response = managed.client.post("/tokenize", json={"model": "pico", "prompt": "hello"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/cocktail/status"),
        *(("POST", f"/v1/cocktail/{name}") for name in ("mix", "forget", "score", "decide")),
    ],
)
def test_control_routes_need_the_key(managed: VLLMServer, method: str, path: str) -> None:
    for headers in ({"authorization": ""}, {"authorization": f"Bearer not-{API_KEY}"}):
        response = managed.client.request(method, path, json={}, headers=headers)
        assert response.status_code == 401
    assert managed.status()["resident"] == managed.resident


# without salts of their own, two recipes would share KV blocks: the second test shows that the first can fail


def test_salts_keep_the_kv_blocks_of_two_recipes_apart(managed: VLLMServer) -> None:
    prompt = PROMPTS[2]
    managed.complete(prompt, salt="base")
    managed.mix(managed.recipe(red=1.0))
    assert_greedy_of(reference(managed, {"red": 1.0}), prompt, managed.complete(prompt, salt="red"))
    managed.mix(managed.recipe(base=1.0))
    assert_greedy_of(reference(managed, {"base": 1.0}), prompt, managed.complete(prompt, salt="base"))


def test_one_salt_for_two_recipes_gives_wrong_answers(managed: VLLMServer) -> None:
    prompt = [1, *range(120, 200)]
    managed.complete(prompt, salt="shared")
    managed.mix(managed.recipe(red=1.0))
    with pytest.raises(AssertionError):
        assert_greedy_of(reference(managed, {"red": 1.0}), prompt, managed.complete(prompt, salt="shared"))


def test_plain_requests_need_neither_header_nor_salt(plain: VLLMServer) -> None:
    prompt = PROMPTS[2]
    for merging_weights in ({"base": 1.0}, {"red": 1.0}, {"base": 0.5, "green": 0.5}):
        response = plain.client.post("/v1/cocktail/mix", json={"merging_weights": merging_weights})
        assert response.status_code == 200, response.text
        answer = plain.client.post("/v1/completions", json=completion_body(prompt))
        assert answer.headers["x-cocktail-recipe"] == response.json()["resident"]
        assert_greedy_of(reference(plain, merging_weights), prompt, answer.json()["choices"][0])


def test_plain_requests_may_insist_on_a_recipe(plain: VLLMServer) -> None:
    response = plain.client.post("/v1/completions", json=completion_body([1]), headers={"x-cocktail-recipe": "0" * 64})
    assert response.status_code == 409


def test_weights_by_name_follow_the_rules_of_weights(plain: VLLMServer) -> None:
    for merging_weights, status in (({"red": 0.2}, 400), ({"blue": 1.0}, 400), ({"red": 1e400}, 400)):
        body = json.dumps({"merging_weights": merging_weights}).encode()
        response = plain.client.post("/v1/cocktail/mix", content=body, headers={"content-type": "application/json"})
        assert response.status_code == status, response.text
    assert plain.status()["resident"] == plain.resident


def test_weights_by_name_take_a_method(plain: VLLMServer) -> None:
    chosen: dict[str, Any] = {"method": "ties", "method_params": {"density": 0.5}}
    recipe = make_recipe(plain.pool, {"red": 0.2, "green": 1.2}, dtype="float32", **chosen)
    body = {"merging_weights": {"red": 0.2, "green": 1.2}, **chosen}
    assert plain.client.post("/v1/cocktail/mix", json=body).json()["resident"] == recipe.digest
    for wrong in ({"merging_weights": {"red": 0.2}, "method": "fisher"}, {"recipe": recipe.to_json(), **chosen}):
        assert plain.client.post("/v1/cocktail/mix", json=wrong).status_code == 400
    assert plain.status()["resident"] == recipe.digest


def _losses(model: LlamaForCausalLM, examples: list[dict[str, Any]]) -> list[float]:
    losses = []
    for example in examples:
        tokens = torch.tensor(example["token_ids"])
        with torch.inference_mode():
            log_probs = model(tokens[None]).logits[0].double().log_softmax(-1)
        picked = log_probs[torch.arange(len(tokens) - 1), tokens[1:]][example["output_start"] - 1 :]
        losses.append(-float(picked.mean()))
    return losses


def test_scores_agree_with_transformers(server: VLLMServer) -> None:
    examples = [
        {"token_ids": [1, 40, 41, 42, 43, 2], "output_start": 3},
        {"token_ids": [1, 7], "output_start": 1},
        {"token_ids": [1, *range(10, 10 + MAX_MODEL_LEN - 2)], "output_start": 90},
        {"token_ids": [5, 5, 5, 5, 200, 201], "output_start": 5},
    ] * 3
    for merging_weights in ({"base": 1.0}, {"base": 0.5, "red": 0.5}):
        server.mix(server.recipe(**merging_weights))
        for _ in range(2):  # blocks of the first time must not answer the second
            response = server.client.post(
                "/v1/cocktail/score", json={"examples": examples}, headers={"x-cocktail-recipe": server.resident}
            )
            assert response.status_code == 200, response.text
            expected = _losses(reference(server, merging_weights), examples)
            assert response.json()["losses"] == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"token_ids": [1] * MAX_MODEL_LEN, "output_start": 1}, "at most 127"),
        ({"token_ids": [1, 2], "output_start": 2}, "output_start 2"),
        ({"token_ids": [1, 2], "output_start": 0}, "output_start 0"),
        ({"token_ids": [1, 2, 100_000], "output_start": 1}, "token ids"),
    ],
)
def test_an_example_that_does_not_fit_is_refused_with_its_row(
    managed: VLLMServer, example: dict[str, Any], message: str
) -> None:
    fine = {"token_ids": [1, 2, 3], "output_start": 1}
    response = managed.client.post(
        "/v1/cocktail/score", json={"examples": [fine, example]}, headers={"x-cocktail-recipe": managed.resident}
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"].startswith("row 2:")
    assert message in response.json()["error"]["message"]


@contextlib.asynccontextmanager
async def _async_client(server: VLLMServer) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(uds=str(server.uds), limits=httpx.Limits(max_connections=None))
    headers = {"authorization": f"Bearer {API_KEY}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://engine", headers=headers, timeout=60.0
    ) as client:
        yield client


def _long_stream(*prompts: list[int], **options: Any) -> dict[str, Any]:
    """Streams in one answer, with so many log-probabilities that it cannot end before somebody reads it.

    Eight short prompts make most of a megabyte, more than the buffers of a socket hold, so the server waits for its
    reader.
    """
    max_tokens = MAX_MODEL_LEN - max(map(len, prompts))
    return completion_body(list(prompts), stream=True, max_tokens=max_tokens, logprobs=20, **options)


async def _tokens_of(response: httpx.Response) -> list[list[int]]:
    """Token ids of each of the eight."""
    tokens: list[list[int]] = [[] for _ in range(8)]
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                tokens[choice["index"]] += choice["token_ids"]
    return tokens


async def test_a_stream_in_flight_ends_before_the_mix(managed: VLLMServer) -> None:
    prompt = [1, 40, 41]
    expected = managed.complete(prompt, max_tokens=MAX_MODEL_LEN - len(prompt))["token_ids"]
    headers = {"x-cocktail-recipe": managed.resident}
    body = {"recipe": managed.recipe(red=1.0).to_json()}
    async with _async_client(managed) as client:
        async with client.stream(
            "POST", "/v1/completions", json=_long_stream(*[prompt] * 8), headers=headers
        ) as stream:
            busy = await client.post("/v1/cocktail/mix", json=body | {"drain_s": 0.1})
            assert (busy.status_code, busy.json()["error"]["code"]) == (409, "busy")
            assert (await client.get("/v1/cocktail/status")).json()["state"] == "open"

            mixing = asyncio.create_task(client.post("/v1/cocktail/mix", json=body))
            while (status := (await client.get("/v1/cocktail/status")).json())["state"] == "open":
                pass
            assert (status["state"], status["resident"], status["in_flight"]) == ("mixing", managed.resident, 1)
            late = await client.post("/v1/completions", json=completion_body([1]), headers=headers)
            assert (late.status_code, late.json()["error"]["code"]) == (409, "recipe_not_resident")

            assert await _tokens_of(stream) == [expected] * 8
        assert (await mixing).json()["resident"] == managed.recipe(red=1.0).digest


async def test_a_reader_that_leaves_its_stream_holds_nobody_up(managed: VLLMServer) -> None:
    headers = {"x-cocktail-recipe": managed.resident}
    body = {"recipe": managed.recipe(green=1.0).to_json()}
    async with _async_client(managed) as client:
        async with client.stream(
            "POST", "/v1/completions", json=_long_stream(*[[1, 5]] * 8), headers=headers
        ) as stream:
            assert stream.status_code == 200
            mixing = asyncio.create_task(client.post("/v1/cocktail/mix", json=body))
            while (await client.get("/v1/cocktail/status")).json()["state"] == "open":
                pass
        assert (await mixing).status_code == 200
    managed.resident = managed.recipe(green=1.0).digest
    assert_greedy_of(reference(managed, {"green": 1.0}), PROMPTS[0], managed.complete(PROMPTS[0]))


async def test_a_caller_that_leaves_a_mix_leaves_it_whole(managed: VLLMServer) -> None:
    recipe = managed.recipe(base=0.7, red=0.3)
    request = json.dumps({"recipe": recipe.to_json()}).encode()
    _, writer = await asyncio.open_unix_connection(str(managed.uds))
    writer.write(
        b"POST /v1/cocktail/mix HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n"
        + f"authorization: Bearer {API_KEY}\r\ncontent-length: {len(request)}\r\n\r\n".encode()
        + request
    )
    await writer.drain()
    writer.transport.abort()
    deadline = time.monotonic() + 30
    while (status := managed.status())["resident"] != recipe.digest or status["state"] != "open":
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.02)
    managed.resident = recipe.digest
    assert_greedy_of(reference(managed, {"base": 0.7, "red": 0.3}), PROMPTS[1], managed.complete(PROMPTS[1]))


async def test_requests_that_clients_left_never_run_on_the_next_parameters(managed: VLLMServer) -> None:
    """The mix is already waiting when the clients leave, with six times as many requests as run at once.

    Were one of them to run after the resume, it would leave KV blocks of the new parameters under the old recipe's
    salt, and the second asking would show it.
    """
    prompts = [[1, first, *range(20, 60)] for first in range(100, 148)]
    base, red = managed.recipe(base=1.0), managed.recipe(red=1.0)
    model = reference(managed, {"base": 1.0})
    headers = {"x-cocktail-recipe": base.digest}
    async with _async_client(managed) as client:
        for salt in ("first", "second"):
            async with contextlib.AsyncExitStack() as left:
                for start in range(0, len(prompts), 8):
                    body = _long_stream(*prompts[start : start + 8], salt=salt)
                    await left.enter_async_context(client.stream("POST", "/v1/completions", json=body, headers=headers))
                mixing = asyncio.create_task(client.post("/v1/cocktail/mix", json={"recipe": red.to_json()}))
                while (status := (await client.get("/v1/cocktail/status")).json())["state"] == "open":
                    assert not mixing.done()
                assert status["in_flight"] > 0
            assert (await mixing).json()["resident"] == red.digest
            managed.mix(base)
            again = [
                client.post("/v1/completions", json=completion_body(prompt, salt=salt), headers=headers)
                for prompt in prompts
            ]
            for prompt, response in zip(prompts, await asyncio.gather(*again), strict=True):
                assert_greedy_of(model, prompt, response.json()["choices"][0])


async def test_every_answer_under_load_is_its_recipes_own(server: VLLMServer) -> None:
    """Requests for four recipes at once while the recipes change: each is refused, or answered rightly."""
    mixtures = [{"base": 1.0}, {"red": 1.0}, {"green": 1.0}, {"base": 0.5, "green": 0.5}]
    recipes = [server.recipe(**mixture) for mixture in mixtures]
    models = [reference(server, mixture) for mixture in mixtures]
    answered: list[tuple[int, list[int], dict[str, Any]]] = []
    num_answers, progress, done = [0] * len(recipes), asyncio.Semaphore(0), asyncio.Event()

    async def ask(client: httpx.AsyncClient, worker: int) -> None:
        for turn in itertools.count():
            if done.is_set():
                return
            which, prompt = (worker + turn) % len(recipes), PROMPTS[turn % len(PROMPTS)]
            response = await client.post(
                "/v1/completions",
                json=completion_body(prompt, salt=recipes[which].digest),
                headers={"x-cocktail-recipe": recipes[which].digest},
            )
            if response.status_code == 200:
                answered.append((which, prompt, response.json()["choices"][0]))
                num_answers[which] += 1
                progress.release()
            else:
                assert response.status_code == 409, response.text
                await asyncio.sleep(0)

    async with _async_client(server) as client:
        asking = [asyncio.create_task(ask(client, worker)) for worker in range(6)]
        for which, recipe in [*enumerate(recipes)] * 3:
            mixed = await client.post("/v1/cocktail/mix", json={"recipe": recipe.to_json()})
            assert mixed.status_code == 200, mixed.text
            # answers of this recipe: others may still come in that were begun before the mix
            num_wanted = num_answers[which] + 6
            while num_answers[which] < num_wanted:
                await progress.acquire()
        done.set()
        await asyncio.gather(*asking)
    server.resident = recipes[-1].digest
    for which, prompt, choice in answered:
        assert_greedy_of(models[which], prompt, choice)


def decide(server: VLLMServer, options: list[dict[str, Any]], *, salt: str | None = "s", **fields: Any) -> Any:
    return server.client.post(
        "/v1/cocktail/decide",
        json={"questions": options, "cache_salt": salt, **fields},
        headers={"x-cocktail-recipe": server.resident},
    )


def likelihoods(server: VLLMServer, prompt: list[int], continuations: list[list[int]]) -> list[float]:
    """As transformers has them, in nats."""
    examples = [TokenizedExample([*prompt, *rest], len(prompt)) for rest in continuations]
    return [float(each.sum()) for each in token_log_probs(reference(server, {"base": 1.0}), examples)]


LONG = list(range(20, 20 + 2 * BLOCK_SIZE + 5))
"""Two blocks and a bit."""


def test_options_share_what_they_begin_with(server: VLLMServer) -> None:
    """The second time, a block that reaches into an option is there: what it hides is computed all the same."""
    continuations = [[40, 41], [42], [43, *range(50, 50 + BLOCK_SIZE)]]
    asked = [
        {"prompt": LONG, "continuations": continuations, "output_starts": [len(LONG)] * 3},
        {"prompt": [*LONG, 7], "labels": [60, 61, 62]},
    ]
    wanted = [likelihoods(server, LONG, continuations), likelihoods(server, [*LONG, 7], [[60], [61], [62]])]
    replies = [decide(server, asked).json() for _ in range(3)]
    for reply in replies:
        for found, of_transformers in zip(reply["log_probs"], wanted, strict=True):
            assert found == pytest.approx(of_transformers, abs=2e-3 * (BLOCK_SIZE + 1))
    num_tokens = sum(len(LONG) + len(rest) for rest in continuations) + len(LONG) + 1
    first = replies[0]
    assert first["num_computed"] == num_tokens - 3 * 2 * BLOCK_SIZE, "computed for the first option alone"
    assert sorted(first["num_cached"]) == [0, 2 * BLOCK_SIZE], "whichever comes first"
    assert replies[1]["num_cached"] == [2 * BLOCK_SIZE] * 2
    strangers = decide(server, asked, salt="another").json()
    assert sorted(strangers["num_cached"]) == [0, 2 * BLOCK_SIZE], "a salt of its own finds nothing"
    assert sorted(decide(server, asked, salt=None).json()["num_cached"]) == [0, 2 * BLOCK_SIZE]


def test_options_that_begin_alike_are_read_through_the_cache(server: VLLMServer) -> None:
    """A block that the first computes reaches into all: what it hides of the others is what it had of the first."""
    begin, endings = list(range(50, 50 + BLOCK_SIZE)), [[40], [41], [42, 43]]
    asked = {"prompt": [*LONG, *begin], "continuations": endings, "output_starts": [len(LONG)] * 3}
    reply = decide(server, [asked], salt="alike").json()
    wanted = likelihoods(server, LONG, [[*begin, *rest] for rest in endings])
    assert reply["log_probs"] == [pytest.approx(wanted, abs=2e-3 * (BLOCK_SIZE + 2))]
    num_tokens = sum(len(LONG) + len(begin) + len(rest) for rest in endings)
    assert reply["num_computed"] == num_tokens - 2 * 3 * BLOCK_SIZE, "none of them again"


def test_labels_take_nothing_from_who_shares_their_batch(managed: VLLMServer) -> None:
    """Answers that ask for log-probabilities, alone and beside decisions."""

    def top(answer: dict[str, Any]) -> list[dict[str, float]]:
        found: list[dict[str, float]] = answer["logprobs"]["top_logprobs"]
        return found

    alone = top(managed.complete(PROMPTS[1], logprobs=5))
    labels = [{"prompt": [number + 10, *PROMPTS[1]], "labels": [60, 61, 62]} for number in range(40)]
    with ThreadPoolExecutor(2) as executor:
        for _ in range(5):
            deciding = executor.submit(decide, managed, labels, salt=str(time.time()))
            answers = [top(managed.complete(PROMPTS[1], logprobs=5)) for _ in range(3)]
            assert deciding.result().status_code == 200
            for answer in answers:
                assert [set(each) for each in answer] == [set(each) for each in alone]
                for each, before in zip(answer, alone, strict=True):
                    assert each == pytest.approx(before, abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": [1]},
        {"prompt": [1], "labels": [10**6]},
        {"prompt": [1] * MAX_MODEL_LEN, "labels": [1]},
        {"prompt": [1], "continuations": [[2]], "output_starts": [2]},
    ],
)
def test_options_that_do_not_fit_are_refused(managed: VLLMServer, options: dict[str, Any]) -> None:
    assert decide(managed, [options]).status_code == 400
    assert managed.status()["in_flight"] == 0


def test_options_of_a_client_that_left_are_not_computed(managed: VLLMServer) -> None:
    long = [[*range(20, 100), number % 90 + 10, number // 90 + 10] for number in range(4000)]
    asked = [{"prompt": [5], "continuations": long, "output_starts": [1] * len(long)}]
    with (
        httpx.Client(transport=httpx.HTTPTransport(uds=str(managed.uds)), headers=managed.client.headers) as client,
        pytest.raises(httpx.ReadTimeout),
    ):
        client.post(
            "http://engine/v1/cocktail/decide",
            json={"questions": asked},
            headers={"x-cocktail-recipe": managed.resident},
            timeout=2.0,
        )
    eventually(lambda: managed.status()["in_flight"] == 0, "its end", within_s=5.0)
    running = re.findall(r"^vllm:num_requests_running.* (\S+)$", managed.client.get("/metrics").text, re.MULTILINE)
    assert [float(count) for count in running] == [0.0]


def test_vllms_own_decisions_are_shut(server: VLLMServer) -> None:
    response = server.client.post("/v1/decisions", json={}, headers={"x-cocktail-recipe": server.resident})
    assert (response.status_code, response.json()["error"]["code"]) == (501, "not_served")
