"""A decoder pool in a vLLM server of its own: requests are passed through once they are let in.

Others keep the server alive (`supervisor`), say how it is started (`launcher`), let requests in (`turns`), tell the
server what to mix (`server_mixer`), write what is sent (`request_body`), read what comes back (`responses`) and score
examples (`scorer`); here they work together.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import platform
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import orjson

from cocktail_serve.config import VLLMEngineConfig
from cocktail_serve.decisions import PosedQuestion
from cocktail_serve.engines.base import Background, Decided, Forwarded, MixedAhead, Scored
from cocktail_serve.engines.engine_gone import EngineGoneError
from cocktail_serve.engines.engine_time import CallTimer
from cocktail_serve.engines.line_place import LinePlace, RecalledError
from cocktail_serve.engines.load import EngineLoad
from cocktail_serve.engines.recipe_names import NamesOf
from cocktail_serve.engines.replica_numbers import check_replica
from cocktail_serve.engines.snapshot import EngineDetail, EngineSnapshot, EngineState
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.engines.token_estimates import expected_tokens
from cocktail_serve.engines.turns.base import Turns
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.vllm import server_metrics
from cocktail_serve.engines.vllm.connections import EngineResponse
from cocktail_serve.engines.vllm.errors import engine_error, is_error
from cocktail_serve.engines.vllm.example_tokens import ExampleTokens
from cocktail_serve.engines.vllm.launcher import Launcher
from cocktail_serve.engines.vllm.request_body import BodyWriter, recipe_fields
from cocktail_serve.engines.vllm.responses import iter_events, read_whole
from cocktail_serve.engines.vllm.scorer import DecoderScorer
from cocktail_serve.engines.vllm.server_mixer import ServerMixer
from cocktail_serve.engines.vllm.supervisor import Supervisor
from cocktail_serve.errors import CocktailError, DrainedError, EngineError, InvalidRequestError, ModelNotReadyError
from cocktail_serve.examples import ExampleSet
from cocktail_serve.generation_settings import GenerationSettings
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe
from cocktail_serve.scoring.tokenizer_cache import TOKENIZERS
from vllm_cocktail.fence import RECIPE_HEADER
from vllm_cocktail.replies import DECIDE_PATH, STATUS_PATH, DecideReply, StatusReply

LOOK_S = 0.05
"""Between two looks for whether background work should begin or give way, or a restart."""


class VLLMEngine:
    """A `GenerationEngine` over vLLM's OpenAI server with the cocktail plugin, or over the fake of it.

    Whether its recipes take turns or share a batch is not known here: its turns come from outside (see `build`).

    Args:
        pool: a decoder pool whose members lie in local folders.
        config: `type: fake` starts the fake server instead of vLLM; all else is the same.
        turns: who is let in, and when; what a turn of another recipe begins with is offered to them.
        stats: restarts and mixes are counted here, beside what turns count.
        run_dir: folder for the manifest and the server's log, and the tokenizer where no `tokens` are given.
        tokens: of the pool's examples, where several engines share them.
        replica: its number among the engines of its pool, as its log lines have it; None: it is the only one.

    Raises:
        ConfigError: `args` or `env` set what is set here.
    """

    kind: ClassVar[Literal["decoder"]] = "decoder"

    def __init__(
        self,
        pool: Pool,
        config: VLLMEngineConfig,
        *,
        turns: Turns,
        stats: EngineStats,
        run_dir: Path,
        tokens: ExampleTokens | None = None,
        replica: int | None = None,
    ) -> None:
        self.pool = pool
        self.dtype = config.dtype_over(pool.base)
        self.stats = stats
        self._turns = turns
        self._queue_timeout_s = config.queue_timeout_s
        name = pool.id if replica is None else f"{pool.id}.{replica}"
        self._mixer = ServerMixer(name, swap_timeout_s=config.swap_timeout_s, stats=stats)
        self._bodies = BodyWriter(own=pool.base.generation)
        self._num_background = 0
        self._launcher = Launcher(pool, config, dtype=self.dtype, run_dir=run_dir)
        self._supervisor = Supervisor(
            pool.id,
            self._launcher,
            turns,
            self._mixer,
            start_timeout_s=config.start_timeout_s,
            max_model_len=config.max_model_len,
            stats=stats,
            name=name,
        )
        self._tokens = tokens or ExampleTokens(pool, kept=run_dir / TOKENIZERS)
        self._scorer = DecoderScorer(pool, self._supervisor, turns, self._tokens)

    @property
    def max_model_len(self) -> int | None:
        return self._supervisor.max_model_len

    async def start(self) -> None:
        if not self._supervisor.is_started:
            self._launcher.write_manifest(self.pool)
            self._supervisor.start()
            self._tokens.prepare()

    def check_start(self) -> Sequence[str]:
        return self._launcher.check(self.pool)

    async def stop(self) -> None:
        await self._supervisor.stop()
        self._mixer.close()
        self._tokens.close()

    async def snapshot(self, *, deadline_s: float) -> EngineSnapshot:
        state, resident, detail = await self._ask(deadline_s)
        return EngineSnapshot(
            state,
            resident=resident,
            num_queued=self._turns.num_waiting,
            detail=detail,
            scheduler=self._turns.snapshot(),
            counters=self.stats.copy(),
            node=platform.node(),
        )

    def load(self) -> EngineLoad:
        load, state = self._turns.load(), self._supervisor.state
        # lost a moment ago, it would look idle
        return replace(load, is_up=load.is_up and state == "ready", is_failed=state in ("failed", "stopped"))

    async def server_metrics(self, *, deadline_s: float) -> Sequence[Mapping[str, float]]:
        server = self._supervisor.server
        if server is None:
            return [{}]
        try:
            status, content = await server.read(server_metrics.PATH, timeout_s=deadline_s)
        except CocktailError:
            return [{}]
        return [server_metrics.parse_server_metrics(content.decode()) if status == 200 else {}]

    def name_recipes(self, names_of: NamesOf) -> None:
        self._mixer.name_recipes(names_of)

    def drain(self, is_drained: bool, *, replica: int | None = None) -> None:
        check_replica(replica)
        self._turns.drain(is_drained)

    def pin(self, recipe: Recipe | None, *, replica: int | None = None) -> None:
        check_replica(replica)
        self._turns.pin(recipe)

    async def change_pool(self, pool: Pool) -> None:
        if self._supervisor.is_started:
            await asyncio.to_thread(self._launcher.write_manifest, pool)
        self.pool = pool

    async def check_examples(self, examples: ExampleSet) -> None:
        await self._scorer.tokenize(examples)

    async def score(self, recipe: Recipe, examples: ExampleSet, *, place: LinePlace | None = None) -> Scored:
        return await self._scorer.score(recipe, examples, place=place)

    async def mix_ahead(self, recipe: Recipe, *, place: LinePlace | None = None) -> MixedAhead:
        self._supervisor.check_available()
        # its turn comes, and with it the mix; resident once is enough, since the worker keeps what it merged
        with CallTimer() as timer, await self._turns.acquire(recipe, background=True, place=place) as lease:
            timer.add(mixing_s=lease.mixing_s)
        return MixedAhead(timer.time)

    def forget(self, recipe_digest: str) -> None:
        if self.pool.mode == "merged" and self._supervisor.server is not None:
            self._mixer.forget(self._supervisor.server, recipe_digest)

    async def ask_tokenizer(
        self, path: str, body: Mapping[str, Any], *, generation: GenerationSettings | None = None
    ) -> bytes:
        settings = self.pool.base.generation if generation is None else generation
        content = self._bodies.write_for_tokenizer(body, settings, fields={"model": self.pool.id})
        self._supervisor.check_available()
        if self._supervisor.server is None:
            raise ModelNotReadyError(f"the engine of pool {self.pool.id!r} is not ready ({self._supervisor.state})")
        with contextlib.closing(await self._supervisor.server.post(path, content, headers={})) as answer:
            whole = await read_whole(answer)
        if answer.status >= 400:
            raise engine_error(answer.status, whole)
        return whole

    async def decide(
        self,
        recipe: Recipe,
        questions: Sequence[PosedQuestion],
        *,
        tenant: str,
        generation: GenerationSettings | None = None,
        cache_salt: str | None = None,
        background: Background | None = None,
        place: LinePlace | None = None,
    ) -> Decided:
        self._supervisor.check_available()
        template = None if generation is None else generation.chat_template
        tokenized = await self._scorer.tokenize_options(questions, template)
        body = {"questions": tokenized, "cache_salt": cache_salt}
        content = self._bodies.write(body, recipe, tenant=tenant, fields=self._recipe_fields(recipe))
        num_tokens = sum(options.num_tokens for options in tokenized)
        with contextlib.ExitStack() as held:
            lease = await self._lease(
                recipe, held, tenant=tenant, num_tokens=num_tokens, background=background, place=place
            )
            with lease.interruptible(), self._reached(place):
                answer = await self._post(recipe, DECIDE_PATH, content)
                with contextlib.closing(answer):
                    whole = await read_whole(answer)
            self._check_recipe(recipe, answer)
            if answer.status != 200:
                raise engine_error(answer.status, whole)
        reply: DecideReply = orjson.loads(whole)
        lease.settle(reply["num_computed"])
        return Decided(
            log_probs=[
                [math.nan if value is None else float(value) for value in options] for options in reply["log_probs"]
            ],
            num_tokens=num_tokens,
            num_cached=sum(reply["num_cached"]),
        )

    @contextlib.asynccontextmanager
    async def forward(
        self,
        recipe: Recipe,
        path: str,
        body: Mapping[str, Any],
        *,
        tenant: str,
        generation: GenerationSettings | None = None,
        background: Background | None = None,
        place: LinePlace | None = None,
    ) -> AsyncIterator[Forwarded]:
        if generation is not None:
            body = self._bodies.complete(body, path, generation, max_model_len=self._supervisor.max_model_len)
        content = self._bodies.write(body, recipe, tenant=tenant, fields=self._recipe_fields(recipe))
        num_tokens = expected_tokens(body, num_bytes=len(content))
        self._supervisor.check_available()
        with contextlib.ExitStack() as held:
            lease = await self._lease(
                recipe, held, tenant=tenant, num_tokens=num_tokens, background=background, place=place
            )
            with lease.interruptible(), self._reached(place):
                answer = await self._post(recipe, path, content)
            with contextlib.closing(answer):
                if answer.status == 200 and answer.headers.get("content-type", "").startswith("text/event-stream"):
                    self._check_recipe(recipe, answer)
                    # the engine must be rid of the request even while our reader is stuck
                    lease.on_end(answer.close)
                    yield Forwarded(None, iter_events(answer, lease), lease.settle)
                    return
                with lease.interruptible():
                    whole = await read_whole(answer)
            self._check_recipe(recipe, answer)
            if answer.status >= 400 or is_error(whole):
                raise engine_error(answer.status, whole)
        # the turn is over: the engine has done its part
        yield Forwarded(whole, None, lease.settle)

    def _recipe_fields(self, recipe: Recipe) -> Mapping[str, Any]:
        return {"model": self.pool.id, **recipe_fields(recipe, mode=self.pool.mode)}

    async def _post(self, recipe: Recipe, path: str, content: bytes) -> EngineResponse:
        headers = {RECIPE_HEADER: recipe.digest}
        return await self._supervisor.require_server().post(path, content, headers=headers)

    async def _lease(
        self,
        recipe: Recipe,
        held: contextlib.ExitStack,
        *,
        tenant: str,
        num_tokens: int,
        background: Background | None,
        place: LinePlace | None,
    ) -> Lease:
        """The recipe's turn, once it has come, until `held` exits."""
        if background is not None:
            return await self._background_lease(recipe, background, held, place)
        return held.enter_context(
            await self._turns.acquire(
                recipe, tenant=tenant, num_tokens=num_tokens, timeout_s=self._queue_timeout_s, place=place
            )
        )

    async def _background_lease(
        self, recipe: Recipe, background: Background, held: contextlib.ExitStack, place: LinePlace | None
    ) -> Lease:
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                # whoever asks knows nothing of this
                while self._num_background and self._turns.num_asked:  # noqa: ASYNC110
                    await asyncio.sleep(LOOK_S)
                self._num_background += 1
                held.callback(self._end_background)
                lease = held.enter_context(await self._turns.acquire(recipe, background=True, place=place))
        except TimeoutError:
            # elsewhere there may be time for others, whose place it holds
            raise ModelNotReadyError(
                f"the engine of pool {self.pool.id!r} has no time for work in the background"
            ) from None
        if background.is_broken_off:
            held.callback(asyncio.create_task(self._give_way(lease)).cancel)
        return lease

    def begin_restart(self, *, drain_s: float) -> None:
        raise InvalidRequestError(
            f"pool {self.pool.id!r} has one engine: nobody would answer while it is restarted; set engine.replicas to "
            "2 or more, or restart the server"
        )

    async def restart(self, *, drain_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + drain_s
        while self._turns.num_in_flight and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        self._turns.end_in_flight(
            lambda: DrainedError(f"the request ran for more than {drain_s:g} s after its engine was to be restarted")
        )
        await self._supervisor.renew()

    def _end_background(self) -> None:
        self._num_background -= 1

    async def _give_way(self, lease: Lease) -> None:
        """Ends a lease once requests wait for it."""
        while not (lease.should_yield and self._turns.num_waiting):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        lease.end(DrainedError("the request gave way to others; ask again", retry_after_s=1.0))

    async def _ask(self, deadline_s: float) -> tuple[EngineState, str | None, EngineDetail]:
        """State, resident recipe and details, as the server says them itself."""
        supervisor, server = self._supervisor, self._supervisor.server
        if supervisor.state != "ready" or server is None:
            # the first line alone: the end of the server's log, which follows it, is the operator's
            failed: EngineDetail = {"reason": supervisor.failure.partition("\n")[0] or supervisor.state}
            if supervisor.failed_start_log:
                failed["log"] = list(supervisor.failed_start_log)
            return supervisor.state, None, failed
        try:
            status, body = await server.call("GET", STATUS_PATH, timeout_s=deadline_s)
        except CocktailError as error:
            if self._turns.is_mixing:
                # its workers are busy with the mix, which has a deadline of its own
                return "ready", None, {"mixing": True}
            return "restarting", None, {"reason": error.message}
        if status != 200 or body["state"] == "poisoned":
            return "restarting", None, {"reason": f"status {status}: {body}"}
        reply: StatusReply = body
        detail: EngineDetail = {
            "mixing_path": reply["mixing_path"],
            "streams_because": reply["streams_because"],
            "captured": reply["captured"],
            "mixing_kernel": reply["mixing_kernel"],
            "in_flight": reply["in_flight"],
            "cached": reply["cached"],
            "cached_bytes": reply["cached_bytes"],
        }
        if "mode" in reply:
            detail["mode"] = reply["mode"]
        return "ready", reply["resident"], detail

    @contextlib.contextmanager
    def _reached(self, place: LinePlace | None) -> Iterator[None]:
        """A request that does not reach the server goes to another, if there may be one; so will all that follow."""
        try:
            yield
        except EngineGoneError as error:
            self._supervisor.lose(error.message)
            if place is not None:
                raise RecalledError from error
            raise

    def _check_recipe(self, recipe: Recipe, answer: EngineResponse) -> None:
        """Lets only answers through that this recipe gave.

        Raises:
            EngineError: the engine does not hold what we think it does.
        """
        answered_by = answer.headers.get(RECIPE_HEADER)
        if answer.status in (401, 409) or (answered_by is not None and answered_by != recipe.digest):
            reason = f"the engine answered {answer.status} under recipe {answered_by}, expected {recipe.digest}"
            self._supervisor.lose(reason)
            raise EngineError(reason)
