"""The threads of an embedding engine: one turns texts into tokens, one owns the model and turns tokens into vectors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from cocktail_serve.engines.batching import Batch, BatchQueue, Call, Job, PassLimits
from cocktail_serve.engines.encoder import Encoder
from cocktail_serve.errors import CocktailError, EngineError, InvalidRequestError, ModelNotReadyError


@dataclass(eq=False, slots=True, kw_only=True)
class EmbeddingRequest(Job):
    """Texts (or token ids) to embed under one recipe, from their arrival to their vectors.

    Attributes:
        recipe_digest: names `params`, so that equal ones share passes.
        params: the recipe's parameters, by slot; held until the request is over.
        inputs: texts, or token ids with special tokens.
        handle: of the caller's, who is told by it which request is over.
    """

    recipe_digest: str
    params: Mapping[str, Tensor]
    inputs: Sequence[str] | Sequence[Sequence[int]]
    prompt: str = ""
    truncate_to: int | None = None
    dimensions: int | None = None
    handle: Any = None
    prompt_length: int | None = field(default=None, init=False)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))


class EmbeddingPipeline:
    """Takes requests from any thread and reports each exactly once when it is over, unless its caller has gone.

    Args:
        name: of the threads.
        load: loads the model, on the thread that will own it.
        on_loaded, on_failed: called once, on that thread: one when the model is loaded; the other when it cannot be,
            or when the thread ends for a reason that is not a request's.
        on_over: called with requests that have their vectors or their error, on the pipeline's threads.
        max_request_tokens: a request of more is refused.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Encoder],
        *,
        limits: PassLimits,
        max_request_tokens: int,
        on_loaded: Callable[[Encoder], None],
        on_failed: Callable[[BaseException], None],
        on_over: Callable[[list[EmbeddingRequest]], None],
    ) -> None:
        self._name = name
        self._load = load
        self._max_request_tokens = max_request_tokens
        self._on_loaded = on_loaded
        self._on_failed = on_failed
        self._on_over = on_over
        self._batches: BatchQueue[EmbeddingRequest] = BatchQueue(limits)
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-tokenizer")
        self._thread = threading.Thread(target=self._own_model, name=f"{name}-model", daemon=True)
        self._is_stopping = False
        self._encoder: Encoder

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends both threads after what they are doing; requests left behind are over with an error. Blocks."""
        self._is_stopping = True
        self._end(self._batches.close(), self._stopping())
        self._tokenizing.shutdown(wait=True)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: EmbeddingRequest) -> None:
        """Once the model is loaded. Returns at once.

        Raises:
            ModelNotReadyError: the pipeline is stopping.
        """
        try:
            self._tokenizing.submit(self._tokenize, request)
        except RuntimeError as error:
            raise self._stopping() from error

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Runs a function between two passes on the thread that owns the model."""
        return self._batches.call(function)

    def tokenize(self, texts: Sequence[str]) -> Future[list[list[int]]]:
        """Token ids of texts, on the thread that owns the tokenizer."""
        return self._tokenizing.submit(self._encoder.tokenizer.encode, texts)

    def _tokenize(self, request: EmbeddingRequest) -> None:
        if request.abandoned:
            return
        try:
            if self._is_stopping:
                raise self._stopping()
            token_ids = self._token_ids(request)
            request.prompt_length = self._encoder.prompt_length(request.prompt)
        except Exception as error:  # noqa: BLE001  # whatever it is, somebody waits for this request
            self._end([request], error)
            return
        request.set_inputs((request.recipe_digest, request.prompt_length), token_ids)
        if not self._batches.put(request):
            self._end([request], self._stopping())

    def _token_ids(self, request: EmbeddingRequest) -> Sequence[Sequence[int]]:
        tokenizer = self._encoder.tokenizer
        token_ids: Sequence[Sequence[int]]
        if isinstance(request.inputs[0], str):
            texts = [f"{request.prompt}{text}" for text in request.inputs]
            token_ids = tokenizer.encode(texts, truncate_to=request.truncate_to)
        elif request.prompt:
            raise InvalidRequestError("a prompt is text and cannot be put before token ids", param="prompt_name")
        else:
            token_ids = [ids[: request.truncate_to] for ids in cast("Sequence[Sequence[int]]", request.inputs)]
            tokenizer.check_token_ids(token_ids)
        tokenizer.check_length(token_ids)
        num_tokens = sum(map(len, token_ids))
        if num_tokens > self._max_request_tokens:
            raise InvalidRequestError(
                f"the inputs have {num_tokens} tokens together, and one request may have "
                f"{self._max_request_tokens}; send them in several",
                param="input",
            )
        return token_ids

    def _own_model(self) -> None:
        try:
            self._encoder = self._load()
            self._on_loaded(self._encoder)
            with torch.inference_mode():  # per thread
                while (work := self._batches.take()) is not None:
                    work.run() if isinstance(work, Call) else self._run(work)
        except BaseException as error:  # noqa: BLE001  # nothing above this thread would hear of it
            self._end(self._batches.close(), EngineError(f"the model's thread of pool {self._name!r} has ended"))
            self._on_failed(error)

    def _run(self, batch: Batch[EmbeddingRequest]) -> None:
        first = batch.entries[0][0]
        try:
            self._encoder.bind(first.params)
            vectors = self._encoder.forward(batch.token_ids, prompt_length=first.prompt_length)
        except Exception as error:  # noqa: BLE001  # out of memory, a kernel's complaint: every request of it has failed
            self._end(batch.jobs, error)
            return
        complete = batch.store(vectors)
        for request in complete:
            if request.dimensions is not None and request.vectors is not None:
                request.vectors = self._encoder.shorten(request.vectors, request.dimensions)
        if complete:
            self._on_over(complete)

    def _end(self, requests: list[EmbeddingRequest], error: Exception) -> None:
        for request in requests:
            if isinstance(error, CocktailError):
                request.error = error
            else:
                request.error = EngineError(f"the model of pool {self._name!r} failed: {type(error).__name__}: {error}")
                request.error.__cause__ = error
        if requests:
            self._on_over(requests)

    def _stopping(self) -> ModelNotReadyError:
        return ModelNotReadyError(f"pool {self._name!r} is shutting down")
