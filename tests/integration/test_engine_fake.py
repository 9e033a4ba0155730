"""The engine as the gateway sees it, over a real process that fakes vLLM: turns, scoring, streams, loss and return."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cocktail_serve.config import FakeEngineConfig
from cocktail_serve.engines.base import Background, GenerationEngine
from cocktail_serve.engines.engine_time import EngineTimeTotal
from cocktail_serve.engines.vllm.build import build_vllm_engine
from cocktail_serve.engines.vllm.engine import VLLMEngine
from cocktail_serve.engines.vllm.fake import Fault, fake_loss, fake_text
from cocktail_serve.engines.vllm.server import EngineServer
from cocktail_serve.errors import (
    ConfigError,
    ContextLengthError,
    DrainedError,
    EngineError,
    InvalidMixError,
    InvalidRequestError,
    ModelNotReadyError,
    QueueTimeoutError,
)
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe, make_recipe, one_hot
from cocktail_serve.scoring.decoder import tokenize_examples
from tests.fakes import make_fake_pool
from tests.models import make_decoder_tokenizer
from tests.processes import is_alive

CHAT = "/v1/chat/completions"
DEADLINE_S = 30.0


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not await condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


async def is_ready(engine: VLLMEngine) -> bool:
    return (await engine.snapshot(deadline_s=5)).state == "ready"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return make_fake_pool(tmp_path_factory.mktemp("pool"))


@contextlib.asynccontextmanager
async def running(pool: Pool, tmp_path: Path, **config: Any) -> AsyncIterator[VLLMEngine]:
    args = {"faults": str(tmp_path / "faults"), **config.pop("args", {})}
    defaults = {"slice_s": 0.05, "drain_s": 5, "queue_timeout_s": 20, "max_model_len": 256}
    settings = FakeEngineConfig.model_validate({**defaults, **config, "args": args})
    engine = build_vllm_engine(pool, settings, run_dir=tmp_path / "run")
    await engine.start()
    try:
        await eventually(lambda: is_ready(engine))
        yield engine
    finally:
        await engine.stop()


def strike(faults: Path, fault: Fault) -> None:
    (faults / fault).touch()


def mixture(pool: Pool, share: float) -> Recipe:
    return make_recipe(pool, {"base": share, "nq": 1 - share}, dtype="float32")


def question(text: str, *, stream: bool = False, max_tokens: int = 8) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "stream": stream, "max_tokens": max_tokens}


async def ask(engine: GenerationEngine, recipe: Recipe, text: str, *, max_tokens: int = 8) -> str:
    async with engine.forward(recipe, CHAT, question(text, max_tokens=max_tokens), tenant="t") as answer:
        assert answer.body is not None
        content: str = json.loads(answer.body)["choices"][0]["message"]["content"]
        return content


async def stream(
    engine: GenerationEngine,
    recipe: Recipe,
    text: str,
    *,
    max_tokens: int = 8,
    first: asyncio.Event | None = None,
) -> str:
    content = ""
    async with engine.forward(recipe, CHAT, question(text, stream=True, max_tokens=max_tokens), tenant="t") as answer:
        assert answer.events is not None
        async for payload in answer.events:
            for choice in json.loads(payload)["choices"]:
                content += choice["delta"].get("content", "")
            if first is not None:
                first.set()
    return content


def expected(recipe: Recipe, text: str, *, max_tokens: int = 8) -> str:
    return fake_text(recipe.digest, f"user: {text}", num_tokens=max_tokens)


def examples(num: int = 3) -> ExampleSet:
    return parse_examples([{"input": f"what is {i}", "output": f"it is {i}"} for i in range(num)], "decoder")


def processes_of(engine: VLLMEngine) -> list[psutil.Process]:
    assert engine._supervisor.server is not None
    leader = psutil.Process(engine._supervisor.server.pid)
    return [leader, *leader.children(recursive=True)]


async def test_it_answers_under_the_recipe_that_was_asked_for(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path) as engine:
        assert isinstance(engine, GenerationEngine)
        recipe = mixture(pool, 0.5)
        assert await ask(engine, recipe, "hello") == expected(recipe, "hello")
        assert await stream(engine, recipe, "hello") == expected(recipe, "hello")
        snapshot = await engine.snapshot(deadline_s=5)
        assert (snapshot.state, snapshot.resident, snapshot.num_queued) == ("ready", recipe.digest, 0)


async def test_a_snapshot_can_be_pickled_and_grows_no_more(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path, args={"token-delay-ms": 20}) as engine:
        resident, waiting = mixture(pool, 0.5), mixture(pool, 0.25)
        first = asyncio.Event()
        streamed = asyncio.create_task(stream(engine, resident, "hello", first=first))
        await first.wait()
        asked = asyncio.create_task(ask(engine, waiting, "hello"))
        await asyncio.sleep(0)
        seen = await engine.snapshot(deadline_s=5)
        assert (seen.state, seen.resident, seen.num_queued) == ("ready", resident.digest, 1)
        assert (seen.scheduler.num_in_flight, seen.scheduler.resident) == (1, resident.digest)
        assert [(queue.recipe_digest, queue.num_waiting) for queue in seen.scheduler.queues] == [(waiting.digest, 1)]
        assert (seen.counters.wait.count, seen.counters.swap.count) == (1, 1)
        kept = pickle.dumps(seen)
        await asyncio.gather(streamed, asked)
        assert engine.stats.wait.count == 2
        assert pickle.loads(kept) == seen


async def test_what_its_server_counts(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path, args={"token-delay-ms": "20"}) as engine:
        begun = asyncio.Event()
        open_one = asyncio.create_task(stream(engine, mixture(pool, 0.5), "hello", max_tokens=50, first=begun))
        await begun.wait()
        assert (await engine.server_metrics(deadline_s=5))[0]["vllm:num_requests_running"] == 1
        await open_one

        async def is_idle() -> bool:  # it counts a stream as over a moment after its last event
            return (await engine.server_metrics(deadline_s=5))[0]["vllm:num_requests_running"] == 0

        await eventually(is_idle)
    assert await engine.server_metrics(deadline_s=5) == [{}]


async def test_concurrent_requests_for_many_recipes_never_cross(pool: Pool, tmp_path: Path, faults: Path) -> None:
    recipes = [mixture(pool, share) for share in (0.1, 0.2, 0.3, 0.4, 0.5)]
    async with running(pool, tmp_path, args={"token-delay-ms": 1, "mix-ms": 2}) as engine:

        async def client(number: int) -> None:
            for turn in range(6):
                recipe, text = recipes[(number + turn) % len(recipes)], f"{number} {turn}"
                answer = await (stream if turn % 2 else ask)(engine, recipe, text)
                assert answer == expected(recipe, text)

        await asyncio.gather(*(client(number) for number in range(10)))
        assert engine.stats.swap.count >= len(recipes)
        assert engine.stats.wait.count == 60
        assert engine._turns.num_in_flight == 0


async def test_scores_are_those_of_the_recipe(pool: Pool, tmp_path: Path, faults: Path) -> None:
    tokenizer = make_decoder_tokenizer()
    async with running(pool, tmp_path) as engine:
        given = examples()
        recipes = [one_hot(pool, name, dtype="float32") for name in ("base", "ag-news", "nq")]
        losses = await asyncio.gather(*(engine.score(recipe, given) for recipe in recipes))
        tokenized = tokenize_examples(tokenizer, given, max_tokens=255)
        for recipe, of_recipe in zip(recipes, losses, strict=True):
            assert of_recipe.losses == [fake_loss(recipe.digest, e.token_ids, e.output_start) for e in tokenized]


async def test_scoring_gives_way_and_loses_nothing(
    pool: Pool, tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request per example, so that a job is interrupted by traffic again and again."""
    monkeypatch.setattr("cocktail_serve.engines.vllm.scorer.SCORE_TOKENS", 1)
    async with running(pool, tmp_path, args={"score-ms": 20, "token-delay-ms": 2}) as engine:
        given = examples(20)
        expert, cocktail = one_hot(pool, "nq", dtype="float32"), mixture(pool, 0.5)
        job = asyncio.create_task(engine.score(expert, given))
        num_answers = 0
        while not job.done():
            assert await ask(engine, cocktail, "hello") == expected(cocktail, "hello")
            num_answers += 1
        tokenized = tokenize_examples(make_decoder_tokenizer(), given, max_tokens=255)
        assert job.result().losses == [fake_loss(expert.digest, e.token_ids, e.output_start) for e in tokenized]
        assert num_answers > 2


