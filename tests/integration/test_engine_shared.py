"""The vLLM engine with other turns than those it is served with: recipes that are mixed, and then side by side.

The server holds every recipe that was mixed. The engine, its slots, its supervisor, its scorer and the fence are the
ones that serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from cocktail_serve.config import FakeEngineConfig
from cocktail_serve.engines.scheduler_snapshot import SchedulerSnapshot
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.engines.turns.base import Mix, Turns
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.turns.shared import SharedTurns
from cocktail_serve.engines.vllm.engine import VLLMEngine
from cocktail_serve.engines.vllm.fake import fake_loss
from cocktail_serve.errors import InvalidMixError, InvalidRequestError, ModelNotReadyError
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe, one_hot
from cocktail_serve.scoring.decoder import tokenize_examples
from tests.fakes import make_fake_pool
from tests.integration.test_engine_fake import (
    ask,
    eventually,
    examples,
    expected,
    is_ready,
    mixture,
    processes_of,
    stream,
    strike,
)
from tests.models import make_decoder_tokenizer


class MixingTurns(SharedTurns):
    """Each recipe is mixed once in a life of the server, under the first lease for it, and stays."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._mixed: set[str] = set()

    async def run(self, resident: str, mix: Mix) -> NoReturn:
        self._mix = mix
        self._mixed.clear()
        await super().run(resident, mix)

    async def acquire(self, recipe: Recipe, **options: Any) -> Lease:
        lease = await super().acquire(recipe, **options)
        try:
            if recipe.digest not in self._mixed:
                with lease.interruptible():
                    seconds = await self._mix(recipe)
                assert seconds is not None
                lease.mixing_s = seconds
                self._mixed.add(recipe.digest)
        except BaseException:
            lease.release()
            raise
        return lease


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return make_fake_pool(tmp_path_factory.mktemp("pool"))


@contextlib.asynccontextmanager
async def shared_engine(
    pool: Pool, tmp_path: Path, *, max_in_flight: int = 8, **args: Any
) -> AsyncIterator[VLLMEngine]:
    args = {"holds": "all", "faults": str(tmp_path / "faults"), **args}
    config = FakeEngineConfig.model_validate({"queue_timeout_s": 20, "max_model_len": 256, "args": args})
    stats = EngineStats()
    turns: Turns = MixingTurns(max_in_flight=max_in_flight)
    engine = VLLMEngine(pool, config, turns=turns, stats=stats, run_dir=tmp_path / "run")
    await engine.start()
    try:
        await eventually(lambda: is_ready(engine))
        yield engine
    finally:
        await engine.stop()


async def test_two_recipes_are_in_flight_at_once(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with shared_engine(pool, tmp_path, **{"token-delay-ms": 20}) as engine:
        one, other = mixture(pool, 0.1), mixture(pool, 0.9)
        first, second = asyncio.Event(), asyncio.Event()
        long = asyncio.create_task(stream(engine, one, "hello", max_tokens=150, first=first))
        await first.wait()
        short = asyncio.create_task(stream(engine, other, "hello", max_tokens=20, first=second))
        await second.wait()
        assert (await occupancy_of(engine)).num_in_flight == 2
        assert await short == expected(other, "hello", max_tokens=20)
        assert not long.done(), "the other recipe had to wait for its turn"
        assert await long == expected(one, "hello", max_tokens=150)
        assert (await occupancy_of(engine)).num_in_flight == 0
        assert engine.stats.num_swaps_by_source == {"files": 2}


async def test_recipes_in_one_batch_never_cross(pool: Pool, tmp_path: Path, faults: Path) -> None:
    recipes = [mixture(pool, share) for share in (0.1, 0.2, 0.3, 0.4, 0.5)]
    async with shared_engine(pool, tmp_path, max_in_flight=4, **{"token-delay-ms": 1, "mix-ms": 2}) as engine:

        async def client(number: int) -> None:
            for turn in range(6):
                recipe, text = recipes[(number + turn) % len(recipes)], f"{number} {turn}"
                assert await (stream if turn % 2 else ask)(engine, recipe, text) == expected(recipe, text)

        given, expert = examples(), one_hot(pool, "nq", dtype="float32")
        scored, *_ = await asyncio.gather(engine.score(expert, given), *(client(number) for number in range(10)))
        tokenized = tokenize_examples(make_decoder_tokenizer(), given, max_tokens=255)
        assert scored.losses == [fake_loss(expert.digest, e.token_ids, e.output_start) for e in tokenized]
        assert engine.stats.num_restarts == 0
        assert await occupancy_of(engine) == SchedulerSnapshot(phase=None, num_in_flight=0)


async def test_what_was_ready_is_made_ready_again_in_the_next_life(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with shared_engine(pool, tmp_path, **{"mix-ms": 50}) as engine:
        recipe = mixture(pool, 0.5)
        assert 0.04 <= (await engine.mix_ahead(recipe)).engine_time.mixing_s < 5
        assert (await engine.mix_ahead(recipe)).engine_time.mixing_s == 0.0
        os.kill(processes_of(engine)[0].pid, signal.SIGKILL)
        await eventually(lambda: is_restarting(engine))
        assert await ask(engine, recipe, "hello") == expected(recipe, "hello")
        assert engine.stats.num_swaps_by_source == {"files": 2}
        assert engine.stats.num_restarts == 1


async def test_a_recipe_that_cannot_be_made_ready_gives_its_slot_back(pool: Pool, tmp_path: Path, faults: Path) -> None:
    async with shared_engine(pool, tmp_path, max_in_flight=1) as engine:
        strike(faults, "mix_invalid")
        with pytest.raises(InvalidMixError):
            await ask(engine, mixture(pool, 0.5), "hello")
        assert (await occupancy_of(engine)).num_in_flight == 0
        assert await ask(engine, mixture(pool, 0.5), "hello") == expected(mixture(pool, 0.5), "hello")
        engine.drain(True)
        with pytest.raises(ModelNotReadyError, match="drains this engine"):
            await ask(engine, mixture(pool, 0.5), "hello")
        with pytest.raises(InvalidRequestError, match="no turns to pin"):
            engine.pin(mixture(pool, 0.5))


async def is_restarting(engine: VLLMEngine) -> bool:
    return engine.stats.num_restarts == 1


async def occupancy_of(engine: VLLMEngine) -> SchedulerSnapshot:
    return (await engine.snapshot(deadline_s=5)).scheduler
