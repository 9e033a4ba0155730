"""A decoder pool in a vLLM server of its own: supervised, one resident recipe at a time, streams passed through."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import orjson

from cocktail_serve.config import VLLMEngineConfig
from cocktail_serve.engines.base import EngineHealth, EngineState, Forwarded
from cocktail_serve.engines.connections import Answer
from cocktail_serve.engines.effort import spend
from cocktail_serve.engines.fake import fake_args
from cocktail_serve.engines.lease import Lease
from cocktail_serve.engines.occupancy import Occupancy
from cocktail_serve.engines.residency import Residency
from cocktail_serve.engines.server import STATUS_PATH, EngineServer
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.errors import (
    CocktailError,
    ConfigError,
    DrainedError,
    EngineError,
    EngineTimeoutError,
    InvalidMixError,
    InvalidRequestError,
    ModelNotReadyError,
    StorageError,
)
from cocktail_serve.examples import ExampleSet
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import DType, Recipe
from cocktail_serve.scoring.text import TokenizedExample, tokenize_examples
from vllm_cocktail.fence import RECIPE_HEADER
from vllm_cocktail.launch import is_cpu_build, server_args, server_env
from vllm_cocktail.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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

BYTES_PER_TOKEN = 4
EXPECTED_OUTPUT_TOKENS = 128
"""What a request is charged at its admission: a guess, replaced by the answer's usage at its end."""

ABORT_S = 10.0
"""How long the engine may take to abort what we have given up, before a mix comes back as busy."""

BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Pauses before starts that follow failures in a row; the last one repeats."""

STABLE_S = 60.0
"""An engine that lived this long has not failed in a row."""

MAX_FAILED_STARTS = 3
"""Starts in a row that never became ready, after which those in line are sent away, while starts go on.