async def test_scoring_tells_how_long_it_held_the_engine_and_what_was_mixed_for_it(
    pool: Pool, tmp_path: Path, faults: Path
) -> None:
    async with running(pool, tmp_path, args={"score-ms": 100, "mix-ms": 50}) as engine:
        scored = await engine.score(mixture(pool, 0.5), examples())
        assert 0.09 <= scored.engine_time.scoring_s < 5
        assert 0.04 <= scored.engine_time.mixing_s < 5
        again = await engine.score(mixture(pool, 0.5), examples())
        assert 0.09 <= again.engine_time.scoring_s < 5
        assert again.engine_time.mixing_s == 0.0
        mixed = await engine.mix_ahead(mixture(pool, 0.25))
        assert mixed.engine_time.scoring_s == 0.0
        assert 0.04 <= mixed.engine_time.mixing_s < 5


async def test_scoring_that_fails_or_is_cancelled_has_held_the_engine_too(
    pool: Pool, tmp_path: Path, faults: Path
) -> None:
    async with running(pool, tmp_path, args={"score-ms": 200, "mix-ms": 50}) as engine:
        total = EngineTimeTotal()
        (faults / "score_error").write_text("500 no memory")
        with pytest.raises(EngineError, match="scoring failed with status 500: no memory"):
            await total.of(engine.score(mixture(pool, 0.5), examples()))
        assert 0.19 <= total.time.scoring_s < 5
        assert 0.04 <= total.time.mixing_s < 5
        total = EngineTimeTotal()
        job = asyncio.create_task(total.of(engine.score(mixture(pool, 0.25), examples())))

        async def is_scoring() -> bool:
            return engine._turns.num_in_flight == 1

        await eventually(is_scoring)
        await asyncio.sleep(0.1)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert 0.09 <= total.time.scoring_s < 5
        assert 0.04 <= total.time.mixing_s < 5


