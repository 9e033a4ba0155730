"""A pool of adapters behind the gateway, in real vLLM: cocktails are made by scoring alone, and share a batch."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM

from bench.server import RunningServer, running_server
from cocktail_serve.decisions import Reading
from cocktail_serve.examples import parse_examples
from cocktail_serve.scoring.decoder import score_with_transformers, tokenize_examples
from tests.adapters import parameters_of, train_adapter
from tests.command_line import answer, run
from tests.e2e.decisions import PROBABILITY_TOLERANCE, expected, probabilities, question
from tests.e2e.reference import assert_greedy_of, load_reference
from tests.merging import linear
from tests.models import make_decoder, pool_section

pytestmark = pytest.mark.vllm

LOSS_TOLERANCE = 2e-3
"""As of `test_vllm_engine`."""

ROWS = [
    {"input": "what is the capital of france", "output": "paris"},
    {"input": "the film was", "output": "a joy"},
    {"input": "my card", "output": "was stolen"},
]
ADMIN = {"authorization": "Bearer operator"}
PROMPTS = [[1, 40, 41, 42, 43], [1, 100, 90, 80, 70, 60, 50], [1, *range(10, 90)]]


@dataclass(frozen=True)
class Served:
    server: RunningServer
    folders: Mapping[str, Path]
    late: Path

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.server.url, timeout=120)

    def make(self, name: str, **body: Any) -> dict[str, Any]:
        with self.http() as http:
            answer = http.post("/v1/cocktails?wait=60", json={"name": name, "pool": "pico", **body})
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        assert made["status"] == "ready"
        return made

    def reference(self, weights: Mapping[str, float]) -> LlamaForCausalLM:
        """transformers on parameters folded by peft's rule and merged apart, in float64."""
        base = self.folders["base"]
        folders = {**self.folders, "late": self.late}
        states = {name: parameters_of(folders[name], base) for name in weights if name != "base"}
        states["base"] = load_reference(base).state_dict()
        model = LlamaForCausalLM.from_pretrained(base, dtype=load_reference(base).dtype).eval()
        model.load_state_dict(linear({name: states[name] for name in weights}, dict(weights)))
        return model


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("unmerged")
    base = make_decoder(folder / "base")
    train_adapter(base, folder / "red", seed=1)
    train_adapter(base, folder / "green", seed=2, r=8, target_modules=["q_proj", "v_proj", "lm_head"])
    train_adapter(base, folder / "roots" / "late", seed=3, r=2, target_modules=["embed_tokens", "o_proj", "up_proj"])
    folders = {name: folder / name for name in ("base", "red", "green")}
    engine = {"type": "vllm", "dtype": "float32", "args": {"max-num-seqs": 16}}
    config = folder / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "server": {"port": 0, "expert_roots": [str(folder / "roots")]},
                "store": {"cache_dir": str(folder / "cache")},
                "pools": [pool_section("pico", "decoder", folders, engine)],
            }
        )
    )
    with running_server(config, log=folder / "server.log", env={"COCKTAIL_ADMIN_KEY": "operator"}) as server:
        yield Served(server, folders, folder / "roots" / "late")


def completion(model: str, prompt: list[int], **options: Any) -> dict[str, Any]:
    fixed = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    return {"model": model, "prompt": prompt, **fixed, **options}


def test_it_is_served_unmerged_and_says_why(served: Served) -> None:
    with served.http() as http:
        (engine,) = http.get("/admin/engines", headers=ADMIN).json()["data"]
        (pool,) = http.get("/v1/pools").json()["data"]
    assert (engine["mode"], pool["mode"]) == ("unmerged", "unmerged")
    assert engine["mode_reason"] == "all experts of the configuration are LoRA adapters that can be served unmerged"
    assert (engine["phase"], engine["resident"], engine["swaps"]) == (None, None, 0)


