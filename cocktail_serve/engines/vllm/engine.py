"""A decoder pool in a vLLM server of its own: one resident recipe at a time, requests passed through when it is theirs.

Others keep the server alive (`supervisor`), say how it is started (`launcher`), give turns (`residency`), write what is
sent (`request_body`), read what comes back (`answers`) and score examples (`scorer`); here they work together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from cocktail_serve.config import VLLMEngineConfig
from cocktail_serve.engines.base import EngineHealth, Forwarded
from cocktail_serve.engines.effort import spend
from cocktail_serve.engines.occupancy import Occupancy
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.turns.residency import Residency
from cocktail_serve.engines.vllm.answers import error_message, iter_events, read_whole
from cocktail_serve.engines.vllm.connections import Answer
from cocktail_serve.engines.vllm.launcher import Launcher
from cocktail_serve.engines.vllm.request_body import BodyWriter, expected_tokens
from cocktail_serve.engines.vllm.scorer import DecoderScorer
from cocktail_serve.engines.vllm.server import STATUS_PATH, EngineServer
from cocktail_serve.engines.vllm.supervisor import HANG_S, Supervisor
from cocktail_serve.errors import CocktailError, ConfigError, EngineError, InvalidMixError, refusal
from cocktail_serve.examples import ExampleSet
from cocktail_serve.generation import GenerationSettings
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import DType, Recipe
from cocktail_serve.scoring.kept_tokenizer import TOKENIZERS
from vllm_cocktail.fence import RECIPE_HEADER
from vllm_cocktail.launch import is_cpu_build

logger = logging.getLogger(__name__)

BACKGROUND_DELAY_SLICES = 2.0
"""Slices that scoring lets traffic go ahead; see `residency`."""

PATIENCE_SLICES, PATIENCE_SHARE = 10.0, 0.25
"""How long a tenant in line goes without before it is next, whatever it was served: so many slices, and so much of
`queue_timeout_s`."""

MAX_IN_FLIGHT = 256
MAX_IN_FLIGHT_CPU = 32
"""Requests inside the engine at once where the configuration does not say. A GPU decodes hundreds in the time of one;
on a CPU each more makes the step longer for all, and in vLLM's own queue no tenant could go before another."""

ABORT_S = 10.0
"""How long the engine may take to abort what we have given up, before a mix comes back as busy."""

_REPORTED = (
    "mixing_path",
    "streams_because",
    "captured",
    "mixing_kernel",
    "in_flight",
    "cached",
    "cached_bytes",
)
"""What `/ready` says of a server's own status."""


