"""Several engines of one pool behind one, over real processes that fake vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from cocktail_serve.config import FakeEngineConfig
from cocktail_serve.engines.base import GenerationEngine
from cocktail_serve.engines.replicas.engine import ReplicatedEngine
from cocktail_serve.engines.snapshot import EngineSnapshot
from cocktail_serve.engines.vllm.build import build_decoder_engine
from cocktail_serve.engines.vllm.engine import VLLMEngine
from cocktail_serve.engines.vllm.fake import fake_loss
from cocktail_serve.errors import (
    CapacityError,
    ConflictError,
    DrainedError,
    EngineError,
    InvalidRequestError,
    ModelNotReadyError,
    NotFoundError,
    StorageError,
)
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe, one_hot
from cocktail_serve.scoring.decoder import tokenize_examples
from tests.fakes import make_fake_pool
from tests.integration.test_engine_fake import (
    ask,
    eventually,
    examples,
    expected,
    mixture,
    processes_of,
    running,
    stream,
    strike,
)
from tests.models import make_decoder_tokenizer
from tests.processes import is_alive


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return make_fake_pool(tmp_path_factory.mktemp("pool"))


@contextlib.asynccontextmanager
async def replicated(pool: Pool, tmp_path: Path, num: int = 2, **config: Any) -> AsyncIterator[ReplicatedEngine]:
    """All of them are ready."""
    args = {"faults": str(tmp_path / "faults"), **config.pop("args", {})}
    if pool.mode == "unmerged":
        args["holds"] = "all"
    defaults = {"slice_s": 0.05, "drain_s": 5, "queue_timeout_s": 20, "max_model_len": 256, "replicas": num}
    settings = FakeEngineConfig.model_validate({**defaults, **config, "args": args})
    engine = build_decoder_engine(pool, settings, run_dir=tmp_path / "run")
    assert isinstance(engine, ReplicatedEngine)
    assert isinstance(engine, GenerationEngine)
    await engine.start()
    try:
        await eventually(lambda: all_ready(engine))
        yield engine
    finally:
        await engine.stop()


async def each_of(engine: ReplicatedEngine) -> tuple[EngineSnapshot, ...]:
    return (await engine.snapshot(deadline_s=5)).replicas


async def all_ready(engine: ReplicatedEngine) -> bool:
    return all(one.state == "ready" for one in await each_of(engine))


def replica(engine: ReplicatedEngine, number: int) -> VLLMEngine:
    return cast(VLLMEngine, engine._replicas[number])


def pids(engine: ReplicatedEngine) -> list[int]:
    return [processes_of(replica(engine, number))[0].pid for number in range(len(engine._replicas))]


async def until(condition: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return condition()

    await eventually(holds)


async def test_each_has_its_own_files_and_all_answer(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with replicated(pool, tmp_path, 3, args={"token-delay-ms": 5}) as engine:
        recipes = [mixture(pool, share) for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
        asked = [ask(engine, recipe, "hello", max_tokens=20) for recipe in recipes]
        assert await asyncio.gather(*asked) == [expected(recipe, "hello", max_tokens=20) for recipe in recipes]
        seen = await engine.snapshot(deadline_s=5)
        assert (seen.state, seen.num_queued, len(seen.each)) == ("ready", 0, 3)
        assert all(one.counters.wait.count for one in seen.each), "one of them answered nothing"
        assert seen.counters.wait.count == 6
        assert sum(one.counters.swap.count for one in seen.each) == seen.counters.swap.count <= 6
        assert pickle.loads(pickle.dumps(seen)) == seen
        for number in range(3):
            folder = tmp_path / "run" / f"flan.{number}"
            assert (folder / "flan.log").exists()
            assert (folder / "flan.manifest.json").exists()
        counted = await engine.server_metrics(deadline_s=5)
        assert [values["vllm:num_requests_running"] for values in counted] == [0, 0, 0]


async def test_a_recipe_that_is_asked_again_is_not_mixed_again(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with replicated(pool, tmp_path, 3) as engine:
        recipe = mixture(pool, 0.3)
        for number in range(8):
            assert await ask(engine, recipe, f"{number}") == expected(recipe, f"{number}")
        assert sorted(one.counters.swap.count for one in await each_of(engine)) == [0, 0, 1]


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
async def test_one_that_is_killed_costs_what_it_held_and_nothing_else(
    pool: Pool, tmp_path: Path, faults: Path, mode: Any
) -> None:
    pool = replace(pool, mode=mode)
    recipes = [replace(mixture(pool, share), mode=mode) for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    async with replicated(pool, tmp_path, args={"token-delay-ms": 5, "mix-ms": 20}) as engine:
        lost = 0
        is_killed = asyncio.Event()
        held: list[int] = []

        async def client(number: int) -> None:
            nonlocal lost
            for turn in range(20):
                recipe, text = recipes[(number + turn) % len(recipes)], f"{number} {turn}"
                try:
                    answer = await (stream if turn % 2 else ask)(engine, recipe, text)
                except EngineError:
                    lost += 1
                    assert is_killed.is_set()
                else:
                    assert answer == expected(recipe, text)

        async def kill() -> None:
            await until(lambda: replica(engine, 0)._turns.num_in_flight > 0 and engine._dispatcher._request_s != 1.0)
            held.append(replica(engine, 0)._turns.num_in_flight)
            is_killed.set()
            os.kill(pids(engine)[0], signal.SIGKILL)

        await asyncio.gather(*(client(number) for number in range(12)), kill())
        # a request may have got its slot between the kill and the moment that it was seen
        assert lost <= held[0] + 4
        assert (await engine.snapshot(deadline_s=5)).counters.num_restarts == 1
        await eventually(lambda: all_ready(engine))


async def test_those_in_line_at_one_that_is_lost_do_not_wait_for_its_return(
    pool: Pool, tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocktail_serve.engines.start_failures.BACKOFF_S", (60.0,))
    async with replicated(pool, tmp_path, args={"token-delay-ms": 20}) as engine:
        recipe, other, first = mixture(pool, 0.9), mixture(pool, 0.2), asyncio.Event()
        long = asyncio.create_task(stream(engine, recipe, "hello", max_tokens=200, first=first))
        await first.wait()
        (at,) = (number for number in range(2) if replica(engine, number)._turns.num_in_flight)
        engine.drain(True, replica=1 - at)
        waiting = [asyncio.create_task(ask(engine, other, f"{number}")) for number in range(3)]
        await until(lambda: replica(engine, at)._turns.num_waiting == 3)
        engine.drain(False, replica=1 - at)
        os.kill(pids(engine)[at], signal.SIGKILL)
        with pytest.raises(EngineError):
            await long
        assert await asyncio.gather(*waiting) == [expected(other, f"{number}") for number in range(3)]
        seen = await engine.snapshot(deadline_s=5)
        assert seen.state == "ready", "the other answers"
        assert [one.state for one in seen.replicas].count("restarting") == 1
        assert f"replica {at}: " in seen.detail["reason"]
        assert await ask(engine, recipe, "hello") == expected(recipe, "hello")


async def test_a_recipe_that_loses_two_engines_loses_no_third(pool: Pool, tmp_path: Path, faults: Path) -> None:
    """One is bad luck, two look like its doing: from then on it is tried where it was tried last, and there alone."""
    async with replicated(pool, tmp_path, 4) as engine:
        poison = mixture(pool, 0.9)
        for text in ("first", "second", "third"):
            asked = [asyncio.create_task(ask(engine, poison, f"{text} {number}")) for number in range(3)]
            while not all(task.done() for task in asked):
                strike(faults, "mix_failed")
                await asyncio.wait(asked, timeout=0.05)
            for task in asked:
                assert isinstance(task.exception(), EngineError)
        (faults / "mix_failed").unlink(missing_ok=True)
        restarts = sorted(one.counters.num_restarts for one in await each_of(engine))
        assert restarts[:2] == [0, 0], "a third engine was lost to it"
        assert restarts[2:] == [1, restarts[3]]
        # once nothing is wrong with it any more it is served
        assert await ask(engine, poison, "hello") == expected(poison, "hello")


async def test_scoring_is_spread_and_scores_are_those_of_the_recipe(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with replicated(pool, tmp_path, args={"score-ms": 50}) as engine:
        given = examples()
        await engine.check_examples(given)
        recipes = [one_hot(pool, name, dtype="float32") for name in ("base", "ag-news", "nq")]
        scored = await asyncio.gather(*(engine.score(recipe, given) for recipe in recipes))
        tokenized = tokenize_examples(make_decoder_tokenizer(), given, max_tokens=255)
        for recipe, of_recipe in zip(recipes, scored, strict=True):
            assert of_recipe.losses == [fake_loss(recipe.digest, e.token_ids, e.output_start) for e in tokenized]
        residents = {one.resident for one in await each_of(engine)}
        assert len(residents) == 2, "one of them scored everything"


async def test_a_job_goes_on_elsewhere_when_its_engine_has_gone(
    pool: Pool, tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocktail_serve.engines.start_failures.BACKOFF_S", (60.0,))
    async with replicated(pool, tmp_path, args={"token-delay-ms": 20}) as engine:
        recipe, first = mixture(pool, 0.9), asyncio.Event()
        long = asyncio.create_task(stream(engine, recipe, "hello", max_tokens=200, first=first))
        await first.wait()
        (at,) = (number for number in range(2) if replica(engine, number)._turns.num_in_flight)
        engine.drain(True, replica=1 - at)
        job = asyncio.create_task(engine.score(one_hot(pool, "nq", dtype="float32"), examples()))
        await until(lambda: bool(replica(engine, at).load().background))
        engine.drain(False, replica=1 - at)
        os.kill(pids(engine)[at], signal.SIGKILL)
        assert len((await job).losses) == 3
        await asyncio.gather(long, return_exceptions=True)


async def test_what_is_said_of_the_engine_reaches_all(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with replicated(pool, tmp_path) as engine:
        kept, other = mixture(pool, 0.5), mixture(pool, 0.25)
        engine.pin(kept)
        await eventually(lambda: all_hold(engine, kept))
        with pytest.raises(ModelNotReadyError, match="another model"):
            await ask(engine, other, "hello")
        assert await ask(engine, kept, "hello") == expected(kept, "hello")
        engine.pin(None)
        engine.drain(True)
        assert (await engine.snapshot(deadline_s=5)).scheduler.is_drained
        with pytest.raises(ModelNotReadyError, match="drains"):
            await ask(engine, kept, "hello")
        engine.drain(False)
        assert await ask(engine, other, "hello") == expected(other, "hello")

        engine.forget(kept.digest)

        async def is_forgotten() -> bool:
            return all(kept.digest not in one.detail["cached"] for one in await each_of(engine))

        await eventually(is_forgotten)


async def all_hold(engine: ReplicatedEngine, recipe: Recipe) -> bool:
    return all(one.resident == recipe.digest for one in await each_of(engine))


async def test_one_is_pinned_or_drained_while_the_others_serve_the_rest(
    pool: Pool, tmp_path: Path, faults: Path
) -> None:
    async with replicated(pool, tmp_path) as engine:
        kept, others = mixture(pool, 0.5), [mixture(pool, share) for share in (0.1, 0.2, 0.3)]
        engine.pin(kept, replica=1)
        for recipe in [*others, kept, *others]:
            assert await ask(engine, recipe, "hello") == expected(recipe, "hello")
        assert (await each_of(engine))[1].scheduler.resident == kept.digest
        engine.pin(None, replica=1)
        engine.drain(True, replica=0)
        for recipe in [*others, kept]:
            assert await ask(engine, recipe, "hello") == expected(recipe, "hello")
        assert (await each_of(engine))[0].counters.wait.count <= 6
        assert not (await engine.snapshot(deadline_s=5)).scheduler.is_drained
        engine.drain(True, replica=1)
        with pytest.raises(ModelNotReadyError, match="drains"):
            await ask(engine, kept, "hello")
        with pytest.raises(NotFoundError, match="replicas 0 to 1"):
            engine.drain(True, replica=2)


async def test_rows_have_nothing_to_pin(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with replicated(replace(pool, mode="unmerged"), tmp_path) as engine:
        with pytest.raises(InvalidRequestError, match="share a batch"):
            engine.pin(mixture(pool, 0.5))


async def test_an_expert_that_is_added_is_known_to_all_or_to_none(
    pool: Pool, tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replicated(pool, tmp_path) as engine:
        added = replace(pool.experts["nq"], name="added", fingerprint="f" * 64)
        grown = replace(pool, experts={**pool.experts, "added": added})

        def manifests() -> list[bool]:
            files = [tmp_path / "run" / f"flan.{number}" / "flan.manifest.json" for number in range(2)]
            return ["f" * 64 in file.read_text() for file in files]

        async def fails(_pool: Pool) -> None:
            raise StorageError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(replica(engine, 1), "change_pool", fails)
            with pytest.raises(StorageError):
                await engine.change_pool(grown)
        assert manifests() == [False, False]
        assert engine.pool == pool
        await engine.change_pool(grown)
        assert manifests() == [True, True]
        recipe = one_hot(grown, "added", dtype="float32")
        engine.pin(recipe)
        await eventually(lambda: all_hold(engine, recipe))


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
async def test_all_are_restarted_without_a_failed_request(pool: Pool, tmp_path: Path, faults: Path, mode: Any) -> None:
    pool = replace(pool, mode=mode)
    recipes = [replace(mixture(pool, share), mode=mode) for share in (0.1, 0.2, 0.3, 0.4)]
    async with replicated(pool, tmp_path, args={"token-delay-ms": 5}) as engine:
        before, is_over = pids(engine), False
        answers = 0

        async def client(number: int) -> None:
            nonlocal answers
            while not is_over:
                recipe, text = recipes[(number + answers) % len(recipes)], f"{number} {answers}"
                assert await (stream if answers % 2 else ask)(engine, recipe, text) == expected(recipe, text)
                answers += 1

        clients = [asyncio.create_task(client(number)) for number in range(6)]
        job = asyncio.create_task(engine.score(one_hot(pool, "nq", dtype="float32"), examples()))
        await asyncio.sleep(0.2)
        engine.begin_restart(drain_s=60)
        with pytest.raises(ConflictError, match="being restarted already"):
            engine.begin_restart(drain_s=60)

        async def has_ended() -> bool:
            progress = (await engine.snapshot(deadline_s=5)).restart
            assert progress is not None
            assert progress.error is None
            return progress.num_done == progress.num_total == 2

        await eventually(has_ended)
        is_over = True
        await asyncio.gather(*clients)
        assert len((await job).losses) == 3
        assert set(pids(engine)).isdisjoint(before)
        assert answers > 20
        seen = await engine.snapshot(deadline_s=5)
        assert seen.counters.num_restarts == 0, "nothing was lost"
        assert not any(one.scheduler.is_drained for one in seen.replicas)


async def test_what_outlives_its_time_at_a_restart_is_ended(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with replicated(pool, tmp_path, args={"token-delay-ms": 50}) as engine:
        recipe, first = mixture(pool, 0.9), asyncio.Event()
        long = asyncio.create_task(stream(engine, recipe, "hello", max_tokens=200, first=first))
        await first.wait()
        engine.begin_restart(drain_s=0.2)
        with pytest.raises(DrainedError, match="restarted"):
            await long


async def test_a_restart_that_fails_leaves_the_others_as_they_are(
    pool: Pool, tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replicated(pool, tmp_path) as engine:
        before = pids(engine)

        async def fails(*, drain_s: float) -> None:
            raise EngineError("it did not come back")

        monkeypatch.setattr(replica(engine, 0), "restart", fails)
        engine.begin_restart(drain_s=1)

        async def has_failed() -> bool:
            progress = (await engine.snapshot(deadline_s=5)).restart
            return progress is not None and progress.error == "replica 0: it did not come back"

        await eventually(has_failed)
        assert pids(engine) == before
        assert await ask(engine, mixture(pool, 0.5), "hello") == expected(mixture(pool, 0.5), "hello")


async def test_the_last_that_answers_is_not_restarted_while_the_others_are_drained(
    pool: Pool, tmp_path: Path, faults: Path
) -> None:
    async with replicated(pool, tmp_path) as engine:
        before = pids(engine)
        engine.drain(True)
        with pytest.raises(ModelNotReadyError, match="all engines of this pool are drained"):
            engine.begin_restart(drain_s=1)
        engine.drain(False, replica=1)
        engine.begin_restart(drain_s=1)

        async def has_failed() -> bool:
            progress = (await engine.snapshot(deadline_s=5)).restart
            return progress is not None and progress.error is not None and "drains all the others" in progress.error

        await eventually(has_failed)
        assert pids(engine)[0] != before[0], "another answered in its place"
        assert pids(engine)[1] == before[1]
        assert [one.scheduler.is_drained for one in await each_of(engine)] == [True, False]


async def test_a_pool_of_one_engine_is_not_restarted_under_its_requests(
    pool: Pool, tmp_path: Path, faults: Path
) -> None:
    async with running(pool, tmp_path) as engine:
        with pytest.raises(InvalidRequestError, match=r"engine\.replicas"):
            engine.begin_restart(drain_s=1)
        with pytest.raises(NotFoundError, match="one replica, 0"):
            engine.drain(True, replica=1)


async def test_nothing_is_left_when_it_has_stopped(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with replicated(pool, tmp_path) as engine:
        processes = [process for number in range(2) for process in processes_of(replica(engine, number))]
        waiting = asyncio.create_task(ask(engine, mixture(pool, 0.5), "hello", max_tokens=200))
        engine.begin_restart(drain_s=60)
        await asyncio.sleep(0.1)
    assert not any(is_alive(process) for process in processes)
    (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
    assert isinstance(outcome, str | EngineError | CapacityError)
    assert not list((tmp_path / "run").glob("*/cocktail-*"))
    assert (await engine.snapshot(deadline_s=1)).state == "stopped"