async def test_materialise_makes_the_next_swap_a_copy(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path) as engine:
        recipe = mixture(pool, 0.5)
        await engine.mix_ahead(recipe)
        assert recipe.digest in (await engine.snapshot(deadline_s=5)).detail["cached"]
        await ask(engine, one_hot(pool, "base", dtype="float32"), "hello")
        await ask(engine, recipe, "hello")
        assert engine.stats.num_swaps_by_source["cache"] == 1
        engine.forget(recipe.digest)

        async def is_forgotten() -> bool:
            return recipe.digest not in (await engine.snapshot(deadline_s=5)).detail["cached"]

        await eventually(is_forgotten)


async def test_examples_that_do_not_fit_are_refused_beforehand(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path) as engine:
        rows = [{"input": "a", "output": "b"}, {"input": "a", "output": "b " * 500}]
        with pytest.raises(ContextLengthError, match=r"row 2.*at most 255"):
            await engine.check_examples(parse_examples(rows, "decoder"))


async def test_bad_requests_come_back_as_the_engine_answers_them(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path) as engine:
        with pytest.raises(InvalidRequestError, match="messages"):
            async with engine.forward(mixture(pool, 0.5), CHAT, {"messages": []}, tenant="t"):
                pytest.fail("it was answered")
        assert engine._turns.num_in_flight == 0


@pytest.mark.parametrize(
    "fields", [{"n": 2**63}, {"n": -1}, {"n": "x"}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"messages": [[]]}]
)
async def test_numbers_that_no_engine_serves_are_refused(pool: Pool, tmp_path: Path, fields: dict[str, Any]) -> None:
    async with running(pool, tmp_path) as engine:
        body = {"messages": [{"role": "user", "content": "a"}]} | fields
        with pytest.raises(InvalidRequestError, match=next(iter(fields))):
            async with engine.forward(mixture(pool, 0.5), CHAT, body, tenant="t"):
                pytest.fail("it was answered")


@pytest.mark.parametrize("value", [2**70, "\ud800"])
async def test_what_is_no_json_is_the_clients_fault(pool: Pool, tmp_path: Path, value: Any) -> None:
    engine = build_vllm_engine(pool, FakeEngineConfig(), run_dir=tmp_path)
    for body in ({"seed": value}, {"cache_salt": value}):
        with pytest.raises(InvalidRequestError, match="passed on as JSON"):
            async with engine.forward(mixture(pool, 0.5), CHAT, body, tenant="t"):
                pytest.fail("it was sent")


