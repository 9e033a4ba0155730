"""A server that speaks vLLM's surface without a model: for tests, and for measuring the gateway alone.

    python -m cocktail_serve.engines.vllm.fake --uds /tmp/x/engine.sock --served-model-name flan

It has the routes of the plugin under `/v1/cocktail/` and stands behind the plugin's own fence, so whoever gets on with
it gets the order of mixes and requests right. Answers are pure functions of the recipe and the request. It starts in
about a second.

Faults come from files: with `--faults FOLDER`, a file of a fault's name in that folder happens once, to the next
request that it concerns, and is removed. Those that say so read from the file the status and the message of the error
that they answer, as in `501 not built in`; 500 where it is empty.
"""

from __future__ import annotations

import abc
import argparse
import asyncio
import contextlib
import hashlib
import itertools
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cocktail_serve.errors import CocktailError, InvalidMixError
from cocktail_serve.recipe import Recipe
from vllm_cocktail.fence import RECIPE_HEADER, ASGIApp, ASGIScope, Fence, FenceMiddleware, Receive, Send
from vllm_cocktail.lifetime import die_with_owner
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.replies import (
    DECIDE_PATH,
    FORGET_PATH,
    MIX_PATH,
    RESPONSES_PATH,
    SCORE_PATH,
    STATUS_PATH,
    DecideReply,
    MixReply,
    ParameterSource,
    StatusReply,
)
from vllm_cocktail.unmerged.binding import RequestBinder
from vllm_cocktail.unmerged.control import EveryRecipe

Fault = Literal[
    "answer_error",  # the next completion is answered with the error in the file
    "die",  # the process ends by SIGKILL at the next completion
    "hang",  # the next status is never answered
    "mix_busy",  # the next mix is refused as busy, nothing changed
    "mix_failed",  # the next mix fails half-way and poisons the engine
    "mix_hang",  # the next mix never ends
    "mix_invalid",  # the next recipe is refused, nothing changed
    "score_error",  # the next scoring request is answered with the error in the file
    "score_overflow",  # the losses of the next scoring request, or the log-probabilities of decisions, are not finite
    "stream_cut",  # the next stream ends in the middle
    "stream_error",  # the next stream ends with the error in the file as an event and [DONE], as vLLM's
]

Holds = Literal["one", "all"]
"""Of the recipes that were mixed: the last one, which is resident, as with the plugin; or all, side by side."""

WORDS = (
    "amber basil clove dill elder fennel ginger hyssop iris juniper kaffir lemon mint nutmeg orange pepper "
    "quince rose saffron thyme umami vanilla walnut ximenia yuzu zest"
).split()

DEFAULT_MAX_TOKENS = 16

_MOST_TOKENS = ("max_completion_tokens", "max_tokens", "max_output_tokens")

MAX_CHOICES = 16_384
"""As vLLM's."""


def fake_tokens(recipe_digest: str, prompt: str, *, choice: int = 0) -> Iterator[str]:
    """The endless answer of a recipe to a prompt, one word with a leading space at a time."""
    state = hashlib.sha256(f"{recipe_digest}\0{choice}\0{prompt}".encode()).digest()
    while True:
        for byte in state:
            yield f" {WORDS[byte % len(WORDS)]}"
        state = hashlib.sha256(state).digest()


def fake_text(recipe_digest: str, prompt: str, *, num_tokens: int, choice: int = 0) -> str:
    """The first words of `fake_tokens`."""
    return "".join(itertools.islice(fake_tokens(recipe_digest, prompt, choice=choice), num_tokens))


def fake_loss(recipe_digest: str, token_ids: Sequence[int], output_start: int) -> float:
    """A loss between 0 and 4 nats that depends on all it is given."""
    content = orjson.dumps([recipe_digest, list(token_ids), output_start])
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big") / 2**30


def _fake_log_probs(recipe_digest: str, options: Mapping[str, Any]) -> list[float | None]:
    rests = [[label] for label in options["labels"]] or options["continuations"]
    return [-fake_loss(recipe_digest, options["prompt"] + rest, len(options["prompt"])) for rest in rests]


