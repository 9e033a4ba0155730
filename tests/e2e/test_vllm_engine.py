"""The engine over real vLLM: it answers and scores as transformers does, and comes back whole from every death."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cocktail_serve.checkpoints.opening import open_expert, open_pool
from cocktail_serve.config import PoolConfig, VLLMEngineConfig
from cocktail_serve.engines.vllm.build import build_vllm_engine
from cocktail_serve.engines.vllm.engine import VLLMEngine
from cocktail_serve.errors import ContextLengthError, EngineError, InvalidRequestError, ModelChangedError
from cocktail_serve.examples import parse_examples
from cocktail_serve.recipe import Recipe, make_recipe
from cocktail_serve.scoring.decoder import score_with_transformers, tokenize_examples
from tests.models import make_decoder, make_decoder_pool
from tests.processes import is_alive, survivors

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

MAX_MODEL_LEN = 16384
"""Longer than the pico models' own, so that a stream lasts for many seconds; rotary positions go on."""

START_S = 240.0
LOSS_TOLERANCE = 2e-3
"""float32 kernels of vLLM and transformers add in another order; logits of these models reach tens."""

COMPLETIONS = "/v1/completions"
PROMPT = "what is the capital of france"

TORN_MIX = """
    # every process of the server runs this at its start: a mix breaks after some tensors while the fault file is there
    import pathlib
    from cocktail_serve.checkpoints.mixture import Mixture

    whole = Mixture.params

    def torn(mixture, **options):
        for number, item in enumerate(whole(mixture, **options)):
            if number == 5 and pathlib.Path({fault!r}).exists():
                raise OSError("the disk has gone")
            yield item

    Mixture.params = torn
"""


@dataclass
class Running:
    engine: VLLMEngine
    folders: dict[str, Path]
    fault: Path

    def recipe(self, **merging_weights: float) -> Recipe:
        return make_recipe(self.engine.pool, merging_weights, dtype="float32")

    def processes(self) -> dict[str, psutil.Process]:
        """The server's processes that can die, by role."""
        assert self.engine._supervisor.server is not None
        leader = psutil.Process(self.engine._supervisor.server.pid)
        titled = {" ".join(child.cmdline()): child for child in leader.children(recursive=True)}
        roles = {"api_server": leader}
        for role in ("EngineCore", "Worker"):
            (roles[role],) = (child for title, child in titled.items() if f"VLLM::{role}" in title)
        return roles

    def everything(self) -> list[psutil.Process]:
        assert self.engine._supervisor.server is not None
        return family_of(self.engine._supervisor.server.pid)

    async def complete(self, recipe: Recipe, *, max_tokens: int = 12) -> list[int]:
        body = completion(max_tokens=max_tokens)
        async with self.engine.forward(recipe, COMPLETIONS, body, tenant="t") as answer:
            assert answer.body is not None
            token_ids: list[int] = json.loads(answer.body)["choices"][0]["token_ids"]
            return token_ids

    async def stream(
        self, recipe: Recipe, *, max_tokens: int, n: int = 1, on_first: Callable[[], object] = lambda: None
    ) -> list[int]:
        """Token ids of all `n` answers; `on_first` is called at the first event, before another is read."""
        token_ids: list[int] = []
        is_first = True
        # vLLM refuses several greedy answers to one prompt, since they would be the same
        body = completion(max_tokens=max_tokens, n=n, stream=True, temperature=0.0 if n == 1 else 1.0)
        async with self.engine.forward(recipe, COMPLETIONS, body, tenant="t") as answer:
            assert answer.events is not None, answer.body
            async for payload in answer.events:
                for choice in json.loads(payload)["choices"]:
                    token_ids += choice.get("token_ids") or []
                if is_first:
                    on_first()
                is_first = False
        return token_ids


def family_of(pid: int) -> list[psutil.Process]:
    leader = psutil.Process(pid)
    return [leader, *leader.children(recursive=True)]