def test_losses_are_those_of_transformers_and_a_cocktail_needs_nothing_more(served: Served) -> None:
    made = served.make("films", examples=ROWS, temperature=5.0)
    tokenizer = AutoTokenizer.from_pretrained(served.folders["base"])
    tokenized = tokenize_examples(tokenizer, parse_examples(ROWS, "decoder"), max_tokens=255)
    for weights, loss in [({name: 1.0}, loss) for name, loss in made["losses"].items()] + [
        (made["merging_weights"], made["mixed_loss"])
    ]:
        of_examples = score_with_transformers(served.reference(weights), tokenized)
        assert loss == pytest.approx(sum(of_examples) / len(of_examples), abs=LOSS_TOLERANCE)
    assert made["recipe"]["form"] == "unmerged"


@pytest.mark.parametrize("reading", ["verbatim", "labels"])
def test_decisions_go_by_the_row_of_their_recipe(served: Served, reading: Reading) -> None:
    """At once, so that they share a batch."""
    name = f"decided-{reading}"
    mixtures = {"pico": {"base": 1.0}, "pico/green": {"green": 1.0}, name: {"base": 0.3, "red": 0.3, "green": 0.4}}
    served.make(name, merging_weights=mixtures[name], seed=len(name))
    text, questions = "what is the capital of france", [question(number) for number in range(3)]

    async def ask() -> list[dict[str, Any]]:
        body = {"input": text, "questions": questions, "reading": reading}
        async with httpx.AsyncClient(base_url=served.server.url, timeout=120) as http:
            answers = await asyncio.gather(
                *(http.post("/v1/decisions", json={"model": model, **body}) for model in mixtures)
            )
        return [answer.json() for answer in answers]

    for told, weights in zip(asyncio.run(ask()), mixtures.values(), strict=True):
        wanted = expected(
            served.reference(weights), served.folders["base"], text, questions, reading=reading, form="chat"
        )
        np.testing.assert_allclose(probabilities(told), wanted, rtol=0, atol=PROBABILITY_TOLERANCE)


def test_a_response_goes_by_the_row_of_its_recipe(served: Served) -> None:
    made = served.make("replied", merging_weights={"base": 0.3, "red": 0.7})
    asked = {"temperature": 0.0, "ignore_eos": True, "chat_template": None}
    messages = [{"role": "user", "content": "what is the capital of france"}]
    with served.http() as http:
        texts = {}
        for model in ("pico", "pico/red", made["id"]):
            chat = http.post(
                "/v1/chat/completions", json={"model": model, "messages": messages, "max_tokens": 12, **asked}
            ).json()
            body = {"model": model, "input": messages, "max_output_tokens": 12, **asked}
            whole = http.post("/v1/responses", json=body).json()
            texts[model] = whole["output"][0]["content"][0]["text"]
            assert texts[model] == chat["choices"][0]["message"]["content"]
            assert (whole["model"], whole["usage"]["output_tokens"]) == (model, 12)
            streamed = http.post("/v1/responses", json={**body, "stream": True}).text
            last = json.loads(streamed.split("\n\n")[-2].partition("\ndata: ")[2])["response"]
            assert last["output"][0]["content"][0]["text"] == texts[model]
    assert len(set(texts.values())) == 3