async def test_a_stream_over_its_time_is_ended_when_others_wait(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path, drain_s=0.2, args={"token-delay-ms": 20}) as engine:
        first = asyncio.Event()
        long = asyncio.create_task(stream(engine, mixture(pool, 0.1), "hello", max_tokens=200, first=first))
        await first.wait()
        other = mixture(pool, 0.9)
        assert await ask(engine, other, "hello", max_tokens=2) == expected(other, "hello", max_tokens=2)
        with pytest.raises(DrainedError, match="drain_s"):
            await long
        assert engine.stats.num_drained == 1


async def test_a_stream_that_nobody_reads_does_not_hold_up_the_others(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path, drain_s=0.2, args={"token-delay-ms": 20}) as engine:
        body = question("hello", stream=True, max_tokens=200)
        async with engine.forward(mixture(pool, 0.1), CHAT, body, tenant="t") as answer:
            other = mixture(pool, 0.9)
            assert await ask(engine, other, "hello", max_tokens=2) == expected(other, "hello", max_tokens=2)
            assert answer.events is not None
            with pytest.raises(DrainedError):
                await anext(answer.events)


async def test_a_client_that_leaves_frees_its_turn(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path, drain_s=30, args={"token-delay-ms": 50}) as engine:
        first = asyncio.Event()
        long = asyncio.create_task(stream(engine, mixture(pool, 0.1), "hello", max_tokens=200, first=first))
        await first.wait()
        long.cancel()
        other = mixture(pool, 0.9)
        started = time.monotonic()
        await ask(engine, other, "hello", max_tokens=1)
        assert time.monotonic() - started < 5
        assert long.cancelled()


async def test_a_turn_that_does_not_come_in_time(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path, queue_timeout_s=0.3, args={"token-delay-ms": 20}) as engine:
        first = asyncio.Event()
        long = asyncio.create_task(stream(engine, mixture(pool, 0.1), "hello", max_tokens=60, first=first))
        await first.wait()
        with pytest.raises(QueueTimeoutError, match="queue_timeout_s"):
            await ask(engine, mixture(pool, 0.9), "hello")
        assert len((await long).split()) == 60