def completion(*, max_tokens: int, **options: Any) -> dict[str, Any]:
    fixed = {"prompt": PROMPT, "temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
    return {**fixed, "max_tokens": max_tokens, **options}


async def eventually(condition: Callable[[], Awaitable[bool]], *, deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while not await condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.1)


async def is_ready(engine: VLLMEngine) -> bool:
    return (await engine.snapshot(deadline_s=5)).state == "ready"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("engine")
    folders = make_decoder_pool(folder / "pool", ("red", "green"))
    fault, patches = folder / "torn", folder / "patches"
    patches.mkdir()
    (patches / "sitecustomize.py").write_text(textwrap.dedent(TORN_MIX).format(fault=str(fault)))
    config = PoolConfig.model_validate(
        {
            "id": "pico",
            "kind": "decoder",
            "base": str(folders["base"]),
            "experts": {name: str(path) for name, path in folders.items() if name != "base"},
            "engine": {
                "type": "vllm",
                "max_model_len": MAX_MODEL_LEN,
                "slice_s": 0.2,
                "queue_timeout_s": START_S,
                "args": {"max-num-seqs": 8, "hf-overrides": {"max_position_embeddings": MAX_MODEL_LEN}},
                "env": {"PYTHONPATH": str(patches)},
            },
        }
    )
    pool = open_pool(config, cache_dir=folder / "cache")
    assert isinstance(config.engine, VLLMEngineConfig)
    engine = build_vllm_engine(pool, config.engine, run_dir=folder / "run")
    await engine.start()
    try:
        await eventually(lambda: is_ready(engine), deadline_s=START_S)
        yield Running(engine, folders, fault)
    finally:
        server = engine._supervisor.server
        left = [] if server is None else family_of(server.pid)
        await engine.stop()
        assert not any(is_alive(process) for process in left)


def reference_greedy(folder: Path, answer: list[int]) -> list[int]:
    """What transformers would say at each position of an answer, given what stands before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist()


async def test_models_answer_as_in_transformers(running: Running) -> None:
    answers = await asyncio.gather(*(running.complete(running.recipe(**{name: 1.0})) for name in running.folders))
    assert len({tuple(answer) for answer in answers}) == len(answers)
    for folder, answer in zip(running.folders.values(), answers, strict=True):
        assert answer == reference_greedy(folder, answer)


async def test_a_model_that_is_written_over_is_refused_in_the_engines_own_words(running: Running) -> None:
    file = running.folders["red"] / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes((running.folders["green"] / "model.safetensors").read_bytes())
    try:
        with pytest.raises(ModelChangedError, match="'red' are not what they were"):
            await running.complete(running.recipe(base=0.45, red=0.55))
        assert await running.complete(running.recipe(base=1.0))
    finally:
        file.write_bytes(whole)
    assert await running.complete(running.recipe(base=0.45, red=0.55))


async def test_a_model_added_while_it_runs_answers_as_in_transformers(running: Running, tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "blue", perturbation_seed=9)
    before = running.engine.pool
    assert running.engine._supervisor.server is not None
    pid = running.engine._supervisor.server.pid
    blue = await asyncio.to_thread(open_expert, before, "blue", folder, cache_dir=tmp_path / "cache")
    await running.engine.change_pool(replace(before, experts={**before.experts, "blue": blue}))
    answer = await running.complete(running.recipe(blue=1.0))
    assert answer == reference_greedy(folder, answer)
    await running.complete(running.recipe(base=0.5, blue=0.5))
    await running.engine.change_pool(before)
    assert await running.complete(running.recipe(red=1.0)) != answer
    assert running.engine._supervisor.server.pid == pid, "it was not started again for that"


async def test_losses_agree_with_transformers(running: Running) -> None:
    rows = [
        {"input": "what is the capital of france", "output": "paris"},
        {"messages": [{"role": "user", "content": "the film was"}, {"role": "assistant", "content": "a joy " * 30}]},
        {"input": "my card", "output": "was stolen"},
    ]
    examples = parse_examples(rows, "decoder")
    scored = await asyncio.gather(
        *(running.engine.score(running.recipe(**{name: 1.0}), examples) for name in running.folders)
    )
    for folder, of_model in zip(running.folders.values(), scored, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenized = tokenize_examples(AutoTokenizer.from_pretrained(folder), examples, max_tokens=MAX_MODEL_LEN - 1)
        assert of_model.engine_time.scoring_s > 0
        assert of_model.losses == pytest.approx(score_with_transformers(model, tokenized), abs=LOSS_TOLERANCE)


async def test_the_longest_example_allowed_can_be_scored(running: Running) -> None:
    def example(length: int) -> Any:
        return parse_examples([{"input": "a", "output": "z" * length}], "decoder")

    tokenizer = AutoTokenizer.from_pretrained(running.folders["base"])
    used = len(tokenize_examples(tokenizer, example(100), max_tokens=MAX_MODEL_LEN)[0].token_ids) - 100
    longest = MAX_MODEL_LEN - 1 - used
    (loss,) = (await running.engine.score(running.recipe(base=1.0), example(longest))).losses
    assert loss > 0
    with pytest.raises(ContextLengthError, match="row 1"):
        await running.engine.check_examples(example(longest + 1))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_request_is_refused_by_vllm(running: Running, stream: bool) -> None:
    async def refusal(**fields: Any) -> InvalidRequestError:
        body = completion(max_tokens=4, stream=stream) | fields
        with pytest.raises(InvalidRequestError) as caught:
            async with running.engine.forward(running.recipe(base=1.0), COMPLETIONS, body, tenant="t"):
                pytest.fail("it was answered")
        return caught.value

    too_many = await refusal(max_tokens=10 * MAX_MODEL_LEN)
    assert (type(too_many), too_many.param) == (InvalidRequestError, "max_tokens")
    too_long = await refusal(prompt="a b c d " * MAX_MODEL_LEN)
    assert (type(too_long), too_long.code) == (ContextLengthError, "context_length_exceeded")


@pytest.mark.parametrize("role", ["api_server", "EngineCore", "Worker"])
async def test_whichever_process_dies_the_engine_comes_back(running: Running, role: str) -> None:
    recipe = running.recipe(base=0.5, red=0.5)
    before = await running.complete(recipe)
    processes, num_restarts = running.everything(), running.engine.stats.num_restarts
    # looked up before the stream, and killed by number: reading /proc of a busy process can take seconds
    victim = running.processes()[role].pid
    waiting: list[asyncio.Task[list[int]]] = []

    def kill() -> None:
        waiting.append(asyncio.create_task(running.complete(running.recipe(green=1.0))))
        os.kill(victim, signal.SIGKILL)

    # many answers at once, so that there is plenty left to generate however late this process comes to read
    with pytest.raises(EngineError):
        await asyncio.wait_for(running.stream(recipe, max_tokens=MAX_MODEL_LEN - 50, n=8, on_first=kill), timeout=60)
    await eventually(lambda: _is_not(running.engine), deadline_s=20)
    assert await survivors(processes, timeout_s=30) == [], "orphans"
    await eventually(lambda: is_ready(running.engine), deadline_s=START_S)
    assert running.engine.stats.num_restarts == num_restarts + 1
    # whoever waited got its own recipe's answer, and so does the next
    answer = await waiting[0]
    assert answer == reference_greedy(running.folders["green"], answer)
    assert await running.complete(recipe) == before


async def test_a_torn_mix_ends_in_a_restart_and_never_in_garbage(running: Running) -> None:
    recipe, num_restarts = running.recipe(base=0.3, red=0.7), running.engine.stats.num_restarts
    await running.complete(running.recipe(base=1.0))
    processes = running.everything()
    running.fault.touch()
    torn = asyncio.create_task(running.complete(recipe))
    await eventually(lambda: _is_not(running.engine), deadline_s=20)
    running.fault.unlink()
    assert await survivors(processes, timeout_s=30) == [], "a poisoned engine lives on"
    answer = await torn
    assert running.engine.stats.num_restarts == num_restarts + 1
    assert answer == await running.complete(recipe)
    red = await running.complete(running.recipe(red=1.0))
    assert red == reference_greedy(running.folders["red"], red)


async def _is_not(engine: VLLMEngine) -> bool:
    return not await is_ready(engine)


async def test_a_frozen_engine_is_not_ready(running: Running) -> None:
    worker = running.processes()["Worker"]
    worker.suspend()
    try:
        snapshot = await running.engine.snapshot(deadline_s=1)
        assert snapshot.state != "ready"
        assert "did not answer" in snapshot.detail["reason"]
    finally:
        worker.resume()
    await eventually(lambda: is_ready(running.engine), deadline_s=20)


async def test_secrets_stay_out_of_the_command_line(running: Running) -> None:
    assert running.engine._supervisor.server is not None
    leader = psutil.Process(running.engine._supervisor.server.pid)
    key = leader.environ()["VLLM_API_KEY"]
    assert len(key) == 64
    assert not any(key in argument for argument in leader.cmdline())
    socket = Path(leader.cmdline()[leader.cmdline().index("--uds") + 1])
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert os.stat(socket.parent).st_uid == os.getuid()
