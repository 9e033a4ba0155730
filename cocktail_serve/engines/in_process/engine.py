"""sentence-transformers inside this process: one model, a few threads that compute with it, many recipes.

On the event loop: who is admitted, which parameters a request holds, how long it waits. The work itself is the
pipeline's, on threads of its own. What goes in and comes out is the matter of `embedding` and `reranking`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from cocktail_serve.config import PoolConfig, SentenceTransformersEngineConfig
from cocktail_serve.engines.base import OPERATOR_RETRY_S, MixedAhead, Tokenized
from cocktail_serve.engines.engine_time import CallTimer
from cocktail_serve.engines.in_process.batching import PassLimits
from cocktail_serve.engines.in_process.parameter_cache import CachedMixture, ParameterCache, Params
from cocktail_serve.engines.in_process.pipeline import ModelJob, Pipeline, give_way
from cocktail_serve.engines.in_process.swappable import SwappableModel
from cocktail_serve.engines.recipe_names import NamesOf, named_recipe, no_names
from cocktail_serve.engines.replica_numbers import check_replica
from cocktail_serve.engines.scheduler_snapshot import SchedulerSnapshot
from cocktail_serve.engines.snapshot import EngineDetail, EngineSnapshot, EngineState
from cocktail_serve.engines.start_failures import REMEDY
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.errors import (
    ConfigError,
    EngineError,
    InvalidMixError,
    InvalidRequestError,
    ModelNotReadyError,
    QueueTimeoutError,
)
from cocktail_serve.examples import ExampleSet
from cocktail_serve.pool import BASE, Pool
from cocktail_serve.recipe import Recipe, one_hot

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=SwappableModel)

MAX_WAITING_INPUTS = 65_536
"""Inputs of all requests that wait or run: 32 of the largest requests. Beyond it, new ones are turned away; those of
one tenant beyond half of it, so that its flood does not have others turned away."""

_PASS_LIMITS = {
    # A CPU is busy with a few hundred tokens, and larger passes fall out of its caches; starting one costs some 5 ms.
    "cpu": PassLimits(max_tokens=1024, pass_tokens=64),
    # A GPU needs thousands of tokens to be busy, and computes thousands in the time it takes to start a pass.
    "cuda": PassLimits(max_tokens=32_768, pass_tokens=4096),
}


PROBES = ("a text", "and a longer one, so that the first is padded")
"""What a model computes before it is said to be loaded."""

MAX_DEFAULT_PASSES = 4
"""Passes at once on a CPU of as many cores or more, where the configuration does not say. Threads of one pass wait for
each other after every operator; those of two never do."""

_NUM_THREADS = torch.get_num_threads()
"""What torch takes from the machine (or `OMP_NUM_THREADS`) before anything here sets it for a thread."""


class SentenceTransformersEngine(Generic[M]):
    """What encoders and rerankers have in common.

    The base's own parameters are the model's and always resident. All others, the experts as they are included, are
    mixed into memory and kept within `engine.cache_bytes`; none is served from mapped files, which may change or go
    away under the server.
    """

    def __init__(self, pool: Pool, pool_config: PoolConfig) -> None:
        config = pool_config.engine
        if not isinstance(config, SentenceTransformersEngineConfig):
            raise ConfigError(f"pool {pool.id!r}: engine.type must be sentence_transformers, not {config.type!r}")
        self.pool = pool
        self.dtype = config.dtype_over(pool.base)
        self.stats = EngineStats()
        self._config = config
        self._pool_config = pool_config
        self._truncates = pool_config.truncate
        self._device = _device(config.device)
        self._base_recipe = one_hot(pool, BASE, dtype=self.dtype)
        self._members = pool.by_fingerprint
        num_passes, threads_per_pass = _passes(self._device, config.concurrent_passes)
        overtakes = self._device.type == "cpu"  # a GPU computes what it is given in order
        self._pipeline: Pipeline[M, ModelJob[M]] = Pipeline(
            pool.id,
            self._load,
            num_passes=num_passes,
            overtakes=overtakes,
            threads_per_pass=threads_per_pass,
            limits=_pass_limits(self._device, config.max_batch_tokens),
            max_request_tokens=config.max_input_tokens,
            on_loaded=self._tell(self._on_loaded),
            on_failed=self._tell(self._on_failed),
            on_retry=self._tell(self._on_retry),
            on_over=self._tell(self._on_over),
        )
        self._mixing = ThreadPoolExecutor(
            1,
            thread_name_prefix=f"{pool.id}-mixer",
            initializer=_prepare_to_mix,
            initargs=(overtakes,),
        )
        self._names_of: NamesOf = no_names
        self._state: EngineState = "stopped"
        self._failure: BaseException | None = None  # of the start; while it is tried again, of the last try
        self._is_settled = asyncio.Event()  # no longer starting
        self._num_waiting = 0
        self._waiting_of: dict[str, int] = {}  # by tenant
        self._num_requests = 0
        self._is_drained = False
        self._loop: asyncio.AbstractEventLoop
        self._model: M | None = None
        self._cache: ParameterCache  # from the moment there is a model

    @property
    def max_length(self) -> int:
        """Tokens of an input, special ones included. Raises ModelNotReadyError until the model is loaded."""
        return self._loaded.max_length

    @property
    def max_model_len(self) -> int | None:
        return None if self._model is None else self._model.max_length

    def name_recipes(self, names_of: NamesOf) -> None:
        self._names_of = names_of

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._state = "starting"
        self._pipeline.start()

    async def stop(self) -> None:
        if self._state == "stopped":
            return
        self._state = "stopped"
        self._is_settled.set()
        await asyncio.to_thread(self._pipeline.stop)
        self._mixing.shutdown(wait=False, cancel_futures=True)
        if self._model is not None:
            await self._cache.close()
            self._model = None

    async def snapshot(self, *, deadline_s: float) -> EngineSnapshot:
        state: EngineState = self._state
        detail: EngineDetail = {"device": str(self._device)}
        if self._failure is not None:
            detail["reason"] = f"{self._failure}; {REMEDY}" if state == "failed" else str(self._failure)
        elif state == "ready":
            answers = self._pipeline.call_each(lambda _: None)
            _, missing = await asyncio.wait(map(asyncio.wrap_future, answers), timeout=deadline_s)
            if missing or any(answer.cancelled() for answer in answers):
                state, detail["reason"] = "failed", f"a model's thread did not answer within {deadline_s:g} s"
        if self._model is not None:
            detail["cached"], detail["cached_bytes"] = self._cache.digests, self._cache.num_bytes
        return EngineSnapshot(
            state,
            num_queued=self._num_waiting,
            detail=detail,
            scheduler=SchedulerSnapshot(phase=None, num_in_flight=self._num_requests, is_drained=self._is_drained),
            counters=self.stats.copy(),
        )

    def drain(self, is_drained: bool, *, replica: int | None = None) -> None:
        check_replica(replica)
        self._is_drained = is_drained

    def pin(self, recipe: Recipe | None, *, replica: int | None = None) -> None:
        check_replica(replica)
        if recipe is not None:
            raise InvalidRequestError(
                f"pool {self.pool.id!r} serves its recipes side by side: there are no turns to pin one in", param="pin"
            )

    async def change_pool(self, pool: Pool) -> None:
        self._members = pool.by_fingerprint
        self.pool = pool

    @abstractmethod
    async def check_examples(self, examples: ExampleSet) -> None: ...

    async def mix_ahead(self, recipe: Recipe) -> MixedAhead:
        with CallTimer() as timer:
            await self._ready()
            self._check_recipe(recipe)
            started = time.monotonic()
            self._cache.release(await self._cache.lease(recipe))
            timer.add(mixing_s=time.monotonic() - started)
        return MixedAhead(timer.time)

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> Tokenized:
        tokens_of = partial(self._loaded.tokenizer.tokens_of, text, add_special_tokens=add_special_tokens)
        return Tokenized(*await asyncio.wrap_future(self._pipeline.with_tokenizer(tokens_of)))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        text_of = partial(self._loaded.tokenizer.text_of, token_ids)
        return await asyncio.wrap_future(self._pipeline.with_tokenizer(text_of))

    def forget(self, recipe_digest: str) -> None:
        if self._model is not None:
            self._cache.forget(recipe_digest)

    async def _compute(
        self,
        recipe: Recipe,
        num_inputs: int,
        make: Callable[..., ModelJob[M]],
        timer: CallTimer,
        *,
        background: bool,
        tenant: str,
    ) -> tuple[np.ndarray, int]:
        """Runs a request through the model under a recipe.

        Args:
            make: the request, given what all requests have.
            timer: told how long background work took.

        Returns:
            What it computed, `[N, D]` float32, and the tokens it read.
        """
        arrived_at = time.monotonic()
        with self._admitted(num_inputs, tenant):
            mixture = await self._lease(recipe, background)
            try:
                request = make(
                    recipe_digest=recipe.digest,
                    params=mixture.params,
                    background=background,
                    tenant=tenant,
                    handle=self._loop.create_future(),
                )
                rows = await self._run(request, arrived_at)
            finally:
                self._cache.release(mixture)
            if background and request.started_at is not None:
                timer.add(scoring_s=time.monotonic() - request.started_at)
        return rows, request.num_tokens

    @property
    def _loaded(self) -> M:
        if self._model is None:
            why = f": {self._failure}" if self._failure is not None else ""
            raise ModelNotReadyError(f"pool {self.pool.id!r} is {self._state}{why}")
        return self._model

    async def _ready(self) -> M:
        if self._state == "starting":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.queue_timeout_s):
                    await self._is_settled.wait()
        if self._state == "failed":
            raise EngineError(f"pool {self.pool.id!r} has failed: {self._failure}; {REMEDY}") from self._failure
        return self._loaded

    def _check_recipe(self, recipe: Recipe) -> None:
        if recipe.dtype != self.dtype:
            raise InvalidMixError(
                f"the recipe rounds to {recipe.dtype}, but pool {self.pool.id!r} runs in {self.dtype}"
            )

    @contextlib.contextmanager
    def _admitted(self, num_inputs: int, tenant: str) -> Iterator[None]:
        if self._is_drained:
            raise ModelNotReadyError("the operator drains this engine; ask again later", retry_after_s=OPERATOR_RETRY_S)
        of_tenant = self._waiting_of.get(tenant, 0)
        is_full = self._num_waiting and self._num_waiting + num_inputs > MAX_WAITING_INPUTS
        if is_full or (of_tenant and of_tenant + num_inputs > MAX_WAITING_INPUTS // 2):
            self.stats.num_queue_timeouts += 1
            waiting = self._num_waiting if is_full else of_tenant
            raise QueueTimeoutError(
                f"pool {self.pool.id!r} has {waiting} inputs waiting and takes no more until some are done"
            )
        self._num_requests += 1
        self._num_waiting += num_inputs
        self._waiting_of[tenant] = of_tenant + num_inputs
        try:
            yield
        finally:
            self._num_requests -= 1
            self._num_waiting -= num_inputs
            self._waiting_of[tenant] -= num_inputs
            if not self._waiting_of[tenant]:
                del self._waiting_of[tenant]

    def _truncation(self, model: M, truncate_to: int | None, *, is_pair: bool) -> int | None:
        if truncate_to is None and not self._truncates:
            return None
        cut = model.max_length if truncate_to is None else min(truncate_to, model.max_length)
        model.tokenizer.check_truncation(cut, is_pair=is_pair)
        return cut

    async def _lease(self, recipe: Recipe, background: bool) -> CachedMixture:
        is_ready = self._cache.is_ready(recipe.digest)
        self.stats.num_cache_hits += is_ready
        self.stats.num_cache_misses += not is_ready
        if background or is_ready:
            return await self._cache.lease(recipe)
        try:
            async with asyncio.timeout(self._config.queue_timeout_s):
                return await self._cache.lease(recipe)
        except TimeoutError:
            raise self._queue_timeout() from None

    async def _run(self, request: ModelJob[M], arrived_at: float) -> np.ndarray:
        """Waits for the request; one whose caller goes, or whose turn does not come in time, is taken back."""
        timer = None
        if not request.background:
            left_s = arrived_at + self._config.queue_timeout_s - time.monotonic()
            timer = self._loop.call_later(left_s, self._expire, request)
        try:
            self._pipeline.submit(request)
            rows: np.ndarray = await request.handle
        finally:
            request.abandoned = True
            if timer is not None:
                timer.cancel()
        if not request.background and request.started_at is not None:
            self.stats.wait.observe(request.started_at - arrived_at)
        return rows

    def _expire(self, request: ModelJob[M]) -> None:
        if request.started_at is None and not request.handle.done():
            request.abandoned = True
            request.handle.set_exception(self._queue_timeout())

    def _queue_timeout(self) -> QueueTimeoutError:
        self.stats.num_queue_timeouts += 1
        return QueueTimeoutError(
            f"pool {self.pool.id!r} is busy: the request waited {self._config.queue_timeout_s:g} s for its turn"
        )

    async def _mix(self, recipe: Recipe) -> Params:
        started_at = time.monotonic()
        params = await self._loop.run_in_executor(self._mixing, self._loaded.mix, recipe, self._members)
        seconds = time.monotonic() - started_at
        self.stats.observe_swap(seconds)
        self.stats.observe_mix(seconds, source="files")
        named = named_recipe(recipe.digest, self._names_of)
        logger.info("%s: recipe %s from files in %.3f s", self.pool.id, named, seconds)
        return params

    async def _unbind(self, params: Params) -> None:
        await asyncio.gather(*map(asyncio.wrap_future, self._pipeline.call_each(lambda model: model.unbind(params))))

    def _load(self) -> M:
        model = self._open_model()
        if model.mixture_bytes > self._config.cache_bytes:
            raise ConfigError(
                f"pool {self.pool.id!r}: engine.cache_bytes is {self._config.cache_bytes}, but the parameters of one "
                f"mixture take {model.mixture_bytes}; raise it to that at least",
                param="engine.cache_bytes",
            )
        model.check_names(self._base_recipe, self._members)
        with torch.inference_mode():
            self._check_model(model)
        return model

    @abstractmethod
    def _open_model(self) -> M:
        """The base's model, on the device of the engine."""

    @abstractmethod
    def _check_model(self, model: M) -> None:
        """Computes what a request would, to see that it can be, and holds the pool's settings to the model.

        Raises:
            CocktailError: no request could be answered, or none that uses the setting.
        """

    def check_start(self) -> Sequence[str]:
        self._load()
        return ()

    def _check_rows(self, rows: np.ndarray) -> None:
        """Raises ConfigError for numbers computed of plain texts that are none."""
        if not np.isfinite(rows).all():
            raise ConfigError(
                f"pool {self.pool.id!r}: of a plain text the base computes NaN or infinity in {self.dtype}: its "
                "parameters are not finite, or need the range of another dtype; set engine.dtype to bfloat16 or float32"
            )

    def _on_loaded(self, model: M) -> None:
        if self._state not in ("starting", "restarting"):
            return
        self._model = model
        self._cache = ParameterCache(
            self._mix, self._unbind, mixture_bytes=model.mixture_bytes, max_bytes=self._config.cache_bytes
        )
        self._cache.pin(self._base_recipe.digest, model.own_params)
        self._state, self._failure = "ready", None
        self._is_settled.set()

    def _on_failed(self, error: BaseException) -> None:
        if self._state != "stopped":
            self._state = "failed"
            self._failure = error
            self._is_settled.set()

    def _on_retry(self, error: Exception) -> None:
        logger.warning("%s: the model could not be loaded, which is tried again: %s", self.pool.id, error)
        if self._state in ("starting", "restarting"):
            self.stats.num_restarts += 1
            self._state, self._failure = "restarting", error
            self._is_settled.set()

    def _on_over(self, requests: list[ModelJob[M]]) -> None:
        for request in requests:
            if request.handle.done():
                continue
            if request.error is not None:
                request.handle.set_exception(request.error)
            else:
                request.handle.set_result(request.vectors)

    def _tell(self, function: Callable[..., None]) -> Callable[..., None]:
        """The same function for another thread: it runs on the event loop, soon."""

        def soon(*args: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to hear it
                self._loop.call_soon_threadsafe(function, *args)

        return soon


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"engine.device {name!r} cannot be used: {error}", param="engine.device") from error


def _prepare_to_mix(beside_passes: bool) -> None:
    """Of the thread that mixes.

    Args:
        beside_passes: whether passes compute on the same cores: sums must not take those from them.
    """
    torch.set_num_threads(_NUM_THREADS)  # torch gives a new thread the number that was set last, which is a pass's
    if beside_passes:
        give_way()


def _passes(device: torch.device, num_passes: int | None) -> tuple[int, int]:
    """Passes at once, and the threads of each: on a CPU all of them together get its cores."""
    if num_passes is None:
        num_passes = min(MAX_DEFAULT_PASSES, _NUM_THREADS) if device.type == "cpu" else 1
    return num_passes, max(1, _NUM_THREADS // num_passes)


def _pass_limits(device: torch.device, max_tokens: int | None) -> PassLimits:
    limits = _PASS_LIMITS["cpu" if device.type == "cpu" else "cuda"]
    return limits if max_tokens is None else PassLimits(max_tokens, limits.pass_tokens)