def fake_args(*, uds: Path, served_model_name: str, max_model_len: int | None, extra: Mapping[str, Any]) -> list[str]:
    """Command line of this server; `extra` as in `engine.args`."""
    args = [sys.executable, "-m", "cocktail_serve.engines.vllm.fake", "--uds", str(uds)]
    args += ["--served-model-name", served_model_name]
    if max_model_len is not None:
        args += ["--max-model-len", str(max_model_len)]
    for name, value in extra.items():
        args += [f"--{name.replace('_', '-')}", str(value)]
    return args


class FakeServer:
    """The state behind the routes.

    Args:
        manifest: what the plugin is given: which recipes can be mixed, and which is resident at the start.
        token_delay_s: time between two words.
        mix_s: time that one mix takes.
        holds: how many recipes at a time.
        faults: folder of fault files.
        warnings: of the status.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        served_model_name: str,
        max_model_len: int,
        token_delay_s: float = 0.0,
        score_s: float = 0.0,
        mix_s: float = 0.0,
        holds: Holds = "one",
        faults: Path | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        self._manifest = manifest
        self._name = served_model_name
        self._max_model_len = max_model_len
        self._token_delay_s = token_delay_s
        self._score_s = score_s
        self._mix_s = mix_s
        self._holds = holds
        self._faults = faults
        self._warnings = warnings
        self._mix_lock = asyncio.Lock()
        self._cached: list[str] = []
        self.fence = Fence(managed=manifest.managed)
        self._binder: RequestBinder | None = None
        if manifest.mode == "unmerged":
            base = Recipe(manifest.base, ((manifest.base, 1.0),), manifest.dtype, mode="unmerged")
            self._binder = RequestBinder(base, self._require_known)
            self.fence.open(EveryRecipe())
        else:
            self.fence.open({manifest.resident})

    def app(self, *, api_key: str | None) -> Starlette:
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route(RESPONSES_PATH, self._responses, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route(STATUS_PATH, self._status),
            Route(MIX_PATH, self._mix, methods=["POST"]),
            Route(SCORE_PATH, self._score, methods=["POST"]),
            Route(DECIDE_PATH, self._decide, methods=["POST"]),
            Route(FORGET_PATH, self._forget, methods=["POST"]),
        ]
        # the key first: a stranger learns nothing from the fence
        middleware = [
            Middleware(_KeyMiddleware, key=api_key),
            Middleware(FenceMiddleware, fence=self.fence, bind=self._binder),
        ]
        return Starlette(routes=routes, middleware=middleware)

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _metrics(self, request: Request) -> Response:
        labels = f'engine="0",model_name="{self._name}"'
        return Response(
            "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
            "# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running{{{labels}}} {float(self.fence.in_flight)}\n"
            f"vllm:num_requests_waiting{{{labels}}} 0.0\n"
            f"vllm:kv_cache_usage_perc{{{labels}}} 0.0\n"
            f"vllm:num_preemptions_total{{{labels}}} 0.0\n"
            f"vllm:prefix_cache_queries_total{{{labels}}} 0.0\n"
            f"vllm:prefix_cache_hits_total{{{labels}}} 0.0\n",
            media_type="text/plain",
        )

    async def _models(self, request: Request) -> Response:
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "fake"}
        return _json({"object": "list", "data": [{**model, "max_model_len": self._max_model_len}]})

    async def _status(self, request: Request) -> Response:
        if self._strikes("hang"):
            await asyncio.Event().wait()
        reply: StatusReply = {
            "resident": self.fence.resident,
            "state": self.fence.state,
            "in_flight": self.fence.in_flight,
            "mode": self._manifest.mode,
            "mixing_path": "fake" if self._binder is None else "unmerged",
            "mixing_kernel": "none",
            "streams_because": None,
            "captured": [],
            "captured_bytes": 0,
            "cached": self._cached,
            "cached_bytes": 0,
            "cache_bytes": 0,
            "weight_version": self.fence.resident,
            "model_dtype": self._manifest.dtype,
            "managed": self._manifest.managed,
            "warnings": list(self._warnings),
        }
        return _json(reply)

    async def _mix(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        try:
            if self._binder is not None:
                raise InvalidMixError("nothing is mixed in an engine whose recipes share a batch")
            recipe = Recipe.from_json(body["recipe"])
            self._check(recipe)
        except CocktailError as error:
            return _error(400, "invalid_recipe", error.message)
        async with self._mix_lock:
            started = time.perf_counter()
            if recipe.digest in self.fence.serves and self.fence.state == "open":
                return _json({"resident": recipe.digest, "seconds": 0.0, "source": "resident"})
            if self.fence.state == "poisoned":
                return _error(500, "mix_failed", "the engine is poisoned")
            before = self.fence.serves
            if self._holds == "one":
                self.fence.close()
                if self._strikes("mix_busy") or not await self.fence.until_empty(body.get("drain_s", 30.0)):
                    self.fence.open(before)
                    return _error(409, "busy", f"{self.fence.in_flight} requests are in flight")
            await asyncio.sleep(self._mix_s)
            if self._strikes("mix_hang"):
                await asyncio.Event().wait()
            if self._strikes("mix_failed"):
                self.fence.poison("a fault was asked for")
                return _error(500, "mix_failed", "the mix failed half-way")
            source: ParameterSource = "cache" if recipe.digest in self._cached else "files"
            if source == "files":
                self._cached.append(recipe.digest)
            self.fence.open({recipe.digest, *(before if self._holds == "all" else ())})
            seconds = time.perf_counter() - started
            reply: MixReply = {"resident": recipe.digest, "seconds": seconds, "source": source}
            return _json(reply)

    async def _score(self, request: Request) -> Response:
        examples = orjson.loads(await request.body())["examples"]
        await asyncio.sleep(self._score_s)
        if (error := self._struck("score_error")) is not None:
            return _vllm_error(error)
        if self._strikes("score_overflow"):
            return _json({"losses": [None for _ in examples]})
        digest = self._recipe_of(request)
        return _json({"losses": [fake_loss(digest, e["token_ids"], e["output_start"]) for e in examples]})

    async def _decide(self, request: Request) -> Response:
        questions = orjson.loads(await request.body())["questions"]
        await self._take_time(len(questions), request)
        if (error := self._struck("answer_error")) is not None:
            return _vllm_error(error)
        digest = self._recipe_of(request)
        reply: DecideReply = {
            "log_probs": [_fake_log_probs(digest, options) for options in questions],
            "num_cached": [0 for _ in questions],
            "num_computed": sum(len(options["prompt"]) for options in questions),
        }
        if self._strikes("score_overflow"):
            reply["log_probs"] = [[None for _ in options] for options in reply["log_probs"]]
        return _json(reply)

    async def _forget(self, request: Request) -> Response:
        digest = orjson.loads(await request.body())["digest"]
        with contextlib.suppress(ValueError):
            self._cached.remove(digest)
        return _json({})

    async def _chat(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        prompt = _rendered(body.get("messages"))
        if prompt is None:
            return _error(400, "invalid_request", "messages: a list with at least one message is needed")
        return await self._answer(_ChatShape(self._name), prompt, body, request)

    async def _completions(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        if not isinstance(body.get("prompt"), str):
            return _error(400, "invalid_request", "prompt: a string is needed")
        return await self._answer(_CompletionShape(self._name), body["prompt"], body, request)

    async def _responses(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        given = body.get("input")
        prompt = given if isinstance(given, str) else _rendered(given)
        if prompt is None:
            return _error(400, "invalid_request", "input: a string is needed, or a list of messages")
        if body.get("instructions"):
            prompt = f"system: {body['instructions']}\n{prompt}"
        return await self._answer(_ResponseShape(self._name), prompt, body, request)

    async def _tokenize(self, request: Request) -> Response:
        """A token is a byte."""
        body = orjson.loads(await request.body())
        text = body["prompt"] if isinstance(body.get("prompt"), str) else _rendered(body.get("messages"))
        if text is None:
            return _error(400, "invalid_request", "prompt: a string is needed, or messages")
        tokens = list(text.encode())
        strings = [chr(token) for token in tokens] if body.get("return_token_strs") else None
        reply = {"count": len(tokens), "max_model_len": self._max_model_len, "tokens": tokens, "token_strs": strings}
        return _json(reply)

    async def _detokenize(self, request: Request) -> Response:
        tokens = orjson.loads(await request.body()).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) and 0 <= token < 256 for token in tokens):
            return _error(400, "invalid_request", "tokens: a list of numbers from 0 to 255 is needed")
        return _json({"prompt": bytes(tokens).decode(errors="replace")})

    def _recipe_of(self, request: Request) -> str:
        """Which recipe answers: the resident one, whatever was asked for; where several are held, or each request
        brings its own, the one that was asked for."""
        return self.fence.resident or request.headers[RECIPE_HEADER]

    async def _answer(self, shape: _Shape, prompt: str, body: Mapping[str, Any], request: Request) -> Response:
        digest = self._recipe_of(request)
        if self._strikes("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if (error := self._struck("answer_error")) is not None:
            return _vllm_error(error)
        num_tokens = next((body[name] for name in _MOST_TOKENS if body.get(name)), DEFAULT_MAX_TOKENS)
        num_choices = body.get("n") or 1
        # as vLLM does; an engine that tried would never come back from a billion choices
        if not isinstance(num_tokens, int) or num_tokens < 1:
            return _error(400, "invalid_request", "max_tokens: a whole number above 0 is needed")
        if not isinstance(num_choices, int) or not 1 <= num_choices <= MAX_CHOICES:
            return _error(400, "invalid_request", f"n: a whole number from 1 to {MAX_CHOICES} is needed")
        num_prompt_tokens = len(prompt.split())
        if num_prompt_tokens + num_tokens > self._max_model_len:
            return _error(400, "context_length_exceeded", f"at most {self._max_model_len} tokens")
        usage = usage_of(num_prompt_tokens, num_tokens * num_choices)
        answers = [fake_tokens(digest, prompt, choice=index) for index in range(num_choices)]
        if body.get("stream"):
            options = body.get("stream_options") or {}
            is_continuous = options.get("include_usage") and options.get("continuous_usage_stats")
            shape.num_prompt_tokens = num_prompt_tokens if is_continuous else None
            shape.tells_usage = bool(options.get("include_usage"))
            events = self._events(shape, answers, num_tokens, usage)
            return StreamingResponse(events, media_type="text/event-stream")
        await self._take_time(num_tokens, request)
        texts = ["".join(itertools.islice(answer, num_tokens)) for answer in answers]
        return _json(shape.whole(texts, usage))

    async def _take_time(self, num_tokens: int, request: Request) -> None:
        """As long as so many words take; ends where nobody waits for them any more, as vLLM does."""
        for _ in range(num_tokens if self._token_delay_s else 0):
            await asyncio.sleep(self._token_delay_s)
            if await request.is_disconnected():
                return

    async def _events(
        self, shape: _Shape, answers: Sequence[Iterator[str]], num_tokens: int, usage: Mapping[str, int]
    ) -> AsyncIterator[bytes]:
        error, is_cut = self._struck("stream_error"), self._strikes("stream_cut")
        for event in shape.begin():
            yield event
        for position in range(num_tokens):
            if position == num_tokens // 2:
                if error is not None:
                    yield b"data: %b\n\ndata: [DONE]\n\n" % bytes(_vllm_error(error).body)
                if error is not None or is_cut:
                    return
            if self._token_delay_s:
                await asyncio.sleep(self._token_delay_s)
            last = position == num_tokens - 1
            for index, answer in enumerate(answers):
                yield shape.token(index, next(answer), position=position, is_last=last)
        for event in shape.end(usage):
            yield event

    async def _require_known(self, recipe: Recipe) -> None:
        self._check(recipe)

    def _check(self, recipe: Recipe) -> None:
        if self._strikes("mix_invalid"):
            raise InvalidMixError("a fault was asked for")
        if any(fingerprint not in self._manifest.members for fingerprint, _ in recipe.coefficients):
            self._manifest = Manifest.from_environ()  # as the plugin's mixer does
        for fingerprint, _ in recipe.coefficients:
            if fingerprint not in self._manifest.members:
                raise InvalidMixError(f"model {fingerprint} is not in the manifest")
        if recipe.dtype != self._manifest.dtype:
            raise InvalidMixError(f"the engine's dtype is {self._manifest.dtype}, the recipe's {recipe.dtype}")

    def _strikes(self, fault: Fault) -> bool:
        return self._struck(fault) is not None

    def _struck(self, fault: Fault) -> str | None:
        """What the file of a fault says, where there is one."""
        if self._faults is None:
            return None
        path = self._faults / fault
        try:
            text = path.read_text()
            path.unlink()
        except FileNotFoundError:
            return None
        return text


def usage_of(num_in: int, num_out: int) -> dict[str, int]:
    """`usage` of an answer, or of a choice so far."""
    return {"prompt_tokens": num_in, "completion_tokens": num_out, "total_tokens": num_in + num_out}


class _Shape(abc.ABC):
    """How an answer is dressed.

    Attributes:
        num_prompt_tokens: where every chunk tells the usage of its choice so far; None: none does.
        tells_usage: whether a chunk of its own does at the end.
    """

    prefix: ClassVar[str]
    object: ClassVar[str]

    def __init__(self, model: str) -> None:
        self.num_prompt_tokens: int | None = None
        self.tells_usage = False
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(8)}", "created": int(time.time()), "model": model}

    @abc.abstractmethod
    def whole(self, texts: Sequence[str], usage: Mapping[str, int]) -> dict[str, Any]:
        """The body of an answer that is not streamed, with a text for each choice."""

    @abc.abstractmethod
    def begin(self) -> Iterable[bytes]:
        """Events before the first word."""

    @abc.abstractmethod
    def token(self, index: int, token: str, *, position: int, is_last: bool) -> bytes:
        """The event of one word."""

    @abc.abstractmethod
    def end(self, usage: Mapping[str, int]) -> Iterable[bytes]:
        """Events behind the last word."""


class _ChunkedShape(_Shape):
    """Of choices, whose words come in chunks, `[DONE]` behind them."""

    chunk_object: ClassVar[str]

    def whole(self, texts: Sequence[str], usage: Mapping[str, int]) -> dict[str, Any]:
        choices = [self.choice(index, text) for index, text in enumerate(texts)]
        return {**self._head, "object": self.object, "choices": choices, "usage": usage}

    def begin(self) -> Iterable[bytes]:
        return ()

    def token(self, index: int, token: str, *, position: int, is_last: bool) -> bytes:
        choice = self.delta(index, token, is_first=position == 0)
        choice["finish_reason"] = "length" if is_last else None
        chunk = {**self._head, "object": self.chunk_object, "choices": [choice]}
        if self.num_prompt_tokens is not None:
            chunk["usage"] = usage_of(self.num_prompt_tokens, position + 1)
        return _event(chunk)

    def end(self, usage: Mapping[str, int]) -> Iterable[bytes]:
        if self.tells_usage:
            yield _event({**self._head, "object": self.chunk_object, "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    @abc.abstractmethod
    def choice(self, index: int, text: str) -> dict[str, Any]:
        """A finished choice."""

    @abc.abstractmethod
    def delta(self, index: int, token: str, *, is_first: bool) -> dict[str, Any]:
        """One word of a choice."""


class _ChatShape(_ChunkedShape):
    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": "length"}

    def delta(self, index: int, token: str, *, is_first: bool) -> dict[str, Any]:
        return {"index": index, "delta": {**({"role": "assistant"} if is_first else {}), "content": token}}


class _CompletionShape(_ChunkedShape):
    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": "length"}

    def delta(self, index: int, token: str, *, is_first: bool) -> dict[str, Any]:
        return {"index": index, "text": token, "logprobs": None}


class _ResponseShape(_Shape):
    """Of `/v1/responses`: typed events in place of chunks, and no `[DONE]`."""

    prefix = "resp"
    object = "response"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._texts: list[str] = []
        self._num_events = 0
        self._item_id = f"msg_{secrets.token_hex(8)}"

    def whole(self, texts: Sequence[str], usage: Mapping[str, int]) -> dict[str, Any]:
        return self._response("completed", [self._item(texts[0], "completed")], usage)

    def begin(self) -> Iterable[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._typed(kind, response=self._response("in_progress", [], None))
        yield self._typed("response.output_item.added", output_index=0, item=self._item(None, "in_progress"))
        yield self._in_part("response.content_part.added", part=self._part(""))

    def token(self, index: int, token: str, *, position: int, is_last: bool) -> bytes:
        self._texts.append(token)
        return self._in_part("response.output_text.delta", delta=token, logprobs=[])

    def end(self, usage: Mapping[str, int]) -> Iterable[bytes]:
        text = "".join(self._texts)
        item = self._item(text, "completed")
        yield self._in_part("response.output_text.done", text=text, logprobs=[])
        yield self._in_part("response.content_part.done", part=self._part(text))
        yield self._typed("response.output_item.done", output_index=0, item=item)
        yield self._typed("response.completed", response=self._response("completed", [item], usage))

    def _response(self, status: str, output: list[Any], usage: Mapping[str, int] | None) -> dict[str, Any]:
        used = None
        if usage is not None:
            used = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            }
        head = {name: value for name, value in self._head.items() if name != "created"}
        return {
            **head,
            "created_at": self._head["created"],
            "object": self.object,
            "status": status,
            "output": output,
            "usage": used,
            "parallel_tool_calls": True,
            "tool_choice": "none",
            "tools": [],
        }

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": []}

    def _in_part(self, kind: str, **fields: Any) -> bytes:
        return self._typed(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _typed(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %b\n%b" % (kind.encode(), _event(event))


class _KeyMiddleware:
    """vLLM's rule: what is under /v1 needs the key."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if self._expected is not None and scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _rendered(messages: Any) -> str | None:
    """What chats are answered to; None of what is no chat."""
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        return None
    return "\n".join(f"{message.get('role')}: {_text_of(message.get('content'))}" for message in messages)


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _event(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _error(status: int, code: str, message: str) -> Response:
    return _json({"error": {"message": message, "type": "error", "param": None, "code": code}}, status)


def _vllm_error(text: str) -> Response:
    """An error as vLLM answers it: its `code` is the status as a number."""
    status, _, message = text.partition(" ")
    code = int(status or 500)
    detail = {"message": message or "EngineCore died", "type": "InternalServerError", "param": None, "code": code}
    return _json({"error": detail}, code)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the server until it is told to stop, or its owner dies."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="python -m cocktail_serve.engines.vllm.fake", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--uds", help="Unix socket to listen on")
    where.add_argument("--port", type=int, help="port on loopback to listen on")
    parser.add_argument("--served-model-name", default="fake")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--token-delay-ms", type=float, default=0.0, help="time between two words")
    parser.add_argument("--score-ms", type=float, default=0.0, help="time that one scoring request takes")
    parser.add_argument("--mix-ms", type=float, default=0.0, help="time that one mix takes")
    parser.add_argument("--holds", choices=["one", "all"], default="one", help="recipes at a time, of those mixed")
    parser.add_argument("--faults", type=Path, help="folder of fault files")
    parser.add_argument("--warning", action="append", default=[], help="what its status warns of")
    parser.add_argument("--chat-template", help="vLLM's; nothing is rendered here")
    arguments = parser.parse_args(argv)
    die_with_owner()
    server = FakeServer(
        Manifest.from_environ(),
        served_model_name=arguments.served_model_name,
        max_model_len=arguments.max_model_len,
        token_delay_s=arguments.token_delay_ms / 1000,
        score_s=arguments.score_ms / 1000,
        mix_s=arguments.mix_ms / 1000,
        holds=arguments.holds,
        faults=arguments.faults,
        warnings=arguments.warning,
    )
    app = server.app(api_key=os.environ.get("VLLM_API_KEY"))
    uvicorn.run(
        app,
        uds=arguments.uds,
        port=arguments.port or 0,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