An engine that becomes ready and dies soon is another matter: who waits for it has a good chance to be served.
"""

HEARTBEAT_S = 10.0
HANG_S = 120.0
"""An engine that has not answered through its workers for so long, outside of a mix, is killed."""

SCORE_TOKENS = 4096
"""Tokens of one scoring request; between two the turn may be given up."""

MAX_DRAINED_SCORES = 3
"""Scoring requests of one job ended by `drain_s` in a row before the job fails."""

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

_FINISHED = b'"finish_reason":"'
_ABORTED = b'"finish_reason":"abort"'


@contextlib.contextmanager
def _scoring() -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        spend(scoring_s=time.monotonic() - started)


class VLLMEngine:
    """A `GenerationEngine` over vLLM's OpenAI server with the cocktail plugin, or over the fake of it.

    Args:
        pool: a decoder pool whose members lie in local folders.
        config: `type: fake` starts `engines.fake` instead of vLLM; all else is the same.
        run_dir: folder for the manifest and the server's log.

    Raises:
        ConfigError: `args` or `env` set what is set here.
    """

    def __init__(self, pool: Pool, config: VLLMEngineConfig, *, run_dir: Path) -> None:
        self.pool = pool
        self.dtype: DType = pool.base.dtype if config.dtype == "auto" else config.dtype  # type: ignore[assignment]
        self.stats = EngineStats()
        self._config = config
        self._run_dir = run_dir
        self._manifest_path = run_dir / f"{pool.id}.manifest.json"
        self._log = run_dir / f"{pool.id}.log"
        self._manifest = self._manifest_of(pool)
        self._salt_key = secrets.token_bytes(32)
        self._state: EngineState = "starting"
        self._failure = ""
        self._max_model_len = config.max_model_len
        self._server: EngineServer | None = None
        self._lost: asyncio.Future[NoReturn] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._forgetting: set[asyncio.Task[None]] = set()
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix=f"tokenizer-{pool.id}")
        self._tokenizer: asyncio.Future[PreTrainedTokenizerFast] | None = None
        self._last_mix_s = 0.0
        self._residency = Residency(
            self._mix,
            slice_s=config.slice_s,
            drain_s=config.drain_s,
            background_delay_s=BACKGROUND_DELAY_SLICES * config.slice_s,
            patience_s=min(PATIENCE_SLICES * config.slice_s, PATIENCE_SHARE * config.queue_timeout_s),
            max_in_flight=_max_in_flight(config),
            stats=self.stats,
        )
        self._launch(Path("engine.sock"), "")  # a configuration that cannot be used fails here, not in the background

    async def start(self) -> None:
        if self._supervisor is None:
            self._write(self._manifest)
            self._supervisor = asyncio.create_task(self._supervise(), name=f"engine-{self.pool.id}")
            self._load_tokenizer()

    async def stop(self) -> None:
        self._state = "stopped"
        self._residency.fail_waiting(lambda: ModelNotReadyError("the server is shutting down"))
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        for task in list(self._forgetting):
            task.cancel()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def health(self, *, deadline_s: float) -> EngineHealth:
        queued = self._residency.num_waiting
        server = self._server
        if self._state != "ready" or server is None:
            # the first line alone: what follows is the end of the server's log, which is the operator's
            reason = self._failure.partition("\n")[0] or self._state
            return EngineHealth(self._state, queued=queued, detail={"reason": reason})
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
        manifest = self._manifest_of(pool)
        if self._supervisor is not None:
            # the server's workers read it again when a recipe names a model that they do not know
            await asyncio.to_thread(self._write, manifest)
        self._manifest, self.pool = manifest, pool

    async def check_examples(self, examples: ExampleSet) -> None:
        await self._tokenize(examples)

    async def score(self, recipe: Recipe, examples: ExampleSet) -> list[float]:
        tokenized = await self._tokenize(examples)
        losses: list[float] = []
        num_drained = 0
        while len(losses) < len(tokenized):
            try:
                with await self._turn(recipe, background=True) as lease, _scoring():
                    losses += await self._score_some(lease, recipe, tokenized[len(losses) :])
                num_drained = 0
            except DrainedError:
                num_drained += 1
                if num_drained == MAX_DRAINED_SCORES:
                    raise
        return losses

    async def materialise(self, recipe: Recipe) -> None:
        with await self._turn(recipe, background=True):
            pass  # resident once is enough: the worker keeps merged parameters in its cache

    def forget(self, recipe_digest: str) -> None:
        if self._server is not None:
            task = asyncio.create_task(self._forget(self._server, recipe_digest))
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)

    @contextlib.asynccontextmanager
    async def forward(
        self, recipe: Recipe, path: str, body: Mapping[str, Any], *, tenant: str
    ) -> AsyncIterator[Forwarded]:
        salt = self._cache_salt(tenant, recipe, body.get("cache_salt"))
        content = _dump({**body, "model": self.pool.id, "cache_salt": salt})
        headers = {RECIPE_HEADER: recipe.digest}
        num_tokens = len(content) // BYTES_PER_TOKEN + _expected_output(body)
        with await self._turn(recipe, tenant=tenant, num_tokens=num_tokens) as lease:
            with lease.interruptible():
                answer = await self._running.post(path, content, headers=headers)
            with contextlib.closing(answer):
                if answer.status == 200 and answer.headers.get("content-type", "").startswith("text/event-stream"):
                    self._check_answer(recipe, answer, b"")
                    # the engine must be rid of the request even while our reader is stuck
                    lease.on_end(answer.close)
                    yield Forwarded(answer.status, None, _events(answer, lease), lease.settle)
                    return
                with lease.interruptible():
                    whole = await _read(answer)
            self._check_answer(recipe, answer, whole)
            lease.release()  # the engine has done its part
            yield Forwarded(answer.status, whole, None, lease.settle)

    async def _turn(self, recipe: Recipe, *, tenant: str = "", num_tokens: int = 0, background: bool = False) -> Lease:
        if self._state in ("failed", "stopped"):
            raise ModelNotReadyError(f"the engine of pool {self.pool.id!r} is not available ({self._state})")
        timeout_s = None if background else self._config.queue_timeout_s
        num_mixes = self.stats.swap.count
        lease = await self._residency.acquire(
            recipe, tenant=tenant, num_tokens=num_tokens, background=background, timeout_s=timeout_s
        )
        if background and self.stats.swap.count > num_mixes:
            spend(mixing_s=self._last_mix_s)  # the last mix is the one that this turn began with
        return lease

    def _manifest_of(self, pool: Pool) -> Manifest:
        return Manifest.of_pool(
            pool,
            dtype=self.dtype,
            cache_bytes=int(self._config.cache_bytes),
            managed=True,
            expert_bytes=int(self._config.expert_memory),
        )

    def _write(self, manifest: Manifest) -> None:
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            manifest.write(self._manifest_path)
        except OSError as error:
            raise StorageError(f"cannot write the engine's manifest {self._manifest_path}: {error}") from error

    def _cache_salt(self, tenant: str, recipe: Recipe, client_salt: Any) -> str:
        """What keeps KV blocks of tenants and recipes apart: part of every block's hash inside the engine."""
        return hmac.digest(self._salt_key, _dump([tenant, recipe.digest, client_salt]), "sha256").hex()

    def _check_answer(self, recipe: Recipe, answer: Answer, content: bytes) -> None:
        """Lets only answers through that this recipe gave.

        Raises:
            EngineError: the engine failed, or it does not hold what we think it does.
        """
        answered_by = answer.headers.get(RECIPE_HEADER)
        if answer.status in (401, 409) or (answered_by is not None and answered_by != recipe.digest):
            reason = f"the engine answered {answer.status} under recipe {answered_by}, expected {recipe.digest}"
            self._lose(reason)
            raise EngineError(reason)
        if answer.status >= 500:
            raise EngineError(f"the engine failed: {_message_of(content)}")

    async def _score_some(self, lease: Lease, recipe: Recipe, tokenized: Sequence[TokenizedExample]) -> list[float]:
        """Losses of the first examples: all, unless the turn ends."""
        losses: list[float] = []
        for chunk in _chunks(tokenized):
            if losses and lease.should_yield:
                break
            examples = [{"token_ids": e.token_ids, "output_start": e.output_start} for e in chunk]
            try:
                with lease.interruptible():
                    status, body = await self._running.call(
                        "POST",
                        "/v1/cocktail/score",
                        {"examples": examples},
                        timeout_s=None,
                        headers={RECIPE_HEADER: recipe.digest},
                    )
            except DrainedError:
                if losses:
                    break
                raise
            if status != 200:
                raise EngineError(f"scoring failed with {status}: {_message_of(orjson.dumps(body))}")
            losses += body["losses"]
        return losses

    async def _mix(self, recipe: Recipe) -> bool:
        status, body = await self._running.call(
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
        message = _message_of(orjson.dumps(body))
        if status == 400:
            raise InvalidMixError(message)
        raise EngineError(f"mixing failed with {status}: {message}")

    async def _forget(self, server: EngineServer, recipe_digest: str) -> None:
        try:
            await server.call("POST", "/v1/cocktail/forget", {"digest": recipe_digest}, timeout_s=HANG_S)
        except CocktailError as error:
            # the cache is bounded anyway, and a new life starts with an empty one
            logger.info("%s: recipe %s was not forgotten: %s", self.pool.id, recipe_digest[:8], error)

    async def _supervise(self) -> None:
        """Life after life, until cancelled: whatever ends one, its processes are gone before the next begins."""
        loop = asyncio.get_running_loop()
        num_failures = num_failed_starts = 0
        while True:
            ready_at: float | None = None
            try:
                server = EngineServer(self._launch, log=self._log, start_timeout_s=self._config.start_timeout_s)
                async with server:
                    ready_at = loop.time()
                    await self._live(server)
            except CocktailError as error:
                self._failure = error.message
            except Exception:
                self._failure = "an error in cocktail-serve itself; see its log"
                logger.exception("%s: the engine's supervisor failed", self.pool.id)
            was_stable = ready_at is not None and loop.time() - ready_at > STABLE_S
            num_failures = 1 if was_stable else num_failures + 1
            num_failed_starts = num_failed_starts + 1 if ready_at is None else 0
            pause_s = BACKOFF_S[min(num_failures, len(BACKOFF_S)) - 1]
            logger.error("%s: engine lost, next start in %g s: %s", self.pool.id, pause_s, self._failure)
            self.stats.num_restarts += 1
            self._state = "restarting"
            if num_failed_starts >= MAX_FAILED_STARTS:
                self._state = "failed"
                self._residency.fail_waiting(
                    lambda: ModelNotReadyError(f"the engine of pool {self.pool.id!r} keeps failing", retry_after_s=30)
                )
            await asyncio.sleep(pause_s)

    async def _live(self, server: EngineServer) -> NoReturn:
        """One life of a server that is ready. Ends in the error that ended it."""
        _, models = await server.call("GET", "/v1/models", timeout_s=HANG_S)
        self._max_model_len = int(models["data"][0]["max_model_len"])
        self._lost = asyncio.get_running_loop().create_future()
        self._server = server
        tasks: list[asyncio.Future[NoReturn]] = [
            asyncio.create_task(self._residency.run(self._manifest.resident)),
            asyncio.create_task(_until_exit(server)),
            asyncio.create_task(self._until_hung(server)),
            self._lost,
        ]
        self._state, self._failure = "ready", ""
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await done.pop()
            raise AssertionError("what watches an engine only ends by raising")
        finally:
            if self._state == "ready":
                self._state = "restarting"
            self._server = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_hung(self, server: EngineServer) -> NoReturn:
        loop = asyncio.get_running_loop()
        answered = loop.time()
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                status, body = await server.call("GET", STATUS_PATH, timeout_s=HANG_S)
            except EngineTimeoutError:
                if not self._residency.is_mixing and loop.time() - answered > HANG_S:
                    raise
                continue
            if status != 200 or body["state"] == "poisoned":
                raise EngineError(f"the engine is lost: {status} {_message_of(orjson.dumps(body))}")
            answered = loop.time()

    def _lose(self, reason: str) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_exception(EngineError(reason))

    def _launch(self, socket: Path, key: str) -> tuple[list[str], dict[str, str]]:
        config, name = self._config, self.pool.id
        is_fake = config.type != "vllm"
        if is_fake:
            command = fake_args(
                uds=socket, served_model_name=name, max_model_len=config.max_model_len, extra=config.args
            )
        else:
            command = server_args(
                model=self.pool.base.path,
                uds=socket,
                served_model_name=name,
                dtype=self.dtype,
                max_model_len=config.max_model_len,
                extra=config.args,
                expert_bytes=int(config.expert_memory),
            )
        env = server_env(
            manifest=self._manifest_path,
            api_key=key,
            owner_pid=os.getpid(),
            args={} if is_fake else config.args,
            extra=config.env,
        )
        return command, env

    @property
    def _running(self) -> EngineServer:
        if self._server is None:
            raise EngineError("the engine has just gone; it is being restarted")
        return self._server

    def _load_tokenizer(self) -> asyncio.Future[PreTrainedTokenizerFast]:
        if self._tokenizer is None:
            loop = asyncio.get_running_loop()
            self._tokenizer = loop.run_in_executor(self._tokenizing, _read_tokenizer, self.pool.base.path)
            # a failure is raised where the tokenizer is needed; a pool may serve without
            self._tokenizer.add_done_callback(lambda future: future.cancelled() or future.exception())
        return self._tokenizer

    async def _tokenize(self, examples: ExampleSet) -> list[TokenizedExample]:
        if self._max_model_len is None:
            raise ModelNotReadyError(
                f"the engine of pool {self.pool.id!r} is starting, so its context length is not known yet"
            )
        if self._state == "stopped":
            raise ModelNotReadyError("the server is shutting down")
        max_tokens = self._max_model_len - 1
        tokenizer = await asyncio.shield(self._load_tokenizer())
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._tokenizing, lambda: tokenize_examples(tokenizer, examples, max_tokens=max_tokens)
        )


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer of {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{folder} has no fast tokenizer (tokenizer.json), which tells where an output starts")
    return tokenizer


def _max_in_flight(config: VLLMEngineConfig) -> int:
    if config.max_concurrency is not None:
        return config.max_concurrency
    for name, value in config.args.items():
        if name.lstrip("-").replace("_", "-") == "max-num-seqs":
            return int(value)
    return MAX_IN_FLIGHT_CPU if config.type == "vllm" and is_cpu_build() else MAX_IN_FLIGHT


def _expected_output(body: Mapping[str, Any]) -> int:
    wanted = body.get("max_completion_tokens") or body.get("max_tokens")
    return min(wanted, EXPECTED_OUTPUT_TOKENS) if isinstance(wanted, int) else EXPECTED_OUTPUT_TOKENS


def _chunks(tokenized: Sequence[TokenizedExample]) -> list[list[TokenizedExample]]:
    """In order, at most `SCORE_TOKENS` tokens each, at least one example."""
    chunks: list[list[TokenizedExample]] = []
    room = 0
    for example in tokenized:
        if not chunks or len(example.token_ids) > room:
            chunks.append([])
            room = SCORE_TOKENS
        chunks[-1].append(example)
        room -= len(example.token_ids)
    return chunks


def _dump(value: Any) -> bytes:
    """JSON of what came in as JSON.

    Raises:
        InvalidRequestError: an integer beyond 64 bits, or text that is no Unicode.
    """
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise InvalidRequestError(f"the body cannot be passed on as JSON: {error}") from error


async def _until_exit(server: EngineServer) -> NoReturn:
    raise EngineError(await server.exited())


async def _read(answer: Answer) -> bytes:
    try:
        return await answer.read()
    except OSError as error:
        raise EngineError(f"the engine's answer broke off: {error!r}") from error


async def _events(answer: Answer, lease: Lease) -> AsyncIterator[bytes]:
    """Payloads of a stream of server-sent events, without `[DONE]`.

    `[DONE]` alone is no success: vLLM sends it after an error too.

    Raises:
        EngineError: an error event, or an end before the answer was finished.
        InvalidRequestError: the engine found a fault in the request after it had begun to answer.
        DrainedError: the lease was ended.
    """
    is_finished = False
    rest = b""
    try:
        async for block in answer:
            *events, rest = (rest + block).split(b"\n\n")
            lease.emitted(len(events))  # about one token each
            for event in events:
                if not event.startswith(b"data:"):
                    continue  # a comment that keeps the connection alive
                payload = event[5:].strip()
                if payload == b"[DONE]":
                    if not is_finished:
                        raise EngineError("the engine ended the stream before its answer was finished")
                    with contextlib.suppress(OSError):
                        await answer.read()  # the end of the body, so that the connection can be used again
                    lease.release()
                    return
                if payload.startswith(b'{"error"'):
                    raise _stream_error(payload)
                if _ABORTED in payload:
                    raise lease.error or EngineError("the engine aborted the request")
                is_finished = is_finished or _FINISHED in payload
                yield payload
    except OSError as error:
        raise lease.error or EngineError(f"the engine's stream broke off: {error!r}") from error
    raise lease.error or EngineError("the engine's stream ended before its answer was finished")


def _stream_error(payload: bytes) -> CocktailError:
    message = _message_of(payload)
    try:
        code = orjson.loads(payload)["error"]["code"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        code = None
    if isinstance(code, int) and 400 <= code < 500:
        return InvalidRequestError(message)
    return EngineError(f"the engine failed: {message}")


def _message_of(content: bytes) -> str:
    """The message of an OpenAI-shaped error, or what there is of it."""
    try:
        error = orjson.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return content[:200].decode(errors="replace")