async def test_work_in_the_background_is_sent_away_where_it_would_wait_for_long(
    pool: Pool, tmp_path: Path, faults: Path
) -> None:
    """What waits holds a place that a line of a batch for another engine could have."""
    body, background = question("hello", max_tokens=1), Background(is_broken_off=True)

    async def ask_in_background() -> None:
        async with (
            asyncio.timeout(10),
            engine.forward(mixture(pool, 0.1), CHAT, body, tenant="t", background=background),
        ):
            pass

    async with running(pool, tmp_path, queue_timeout_s=0.3) as engine:
        await ask_in_background()
        engine.drain(True)
        outcomes = await asyncio.gather(*(ask_in_background() for _ in range(3)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ModelNotReadyError] * 3
        assert engine.stats.num_queue_timeouts == 0, "nobody waited for them"
        engine.drain(False)
        await ask_in_background()


@pytest.mark.parametrize("fault", ["stream_error", "stream_cut"])
async def test_a_stream_without_its_end_is_a_failure(pool: Pool, tmp_path: Path, faults: Path, fault: Fault) -> None:
    async with running(pool, tmp_path) as engine:
        strike(faults, fault)
        with pytest.raises(EngineError):
            await stream(engine, mixture(pool, 0.1), "hello")
        assert await stream(engine, mixture(pool, 0.1), "hello") == expected(mixture(pool, 0.1), "hello")


async def test_a_refused_recipe_disturbs_nobody(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path) as engine:
        kept = mixture(pool, 0.1)
        await ask(engine, kept, "hello")
        strike(faults, "mix_invalid")
        with pytest.raises(InvalidMixError):
            await engine.mix_ahead(mixture(pool, 0.9))
        assert (await engine.snapshot(deadline_s=5)).resident == kept.digest
        assert engine.stats.num_restarts == 0


async def test_a_busy_engine_is_asked_again(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path) as engine:
        strike(faults, "mix_busy")
        recipe = mixture(pool, 0.9)
        assert await ask(engine, recipe, "hello") == expected(recipe, "hello")
        assert engine.stats.num_restarts == 0


@pytest.mark.parametrize("fault", ["mix_failed", "mix_hang"])
async def test_a_torn_mix_ends_the_processes(
    pool: Pool, tmp_path: Path, faults: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocktail_serve.engines.vllm.server_mixer.ABORT_S", 0.2)
    async with running(pool, tmp_path, swap_timeout_s=0.3) as engine:
        before = processes_of(engine)
        strike(faults, fault)
        recipe = mixture(pool, 0.9)
        # the request waits for the engine to come back, and gets its own recipe
        assert await ask(engine, recipe, "hello") == expected(recipe, "hello")
        assert not any(is_alive(process) for process in before)
        assert engine.stats.num_restarts == 1


async def test_a_recipe_that_always_loses_the_engine_is_given_up(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path) as engine:
        job = asyncio.create_task(engine.mix_ahead(mixture(pool, 0.9)))
        while not job.done():
            strike(faults, "mix_failed")
            await asyncio.wait({job}, timeout=0.05)
        with pytest.raises(EngineError, match="lost 2 times in a row"):
            await job
        (faults / "mix_failed").unlink(missing_ok=True)
        other = mixture(pool, 0.1)
        assert await ask(engine, other, "hello") == expected(other, "hello")


async def test_a_killed_server_comes_back(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path, args={"token-delay-ms": 20}) as engine:
        recipe, first = mixture(pool, 0.9), asyncio.Event()
        before = processes_of(engine)
        long = asyncio.create_task(stream(engine, recipe, "hello", max_tokens=200, first=first))
        await first.wait()
        waiting = asyncio.create_task(ask(engine, mixture(pool, 0.2), "hello"))
        os.kill(before[0].pid, signal.SIGKILL)
        with pytest.raises(EngineError):
            await long
        assert not await is_ready(engine)
        # who waited was not in flight, and waits on for the engine's return
        assert await waiting == expected(mixture(pool, 0.2), "hello")
        assert await ask(engine, recipe, "hello") == expected(recipe, "hello")
        assert not any(is_alive(process) for process in before)


async def test_one_that_is_stopped_while_a_lost_server_is_ended_waits_for_that_end(
    pool: Pool, tmp_path: Path, faults: Path
) -> None:
    async with running(pool, tmp_path) as engine:
        server = engine._supervisor.server
        assert server is not None
        group = server._group
        assert group is not None
        engine._supervisor.lose("it is not what we think it is")
        await eventually(lambda: has_no_connections(server))
        assert group.returncode is None, "too late to see it"
        await engine.stop()
        assert group.returncode is not None


async def has_no_connections(server: EngineServer) -> bool:
    """Its end has begun."""
    return server._connections is None


async def test_an_engine_that_dies_often_is_still_waited_for(
    pool: Pool, tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocktail_serve.engines.start_failures.BACKOFF_S", (0.01,))
    async with running(pool, tmp_path) as engine:
        recipe, other = mixture(pool, 0.9), mixture(pool, 0.1)
        for _ in range(4):
            await eventually(lambda: is_ready(engine))
            strike(faults, "die")
            with pytest.raises(EngineError):
                await ask(engine, recipe, "hello")
            assert await ask(engine, other, "hello") == expected(other, "hello")
        assert engine.stats.num_restarts == 4


async def test_a_hung_engine_is_not_ready(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with running(pool, tmp_path) as engine:
        strike(faults, "hang")
        snapshot = await engine.snapshot(deadline_s=0.2)
        assert snapshot.state == "restarting"
        assert "did not answer" in snapshot.detail["reason"]


async def test_requests_during_a_start_wait_for_it(pool: Pool, tmp_path: Path) -> None:
    settings = FakeEngineConfig.model_validate({"queue_timeout_s": 20, "max_model_len": 256})
    engine = build_vllm_engine(pool, settings, run_dir=tmp_path / "run")
    await engine.start()
    try:
        recipe = mixture(pool, 0.5)
        assert await ask(engine, recipe, "hello") == expected(recipe, "hello")
    finally:
        await engine.stop()
        await engine.stop()
    assert (await engine.snapshot(deadline_s=1)).state == "stopped"
    with pytest.raises(ModelNotReadyError):
        await ask(engine, recipe, "hello")


async def test_an_engine_whose_arguments_are_refused_is_given_up(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = FakeEngineConfig.model_validate({"args": {"no-such-flag": "1"}, "queue_timeout_s": 30})
    engine = build_vllm_engine(pool, settings, run_dir=tmp_path / "run")
    await engine.start()
    try:
        reason = "unrecognized arguments: --no-such-flag 1; mend it and start the server again"
        for _ in range(2):  # who waited when it was given up, and who comes later
            with pytest.raises(EngineError, match=reason):
                await ask(engine, mixture(pool, 0.5), "hello")
        snapshot = await engine.snapshot(deadline_s=1)
        assert snapshot.state == "failed"
        assert snapshot.detail["reason"].startswith(reason)
        # the operator's log says more than what anybody may ask
        assert "usage:" not in snapshot.detail["reason"]
        assert "usage: python -m cocktail_serve.engines.vllm.fake" in caplog.text
        assert engine.stats.num_restarts == 0
    finally:
        await engine.stop()
    assert (await engine.snapshot(deadline_s=1)).state == "stopped"


async def test_what_a_server_does_not_heed_is_in_the_log_of_its_start(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(pool, tmp_path, args={"warning": "vLLM reads no variable 'VLLM_X'"}):
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [f"{pool.id}: vLLM reads no variable 'VLLM_X'"]


@pytest.mark.parametrize("raised", ["ValueError('of the model')", "OSError('of the disk')"])
async def test_a_server_that_ends_the_same_way_at_every_start(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: str
) -> None:
    """What lies in the model ends the engine at the third time; the machine may be well again at any other."""
    monkeypatch.setattr("cocktail_serve.engines.start_failures.BACKOFF_S", (0.01,))
    engine = build_vllm_engine(pool, FakeEngineConfig.model_validate({"queue_timeout_s": 30}), run_dir=tmp_path / "run")
    command, env = engine._launcher.command_and_env(tmp_path / "socket", "key")
    broken = [command[0], "-c", f"raise {raised}"]
    monkeypatch.setattr(engine._launcher, "command_and_env", lambda socket, key: (broken, env))
    await engine.start()
    try:
        is_for_good = raised.startswith("ValueError")
        expected_error = EngineError if is_for_good else ModelNotReadyError
        message = r"cannot start: ValueError: of the model; mend it" if is_for_good else "keeps failing"
        with pytest.raises(expected_error, match=message):
            await ask(engine, mixture(pool, 0.5), "hello")
        if is_for_good:
            assert engine.stats.num_restarts == 2
            assert (await engine.snapshot(deadline_s=1)).state == "failed"
            return
        # the disk is back, and nobody had to do anything
        monkeypatch.setattr(
            engine._launcher, "command_and_env", type(engine._launcher).command_and_env.__get__(engine._launcher)
        )
        await eventually(lambda: is_ready(engine))
        assert await ask(engine, mixture(pool, 0.5), "hello") == expected(mixture(pool, 0.5), "hello")
    finally:
        await engine.stop()


def test_settings_of_ours_cannot_be_overridden(pool: Pool, tmp_path: Path) -> None:
    settings = FakeEngineConfig.model_validate({"env": {"VLLM_API_KEY": "mine"}})
    with pytest.raises(ConfigError, match="VLLM_API_KEY"):
        build_vllm_engine(pool, settings, run_dir=tmp_path)


async def test_messages_are_scored_through_the_pools_template(pool: Pool, tmp_path: Path, faults: Path) -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}")
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "paris"}]
    given = parse_examples([{"messages": turns}], "decoder")
    tokenizer = make_decoder_tokenizer()
    ids = tokenizer("[user] what\n[assistant] paris\n", add_special_tokens=False).input_ids
    start = len(tokenizer("[user] what\n", add_special_tokens=False).input_ids)
    recipe = one_hot(pool, "nq", dtype="float32")
    async with running(replace(pool, chat_template=template), tmp_path) as engine:
        assert (await engine.score(recipe, given)).losses == [fake_loss(recipe.digest, ids, start)]