class VLLMEngine:
    """A `GenerationEngine` over vLLM's OpenAI server with the cocktail plugin, or over the fake of it.

    Args:
        pool: a decoder pool whose members lie in local folders.
        config: `type: fake` starts `engines.fake` instead of vLLM; all else is the same.
        run_dir: folder for the manifest, the server's log and the tokenizer.

    Raises:
        ConfigError: `args` or `env` set what is set here, or what cannot be read here.
    """

    def __init__(self, pool: Pool, config: VLLMEngineConfig, *, run_dir: Path) -> None:
        self.pool = pool
        self.dtype: DType = pool.base.dtype if config.dtype == "auto" else config.dtype  # type: ignore[assignment]
        self.stats = EngineStats()
        self._config = config
        self._last_mix_s = 0.0
        self._forgetting: set[asyncio.Task[None]] = set()
        self._bodies = BodyWriter(pool.id, own=pool.base.generation)
        self._launcher = Launcher(pool, config, dtype=self.dtype, run_dir=run_dir)
        self._residency = Residency(
            self._mix,
            slice_s=config.slice_s,
            drain_s=config.drain_s,
            background_delay_s=BACKGROUND_DELAY_SLICES * config.slice_s,
            patience_s=min(PATIENCE_SLICES * config.slice_s, PATIENCE_SHARE * config.queue_timeout_s),
            max_in_flight=_max_in_flight(config),
            stats=self.stats,
        )
        self._supervisor = Supervisor(
            pool.id,
            self._launcher,
            self._residency,
            start_timeout_s=config.start_timeout_s,
            max_model_len=config.max_model_len,
            stats=self.stats,
        )
        self._scorer = DecoderScorer(pool, self._supervisor, turn=self._background_turn, kept=run_dir / TOKENIZERS)

    async def start(self) -> None:
        if not self._supervisor.is_started:
            self._launcher.write_manifest(self.pool)
            self._supervisor.start()
            self._scorer.prepare_tokenizer()

    def check_start(self) -> None:
        self._launcher.check(self.pool)

    async def stop(self) -> None:
        await self._supervisor.stop()
        for task in list(self._forgetting):
            task.cancel()
        self._scorer.close()

    async def health(self, *, deadline_s: float) -> EngineHealth:
        queued = self._residency.num_waiting
        supervisor, server = self._supervisor, self._supervisor.server
        if supervisor.state != "ready" or server is None:
            # the first line alone: what follows is the end of the server's log, which is the operator's
            reason = supervisor.failure.partition("\n")[0] or supervisor.state
            return EngineHealth(supervisor.state, queued=queued, detail={"reason": reason})
        try:
            status, body = await server.call("GET", STATUS_PATH, timeout_s=deadline_s)
        except CocktailError as error:
            if self._residency.is_mixing:
                # its workers are busy with the mix, which has a deadline of its own
                return EngineHealth("ready", queued=queued, detail={"mixing": True})
            return EngineHealth("restarting", queued=queued, detail={"reason": error.message})
        if status != 200 or body["state"] == "poisoned":
            return EngineHealth("restarting", queued=queued, detail={"reason": f"status {status}: {body}"})
        detail = {key: body[key] for key in _REPORTED if key in body}
        return EngineHealth("ready", resident=body["resident"], queued=queued, detail=detail)

    def occupancy(self) -> Occupancy:
        return self._residency.occupancy()

    def drain(self, is_drained: bool) -> None:
        self._residency.drain(is_drained)

    def pin(self, recipe: Recipe | None) -> None:
        self._residency.pin(recipe)

    async def change_pool(self, pool: Pool) -> None:
        if self._supervisor.is_started:
            await asyncio.to_thread(self._launcher.write_manifest, pool)
        self.pool = pool

    async def check_examples(self, examples: ExampleSet) -> None:
        await self._scorer.tokenize(examples)

    async def score(self, recipe: Recipe, examples: ExampleSet) -> list[float]:
        return await self._scorer.score(recipe, examples)

    async def materialise(self, recipe: Recipe) -> None:
        with await self._background_turn(recipe):
            pass  # resident once is enough: the worker keeps merged parameters in its cache

    def forget(self, recipe_digest: str) -> None:
        server = self._supervisor.server
        if server is not None:
            task = asyncio.create_task(self._forget(server, recipe_digest))
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)

    @contextlib.asynccontextmanager
    async def forward(
        self,
        recipe: Recipe,
        path: str,
        body: Mapping[str, Any],
        *,
        tenant: str,
        settings: GenerationSettings | None = None,
    ) -> AsyncIterator[Forwarded]:
        if settings is not None:
            body = self._bodies.complete(body, path, settings, max_model_len=self._supervisor.max_model_len)
        content = self._bodies.write(body, recipe, tenant=tenant)
        headers = {RECIPE_HEADER: recipe.digest}
        with await self._turn(recipe, tenant=tenant, num_tokens=expected_tokens(body, content)) as lease:
            with lease.interruptible():
                answer = await self._supervisor.running.post(path, content, headers=headers)
            with contextlib.closing(answer):
                if answer.status == 200 and answer.headers.get("content-type", "").startswith("text/event-stream"):
                    self._check_answer(recipe, answer, b"")
                    # the engine must be rid of the request even while our reader is stuck
                    lease.on_end(answer.close)
                    yield Forwarded(answer.status, None, iter_events(answer, lease), lease.settle)
                    return
                with lease.interruptible():
                    whole = await read_whole(answer)
            self._check_answer(recipe, answer, whole)
            lease.release()  # the engine has done its part
            yield Forwarded(answer.status, whole, None, lease.settle)

    async def _turn(self, recipe: Recipe, *, tenant: str, num_tokens: int) -> Lease:
        self._supervisor.check_available()
        return await self._residency.acquire(
            recipe, tenant=tenant, num_tokens=num_tokens, timeout_s=self._config.queue_timeout_s
        )

    async def _background_turn(self, recipe: Recipe) -> Lease:
        self._supervisor.check_available()
        num_mixes = self.stats.swap.count
        lease = await self._residency.acquire(recipe, background=True)
        if self.stats.swap.count > num_mixes:
            spend(mixing_s=self._last_mix_s)  # the last mix is the one that this turn began with
        return lease

    def _check_answer(self, recipe: Recipe, answer: Answer, content: bytes) -> None:
        """Lets only answers through that this recipe gave.

        Raises:
            EngineError: the engine failed, or it does not hold what we think it does.
        """
        answered_by = answer.headers.get(RECIPE_HEADER)
        if answer.status in (401, 409) or (answered_by is not None and answered_by != recipe.digest):
            reason = f"the engine answered {answer.status} under recipe {answered_by}, expected {recipe.digest}"
            self._supervisor.lose(reason)
            raise EngineError(reason)
        if answer.status >= 500:
            raise EngineError(f"the engine failed: {error_message(content)}")

    async def _mix(self, recipe: Recipe) -> bool:
        status, body = await self._supervisor.running.call(
            "POST",
            "/v1/cocktail/mix",
            {"recipe": recipe.to_json(), "drain_s": ABORT_S},
            timeout_s=ABORT_S + self._config.swap_timeout_s,
        )
        if status == 200 and body["resident"] == recipe.digest:
            sources = self.stats.num_swaps_by_source
            sources[body["source"]] = sources.get(body["source"], 0) + 1
            self.stats.mix.observe(body["seconds"])
            self._last_mix_s = float(body["seconds"])
            self.stats.num_cache_hits += body["source"] == "cache"
            self.stats.num_cache_misses += body["source"] == "files"
            logger.info(
                "%s: recipe %s from %s in %.3f s", self.pool.id, recipe.digest[:8], body["source"], body["seconds"]
            )
            return True
        if status == 409:
            return False
        message = error_message(orjson.dumps(body))
        if status == 400:
            raise refusal(body["error"].get("code"), message) or InvalidMixError(message)
        raise EngineError(f"mixing failed with {status}: {message}")

    async def _forget(self, server: EngineServer, recipe_digest: str) -> None:
        try:
            await server.call("POST", "/v1/cocktail/forget", {"digest": recipe_digest}, timeout_s=HANG_S)
        except CocktailError as error:
            # the cache is bounded anyway, and a new life starts with an empty one
            logger.info("%s: recipe %s was not forgotten: %s", self.pool.id, recipe_digest[:8], error)


def _max_in_flight(config: VLLMEngineConfig) -> int:
    if config.max_concurrency is not None:
        return config.max_concurrency
    max_num_seqs = config.argument("max-num-seqs")
    if max_num_seqs is not None:
        try:
            return int(max_num_seqs)
        except (TypeError, ValueError):
            raise ConfigError(
                f"engine.args.max-num-seqs must be a number of requests, got {max_num_seqs!r}",
                param="engine.args.max-num-seqs",
            ) from None
    return MAX_IN_FLIGHT_CPU if config.type == "vllm" and is_cpu_build() else MAX_IN_FLIGHT
