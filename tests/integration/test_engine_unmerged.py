"""The engine of a pool that is served unmerged, over a real process that fakes vLLM behind the plugin's own fence."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.engines.scheduler_snapshot import SchedulerSnapshot
from cocktail_serve.engines.vllm.engine import VLLMEngine
from cocktail_serve.engines.vllm.fake import fake_loss
from cocktail_serve.engines.vllm.request_body import recipe_fields
from cocktail_serve.errors import EngineError, InvalidRequestError, ModelNotReadyError
from cocktail_serve.pool import Mode, Pool
from cocktail_serve.recipe import Recipe, make_recipe, one_hot
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


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return replace(make_fake_pool(tmp_path_factory.mktemp("pool")), mode="unmerged")


@contextlib.asynccontextmanager
async def unmerged(pool: Pool, tmp_path: Path, **args: Any) -> AsyncIterator[VLLMEngine]:
    async with running(pool, tmp_path, args=args, max_concurrency=8) as engine:
        yield engine


async def test_the_base_experts_and_mixtures_are_in_flight_at_once(pool: Pool, tmp_path: Path, faults: Path) -> None:
    recipes = [one_hot(pool, name, dtype="float32") for name in ("base", "nq")] + [mixture(pool, 0.3)]
    async with unmerged(pool, tmp_path, **{"token-delay-ms": 20}) as engine:
        begun = [asyncio.Event() for _ in recipes]
        answers = [
            asyncio.create_task(stream(engine, recipe, "hello", max_tokens=50, first=first))
            for recipe, first in zip(recipes, begun, strict=True)
        ]
        await asyncio.gather(*(first.wait() for first in begun))
        snapshot = await engine.snapshot(deadline_s=5)
        assert (snapshot.state, snapshot.resident, snapshot.detail["mixing_path"]) == ("ready", None, "unmerged")
        assert snapshot.scheduler == SchedulerSnapshot(phase=None, num_in_flight=3)
        assert await asyncio.gather(*answers) == [expected(recipe, "hello", max_tokens=50) for recipe in recipes]
        assert engine.stats.swap.count == engine.stats.mix.count == 0


async def test_recipes_in_one_batch_never_cross(pool: Pool, tmp_path: Path, faults: Path) -> None:
    recipes = [mixture(pool, share / 40) for share in range(40)]
    async with unmerged(pool, tmp_path, **{"token-delay-ms": 1}) as engine:

        async def client(number: int) -> None:
            for turn in range(6):
                recipe, text = recipes[(7 * number + turn) % len(recipes)], f"{number} {turn}"
                assert await (stream if turn % 2 else ask)(engine, recipe, text) == expected(recipe, text)

        await asyncio.gather(*(client(number) for number in range(20)))
        assert engine.stats.num_restarts == 0


async def test_models_are_scored_at_once_beside_requests(pool: Pool, tmp_path: Path, faults: Path) -> None:
    given = examples()
    recipes = [mixture(pool, share) for share in (0.1, 0.2, 0.3, 0.4)]
    async with unmerged(pool, tmp_path, **{"score-ms": 400}) as engine:
        await engine.check_examples(given)
        started = time.monotonic()
        scored = await asyncio.gather(*(engine.score(recipe, given) for recipe in recipes))
        assert time.monotonic() - started < 1.2, "one after another takes 1.6 s"
        tokenized = tokenize_examples(make_decoder_tokenizer(), given, max_tokens=255)
        for recipe, of_recipe in zip(recipes, scored, strict=True):
            assert of_recipe.losses == [fake_loss(recipe.digest, e.token_ids, e.output_start) for e in tokenized]
        scoring = asyncio.create_task(engine.score(recipes[0], given))
        await asyncio.sleep(0.05)
        assert await ask(engine, recipes[1], "hello") == expected(recipes[1], "hello")
        assert not scoring.done(), "the request had to wait for it"
        await scoring


async def test_nothing_is_mixed_ahead(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with unmerged(pool, tmp_path, **{"mix-ms": 5000}) as engine:
        assert (await engine.mix_ahead(mixture(pool, 0.5))).engine_time.mixing_s == 0.0
        engine.forget(mixture(pool, 0.5).digest)
        assert engine._supervisor.server is not None
        recipe = {"recipe": mixture(pool, 0.5).to_json()}
        status, body = await engine._supervisor.server.call("POST", "/v1/cocktail/mix", recipe, timeout_s=5)
        assert (status, body["error"]["code"]) == (400, "invalid_recipe")


async def test_coefficients_of_another_recipe_are_refused(
    pool: Pool, tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_another(recipe: Recipe, *, mode: Mode) -> Mapping[str, Any]:
        return recipe_fields(mixture(pool, 0.7), mode=mode)

    async with unmerged(pool, tmp_path) as engine:
        monkeypatch.setattr("cocktail_serve.engines.vllm.engine.recipe_fields", of_another)
        with pytest.raises(InvalidRequestError, match="brings the coefficients of"):
            await ask(engine, mixture(pool, 0.5), "hello")
        assert await ask(engine, mixture(pool, 0.7), "hello") == expected(mixture(pool, 0.7), "hello")
        assert engine.stats.num_restarts == 0


async def test_a_merged_recipe_is_refused(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with unmerged(pool, tmp_path) as engine:
        with pytest.raises(InvalidRequestError, match="this engine's are unmerged"):
            await ask(engine, replace(mixture(pool, 0.5), mode="merged"), "hello")


async def test_task_arithmetic_is_served(pool: Pool, tmp_path: Path, faults: Path) -> None:
    weights, params = {"nq": 0.8, "ag-news": -0.5}, {"lambda": 0.7}
    recipe = make_recipe(pool, weights, dtype="float32", method="task_arithmetic", method_params=params)
    async with unmerged(pool, tmp_path) as engine:
        assert await ask(engine, recipe, "hello") == expected(recipe, "hello")


async def test_an_expert_that_is_added_joins_a_running_engine(tmp_path: Path, faults: Path) -> None:
    grown = replace(make_fake_pool(tmp_path, ("ag-news", "late", "nq")), mode="unmerged")
    pool = replace(grown, experts={name: grown.experts[name] for name in ("ag-news", "nq")})
    late = one_hot(grown, "late", dtype="float32")
    async with unmerged(pool, tmp_path) as engine:
        with pytest.raises(InvalidRequestError, match="not in the manifest"):
            await ask(engine, late, "hello")
        running_before = asyncio.create_task(stream(engine, mixture(pool, 0.5), "hello", max_tokens=100))
        await engine.change_pool(grown)
        assert await ask(engine, late, "hello") == expected(late, "hello")
        assert await running_before == expected(mixture(pool, 0.5), "hello", max_tokens=100)
        assert engine.stats.num_restarts == 0


async def test_an_engine_that_is_lost_answers_by_every_recipe_again(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with unmerged(pool, tmp_path, **{"token-delay-ms": 20}) as engine:
        begun = asyncio.Event()
        held = asyncio.create_task(stream(engine, mixture(pool, 0.1), "hello", max_tokens=200, first=begun))
        await begun.wait()
        os.kill(processes_of(engine)[0].pid, signal.SIGKILL)
        with pytest.raises(EngineError):
            await held
        await eventually(lambda: has_restarted(engine))
        shares = (0.2, 0.4, 0.6)
        answers = await asyncio.gather(*(ask(engine, mixture(pool, share), "hello") for share in shares))
        assert answers == [expected(mixture(pool, share), "hello") for share in shares]
        assert engine.stats.num_restarts == 1


async def has_restarted(engine: VLLMEngine) -> bool:
    return engine.stats.num_restarts == 1


async def test_the_operator_drains_it_and_pins_nothing(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with unmerged(pool, tmp_path, **{"token-delay-ms": 5}) as engine:
        begun = asyncio.Event()
        held = asyncio.create_task(stream(engine, mixture(pool, 0.1), "hello", max_tokens=100, first=begun))
        await begun.wait()
        engine.drain(True)
        with pytest.raises(ModelNotReadyError, match="drains this engine"):
            await ask(engine, mixture(pool, 0.2), "hello")
        assert await held == expected(mixture(pool, 0.1), "hello", max_tokens=100)
        engine.drain(False)
        assert await ask(engine, mixture(pool, 0.2), "hello") == expected(mixture(pool, 0.2), "hello")
        with pytest.raises(InvalidRequestError, match="no turns to pin"):
            engine.pin(mixture(pool, 0.2))


async def test_scoring_that_fails_is_told_and_the_engine_goes_on(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with unmerged(pool, tmp_path) as engine:
        strike(faults, "score_error")
        with pytest.raises(EngineError, match="scoring failed"):
            await engine.score(mixture(pool, 0.5), examples())
        assert len((await engine.score(mixture(pool, 0.5), examples())).losses) == 3