def test_a_recipe_makes_the_same_cocktail_again_and_a_folder(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, which answers as it comes."""
    weights = {"base": 0.25, "red": 0.5, "green": 0.25}
    made = served.make("travels", merging_weights=weights)
    there = ("--server", served.server.url)
    _, exported, _ = run(capsys, "export", "travels", *there)
    (tmp_path / "recipe.json").write_text(exported)
    again = answer(capsys, "create", "again", "--recipe", tmp_path / "recipe.json", *there)
    assert (again["status"], again["recipe"]) == ("ready", made["recipe"])
    asked = ("what is the capital", "--max-tokens", 8, "--temperature", 0, *there)
    streams = [run(capsys, "chat", model, *asked)[1] for model in ("travels", "again")]
    whole = answer(capsys, "chat", "again", *asked)
    assert streams == [whole["choices"][0]["message"]["content"] + "\n"] * 2
    config = served.folders["base"].parent / "config.yaml"
    words = ("mix", config, "--pool", "pico", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "mixed")
    code, _, err = run(capsys, *words)
    assert (code, "unmerged, and a folder holds merged parameters" in err) == (0, True), err
    folder = LlamaForCausalLM.from_pretrained(tmp_path / "mixed").state_dict()
    for name, tensor in served.reference(weights).state_dict().items():
        torch.testing.assert_close(folder[name], tensor, rtol=1e-6, atol=1e-7)


def test_cocktails_experts_and_the_base_answer_at_once_each_as_its_own_model(served: Served) -> None:
    mixtures: dict[str, dict[str, float]] = {"pico": {"base": 1.0}, "pico/red": {"red": 1.0}}
    for number in range(8):
        share = number / 8
        weights = {"base": 0.2, "red": 0.8 * share, "green": 0.8 * (1 - share)}
        mixtures[served.make(f"mixture-{number}", merging_weights=weights)["id"]] = weights

    async def ask_all() -> list[tuple[str, list[int], httpx.Response]]:
        async with httpx.AsyncClient(base_url=served.server.url, timeout=120) as http:
            asked = [(model, prompt) for model in mixtures for prompt in PROMPTS for _ in range(2)]
            answers = await asyncio.gather(
                *(http.post("/v1/completions", json=completion(model, prompt)) for model, prompt in asked)
            )
        return [(*each, response) for each, response in zip(asked, answers, strict=True)]

    for model, prompt, response in asyncio.run(ask_all()):
        assert response.status_code == 200, response.text
        assert response.json()["model"] == model
        assert_greedy_of(served.reference(mixtures[model]), prompt, response.json()["choices"][0])


def test_a_search_asks_all_its_candidates(served: Served) -> None:
    started = time.monotonic()
    made = served.make("searched", examples=ROWS, weighting="search")
    assert time.monotonic() - started < 60
    assert len(made["candidates"]) > 1
    assert all(candidate["loss"] is not None for candidate in made["candidates"])
    with served.http() as http:
        deadline = time.monotonic() + 60
        while (report := http.get("/v1/cocktails/searched/report").json())["report_status"] != "ready":
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert report["held_out_loss"] is not None


def test_what_needs_merged_parameters_is_refused(served: Served) -> None:
    with served.http() as http:
        body = {"name": "ties", "pool": "pico", "examples": ROWS, "method": "ties"}
        answer = http.post("/v1/cocktails", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "method")
        assert "engine.mode: merged" in answer.json()["error"]["message"]
        inline = {**completion("pico", PROMPTS[0]), "cocktail": {"examples": ROWS, "method": "dare_linear"}}
        answer = http.post("/v1/completions", json=inline)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "cocktail.method")
        sent = http.post("/v1/completions", json=completion("pico", PROMPTS[0], vllm_xargs={"cocktail_row": []}))
        assert (sent.status_code, sent.json()["error"]["param"]) == (400, "vllm_xargs")


def test_an_expert_that_is_added_joins_while_others_are_answered(served: Served) -> None:
    with served.http() as http:
        long = completion("pico/red", PROMPTS[0], max_tokens=100, stream=True)
        with http.stream("POST", "/v1/completions", json=long) as streaming:
            lines = streaming.iter_lines()
            next(lines)
            with served.http() as other:
                added = other.post("/admin/pools/pico/experts", json={"name": "late", "path": "late"}, headers=ADMIN)
                assert added.status_code == 201, added.text
                answer = other.post("/v1/completions", json=completion("pico/late", PROMPTS[1]))
                assert answer.status_code == 200, answer.text
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert sum(len(choice["token_ids"]) for e in events[:-1] for choice in json.loads(e)["choices"]) >= 98
        assert_greedy_of(served.reference({"late": 1.0}), PROMPTS[1], answer.json()["choices"][0])
        weights = {"base": 0.3, "late": 0.5, "red": 0.2}
        made = served.make("late-mixture", merging_weights=weights)
        answer = http.post("/v1/completions", json=completion(made["id"], PROMPTS[2]))
        assert_greedy_of(served.reference(weights), PROMPTS[2], answer.json()["choices"][0])
        assert http.get("/admin/engines/pico", headers=ADMIN).json()["restarts"] == 0
