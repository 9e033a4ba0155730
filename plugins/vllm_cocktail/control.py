"""What the control routes do to the engine: mix behind the fence, report, forget."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING, Any

from cocktail_serve.errors import CapacityError, ConfigError, EngineError
from cocktail_serve.recipe import Recipe
from vllm_cocktail.calls import ask_all, ask_ranks, recipe_error
from vllm_cocktail.fence import Fence
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.reload_check import TOLERANCE, ProbeAnswer, ask
from vllm_cocktail.replies import (
    CapturedWorker,
    MixedWorker,
    MixingPath,
    MixReply,
    ParameterSource,
    ProbedWorker,
    StatusReply,
)

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

# a child of vLLM's logger, whose handlers and level it so shares
logger = logging.getLogger("vllm.cocktail.control")


class EngineControl:
    """The one door to the engine's parameters.

    Args:
        engine: vLLM's engine client.
        fence: the fence in front of it.
        manifest: what may be mixed.
    """

    def __init__(self, engine: EngineClient, fence: Fence, manifest: Manifest) -> None:
        self.engine = engine
        self.fence = fence
        self.manifest = manifest
        self._mixing = asyncio.Lock()
        self._mixing_path: MixingPath = "stream"
        self._streams_because: str | None = None
        self._num_swaps = 0
        # digests whose parameters the workers hold: only calls of ours change it
        self._kept: frozenset[str] = frozenset()
        self._tasks: set[asyncio.Task[MixReply]] = set()

    async def start(self) -> None:
        """Probes the workers, has them keep the experts, and opens the fence on what the engine started with.

        Mixtures reach the engine through vLLM's reload, so the base does too, once, and must answer as before.

        Raises:
            ConfigError: the worker extension is missing or refuses this engine; says what to start differently. Or a
                reload makes another model of the base.
        """
        try:
            await ask_all(self.engine, "cocktail_prepare")
            loaded = await ask(self.engine)
            await self._capture()
            if self._mixing_path == "stream":
                base = Recipe(self.manifest.base, ((self.manifest.base, 1.0),), self.manifest.dtype)
                await self._swap(base)
            self._require_same(loaded, await ask(self.engine))
            probed: ProbedWorker = await ask_all(self.engine, "cocktail_probe")
        except EngineError as error:
            raise ConfigError(f"vllm_cocktail: {error.message}") from error
        if probed["digest"] != self.manifest.resident:
            raise ConfigError(f"the workers hold {probed['digest']}, the manifest says {self.manifest.resident}")
        await self.engine.update_weight_version(self.manifest.resident)
        self.fence.open({self.manifest.resident})

    async def mix(self, recipe: Recipe, *, drain_s: float) -> MixReply:
        """Makes a recipe resident. One mix at a time; others wait for it.

        A caller that is cancelled leaves no half mix behind: the mix goes on without it.

        Args:
            drain_s: how long requests in flight may take to finish, seconds.

        Raises:
            InvalidMixError: code `invalid_recipe`; nothing was touched, as with the next ones.
            CheckpointError, IncompatibleModelsError: a model's files cannot be read or mixed.
            ModelChangedError: they hold something else than they did.
            NotFiniteError: the mixture would hold what the engine's dtype cannot.
            CapacityError: code `busy`: requests in flight did not finish in time; nothing was touched.
            EngineError: code `mix_failed`: the engine is lost and its process must end.
        """
        task = asyncio.create_task(self._mix(recipe, drain_s))
        self._tasks.add(task)
        task.add_done_callback(self._settled)
        return await asyncio.shield(task)

    async def forget(self, recipe_digest: str) -> None:
        """Frees the merged parameters of a recipe in every worker.

        Raises:
            EngineError: a worker could not.
        """
        self._kept -= {recipe_digest}
        await ask_all(self.engine, "cocktail_forget", recipe_digest)
        self._kept -= {recipe_digest}  # a mix that was on its way has told what was kept before

    async def status(self) -> StatusReply:
        """What the fence and the workers hold. Asks the workers through the engine: a hung engine gives no answer.

        Workers that do not hold what the fence lets requests in for poison it.

        Raises:
            EngineError: the workers could not answer, or disagree.
        """
        before = (self.fence.state, self.fence.resident, self._num_swaps)
        probed: ProbedWorker = await ask_all(self.engine, "cocktail_probe")
        weight_version = await self.engine.get_weight_version()
        after = (self.fence.state, self.fence.resident, self._num_swaps)
        settled = before == after and self.fence.state == "open"
        if settled and not (probed["digest"] == weight_version == self.fence.resident):
            self.fence.poison(
                f"the workers hold {probed['digest']}, weight version {weight_version}, "
                f"while requests for {self.fence.resident} were let in"
            )
        return {
            "resident": self.fence.resident,
            "state": self.fence.state,
            "in_flight": self.fence.in_flight,
            "mixing_path": self._mixing_path,
            "streams_because": self._streams_because,
            "captured": probed["captured"],
            "captured_bytes": probed["captured_bytes"],
            "mixing_kernel": probed["mixing_kernel"],
            "cached": probed["cached"],
            "cached_bytes": probed["cached_bytes"],
            "cache_bytes": self.manifest.cache_bytes,
            "weight_version": weight_version,
            "model_dtype": probed["model_dtype"],
            "managed": self.fence.managed,
        }

    def _require_same(self, loaded: ProbeAnswer, reloaded: ProbeAnswer) -> None:
        """Raises ConfigError where the base, reloaded, is not the model that the engine was started with."""
        moved = loaded.moved(reloaded)
        if moved > TOLERANCE[self.manifest.dtype]:
            raise ConfigError(
                f"this build of vLLM reloads the base into another model: its log-probabilities moved by {moved:.3g} "
                "nats, so every mixture would answer by other parameters than its own. Mix offline and serve the "
                "folder: cocktail-serve mix ... --out"
            )

    async def _capture(self) -> None:
        """Has all ranks keep their parts of the models, or none.

        Raises:
            EngineError: a rank failed half-way: the engine is lost.
        """
        started = time.perf_counter()
        replies: list[CapturedWorker] = await ask_ranks(self.engine, "cocktail_capture")
        self._streams_because = next((reply["reason"] for reply in replies if reply["reason"] is not None), None)
        if self._streams_because is None:
            self._mixing_path = "in_place"
            logger.info("cocktail: experts captured and verified in %.1f s", time.perf_counter() - started)
        else:
            logger.info("cocktail: mixtures are streamed: %s", self._streams_because)
            await ask_all(self.engine, "cocktail_release")

    async def _mix(self, recipe: Recipe, drain_s: float) -> MixReply:
        async with self._mixing:
            started = time.perf_counter()
            previous = self.fence.resident
            if previous is None:
                raise EngineError(
                    "the engine lost its parameters in an earlier mix; end its process", code="mix_failed"
                )
            if recipe.digest == previous:
                return {"resident": previous, "seconds": time.perf_counter() - started, "source": "resident"}
            if recipe.digest not in self._kept:  # what is kept was right before
                try:
                    await ask_all(self.engine, "cocktail_check", json.dumps(recipe.to_json()))
                except EngineError as error:
                    raise recipe_error(error) from error
            self.fence.close()
            if not await self.fence.until_empty(drain_s):
                in_flight = self.fence.in_flight
                self.fence.open({previous})
                raise CapacityError(f"{in_flight} requests were still in flight after {drain_s:g} s", code="busy")
            try:
                source = await self._swap(recipe)
            except BaseException as error:
                self.fence.poison(f"mixing {recipe.digest} failed: {error}")
                raise EngineError(f"mixing {recipe.digest} failed: {error}", code="mix_failed") from error
            self.fence.open({recipe.digest})
            return {"resident": recipe.digest, "seconds": time.perf_counter() - started, "source": source}

    async def _swap(self, recipe: Recipe) -> ParameterSource:
        """Replaces the parameters of an engine that no request can reach.

        What vLLM still holds belongs to clients that have gone: it cancels a request's handler without waiting until
        the abort is sent. A request still queued in a pause that waits would run after the resume, on the new
        parameters, and leave KV blocks under the old recipe's salt. So the pause does not rely on the aborts: it ends
        every request itself and returns when the engine is idle. An abort that arrives later finds nothing.
        """
        self._num_swaps += 1
        # with salts, blocks of every recipe stay valid; without, they would be read by the next one
        await self._pause(clear_cache=not self.fence.managed)
        mixed: MixedWorker = await ask_all(self.engine, "cocktail_mix", json.dumps(recipe.to_json()))
        self._kept = frozenset(mixed["cached"])
        if mixed["digest"] != recipe.digest:
            raise EngineError(f"the workers mixed {mixed['digest']} instead of {recipe.digest}")
        await self.engine.update_weight_version(recipe.digest)
        if self.engine.model_config.is_multimodal_model:
            # what the encoder made of an image carries no salt
            await self.engine.reset_mm_cache()
            await self.engine.reset_encoder_cache()
        await self.engine.resume_generation()
        return mixed["source"]

    async def _pause(self, *, clear_cache: bool) -> None:
        """Pauses vLLM and returns when it is idle.

        `pause_generation` asks the engine for that and then waits another 20 ms, so that callers see the last answers
        of requests in flight before it returns. Here none is in flight: the engine itself is asked, where it can be.
        """
        core: Any = getattr(self.engine, "engine_core", None)
        if clear_cache or not hasattr(core, "pause_scheduler_async"):
            await self.engine.pause_generation(mode="abort", clear_cache=clear_cache)
        else:
            await core.pause_scheduler_async(mode="abort", clear_cache=False)

    def _settled(self, task: asyncio.Task[MixReply]) -> None:
        """Lets a finished mix go, its outcome marked as seen even if its caller has gone."""
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()
