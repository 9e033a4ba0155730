"""sentence-transformers inside this process: one model, one thread that owns it, many recipes.

On the event loop: who is admitted, which parameters a request holds, how long it waits. The work itself is the
pipeline's, on threads of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch

from cocktail_serve.config import PoolConfig, SentenceTransformersEngineConfig
from cocktail_serve.engines.base import Embedded, EngineHealth, EngineState
from cocktail_serve.engines.batching import PassLimits
from cocktail_serve.engines.embedding_pipeline import EmbeddingPipeline, EmbeddingRequest
from cocktail_serve.engines.encoder import Encoder
from cocktail_serve.engines.parameter_cache import Mixture, ParameterCache, Params
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    InvalidMixError,
    InvalidRequestError,
    ModelNotReadyError,
    QueueTimeoutError,
)
from cocktail_serve.examples import ExampleSet, RetrievalExample
from cocktail_serve.pool import BASE, Pool
from cocktail_serve.recipe import DType, Recipe, one_hot

MAX_WAITING_INPUTS = 65_536
"""Inputs of all requests that wait or run: 32 of the largest requests. Beyond it, new ones are turned away."""

_PASS_LIMITS = {
    # A CPU is busy with a few hundred tokens, and larger passes fall out of its caches; starting one costs some 5 ms.
    "cpu": PassLimits(max_tokens=1024, pass_tokens=64),
    # A GPU needs thousands of tokens to be busy, and computes thousands in the time it takes to start a pass.
    "cuda": PassLimits(max_tokens=32_768, pass_tokens=4096),
}


class SentenceTransformersEngine:
    """An `EmbeddingEngine`.

    The base's own parameters are the model's and always resident. All others, the experts as they are included, are
    mixed into memory and kept within `engine.cache_bytes`; none is served from mapped files, which may change or go
    away under the server.
    """

    def __init__(self, pool: Pool, pool_config: PoolConfig) -> None:
        config = pool_config.engine
        if not isinstance(config, SentenceTransformersEngineConfig):
            raise ConfigError(f"pool {pool.id!r}: engine.type must be sentence_transformers, not {config.type!r}")
        self.pool = pool
        self.dtype: DType = cast(DType, pool.base.dtype) if config.dtype == "auto" else config.dtype
        self.stats = EngineStats()
        self._config = config
        self._truncates = pool_config.truncate
        self._device = _device(config.device)
        self._base_recipe = one_hot(pool, BASE, dtype=self.dtype)
        self._folders = {member.fingerprint: member.path for member in pool}
        self._pipeline = EmbeddingPipeline(
            pool.id,
            self._load,
            limits=_pass_limits(self._device, config.max_batch_tokens),
            max_request_tokens=config.max_input_tokens,
            on_loaded=self._tell(self._on_loaded),
            on_failed=self._tell(self._on_failed),
            on_over=self._tell(self._on_over),
        )
        self._mixing = ThreadPoolExecutor(1, thread_name_prefix=f"{pool.id}-mixer")
        self._state: EngineState = "stopped"
        self._failure: BaseException | None = None
        self._is_settled = asyncio.Event()  # no longer starting
        self._num_waiting = 0
        self._loop: asyncio.AbstractEventLoop
        self._encoder: Encoder | None = None
        self._cache: ParameterCache  # from the moment there is an encoder

    @property
    def dimension(self) -> int:
        """Size of an embedding. Raises ModelNotReadyError until the model is loaded."""
        return self._loaded.dimension

    @property
    def max_length(self) -> int:
        """Tokens of an input, special ones included. Raises ModelNotReadyError until the model is loaded."""
        return self._loaded.max_length

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
        if self._encoder is not None:
            await self._cache.close()
            self._encoder = None

    async def health(self, *, deadline_s: float) -> EngineHealth:
        state, detail = self._state, {"device": str(self._device)}
        if self._failure is not None:
            detail["reason"] = str(self._failure)
        elif state == "ready":
            answer = self._pipeline.call(lambda: None)
            done, _ = await asyncio.wait([asyncio.wrap_future(answer)], timeout=deadline_s)
            if not done or answer.cancelled():
                state, detail["reason"] = "failed", f"the model's thread did not answer within {deadline_s:g} s"
        cached = {"cached": self._cache.digests, "cached_bytes": self._cache.num_bytes} if self._encoder else {}
        return EngineHealth(state, queued=self._num_waiting, detail=detail | cached)

    async def check_examples(self, examples: ExampleSet) -> None:
        if self._truncates:
            return
        encoder = await self._ready()
        rows = [example for example in examples if isinstance(example, RetrievalExample)]
        texts = [text for row in rows for text in (row.query, *row.pos, *row.neg)]
        encoded: list[list[int]] = await asyncio.wrap_future(self._pipeline.tokenize(texts))
        lengths = iter(map(len, encoded))
        for number, row in enumerate(rows, start=1):
            for key in (
                "query",
                *(f"pos[{i}]" for i in range(len(row.pos))),
                *(f"neg[{i}]" for i in range(len(row.neg))),
            ):
                length = next(lengths)
                if length > encoder.max_length:
                    raise ContextLengthError(
                        f"row {number}: {key!r} has {length} tokens, but the model takes at most {encoder.max_length}; "
                        "shorten it, or set the pool's truncate",
                        param="examples",
                    )

    async def materialise(self, recipe: Recipe) -> None:
        await self._ready()
        self._check_recipe(recipe)
        self._cache.release(await self._cache.lease(recipe))

    def forget(self, recipe_digest: str) -> None:
        if self._encoder is not None:
            self._cache.forget(recipe_digest)

    async def embed(
        self,
        recipe: Recipe,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        *,
        prompt: str = "",
        truncate_to: int | None = None,
        dimensions: int | None = None,
        background: bool = False,
    ) -> Embedded:
        encoder = await self._ready()
        self._check_recipe(recipe)
        truncate_to = self._truncation(encoder, truncate_to)
        if dimensions is not None and not 1 <= dimensions <= encoder.dimension:
            raise InvalidRequestError(
                f"dimensions must lie between 1 and {encoder.dimension}, got {dimensions}", param="dimensions"
            )
        if not inputs:
            return Embedded(np.empty((0, dimensions or encoder.dimension), dtype=np.float32), 0)
        arrived_at = time.monotonic()
        with self._admitted(len(inputs)):
            mixture = await self._lease(recipe, background)
            try:
                request = EmbeddingRequest(
                    recipe_digest=recipe.digest,
                    params=mixture.params,
                    inputs=inputs,
                    prompt=prompt,
                    truncate_to=truncate_to,
                    dimensions=dimensions,
                    background=background,
                    handle=self._loop.create_future(),
                )
                vectors = await self._run(request, arrived_at)
            finally:
                self._cache.release(mixture)
        return Embedded(vectors, request.num_tokens)

    @property
    def _loaded(self) -> Encoder:
        if self._encoder is None:
            raise ModelNotReadyError(f"pool {self.pool.id!r} is {self._state}")
        return self._encoder

    async def _ready(self) -> Encoder:
        if self._state == "starting":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.queue_timeout_s):
                    await self._is_settled.wait()
        if self._failure is not None:
            raise EngineError(f"pool {self.pool.id!r} has failed: {self._failure}") from self._failure
        return self._loaded

    def _check_recipe(self, recipe: Recipe) -> None:
        if recipe.dtype != self.dtype:
            raise InvalidMixError(
                f"the recipe rounds to {recipe.dtype}, but pool {self.pool.id!r} runs in {self.dtype}"
            )

    @contextlib.contextmanager
    def _admitted(self, num_inputs: int) -> Iterator[None]:
        if self._num_waiting and self._num_waiting + num_inputs > MAX_WAITING_INPUTS:
            self.stats.num_queue_timeouts += 1
            raise QueueTimeoutError(
                f"pool {self.pool.id!r} has {self._num_waiting} inputs waiting and takes no more until some are done"
            )
        self._num_waiting += num_inputs
        try:
            yield
        finally:
            self._num_waiting -= num_inputs

    def _truncation(self, encoder: Encoder, truncate_to: int | None) -> int | None:
        if truncate_to is None and not self._truncates:
            return None
        cut = encoder.max_length if truncate_to is None else min(truncate_to, encoder.max_length)
        encoder.tokenizer.check_truncation(cut)
        return cut

    async def _lease(self, recipe: Recipe, background: bool) -> Mixture:
        if background or self._cache.is_ready(recipe.digest):
            return await self._cache.lease(recipe)
        try:
            async with asyncio.timeout(self._config.queue_timeout_s):
                return await self._cache.lease(recipe)
        except TimeoutError:
            raise self._queue_timeout() from None

    async def _run(self, request: EmbeddingRequest, arrived_at: float) -> np.ndarray:
        """Waits for the request; one whose caller goes, or whose turn does not come in time, is taken back."""
        timer = None
        if not request.background:
            left_s = arrived_at + self._config.queue_timeout_s - time.monotonic()
            timer = self._loop.call_later(left_s, self._expire, request)
        try:
            self._pipeline.submit(request)
            vectors: np.ndarray = await request.handle
        finally:
            request.abandoned = True
            if timer is not None:
                timer.cancel()
        if not request.background and request.started_at is not None:
            self.stats.wait.observe(request.started_at - arrived_at)
        return vectors

    def _expire(self, request: EmbeddingRequest) -> None:
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
        params = await self._loop.run_in_executor(self._mixing, self._loaded.mix, recipe, self._folders)
        self.stats.swap.observe(time.monotonic() - started_at)
        self.stats.num_swaps_by_source["files"] = self.stats.num_swaps_by_source.get("files", 0) + 1
        return params

    async def _unbind(self, params: Params) -> None:
        encoder = self._loaded
        await asyncio.wrap_future(self._pipeline.call(lambda: encoder.unbind(params)))

    def _load(self) -> Encoder:
        encoder = Encoder(self.pool.base.path, dtype=self.dtype, device=self._device)
        if encoder.mixture_bytes > self._config.cache_bytes:
            raise ConfigError(
                f"pool {self.pool.id!r}: engine.cache_bytes is {self._config.cache_bytes}, but the parameters of one "
                f"mixture take {encoder.mixture_bytes}; raise it to that at least",
                param="engine.cache_bytes",
            )
        encoder.check_names(self._base_recipe, self._folders)
        return encoder

    def _on_loaded(self, encoder: Encoder) -> None:
        if self._state != "starting":
            return
        self._encoder = encoder
        self._cache = ParameterCache(
            self._mix, self._unbind, mixture_bytes=encoder.mixture_bytes, max_bytes=self._config.cache_bytes
        )
        self._cache.pin(self._base_recipe.digest, encoder.own_params)
        self._state = "ready"
        self._is_settled.set()

    def _on_failed(self, error: BaseException) -> None:
        if self._state != "stopped":
            self._state = "failed"
            self._failure = error
            self._is_settled.set()

    def _on_over(self, requests: list[EmbeddingRequest]) -> None:
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


def _pass_limits(device: torch.device, max_tokens: int | None) -> PassLimits:
    limits = _PASS_LIMITS["cpu" if device.type == "cpu" else "cuda"]
    return limits if max_tokens is None else PassLimits(max_tokens, limits.pass_tokens)
