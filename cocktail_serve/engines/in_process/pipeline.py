"""The threads of an in-process engine: one turns texts into tokens, the others compute numbers from those."""

from __future__ import annotations

import os
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from cocktail_serve.engines.in_process.batching import Batch, BatchQueue, ForwardJob, PassLimits, ThreadCall
from cocktail_serve.engines.in_process.swappable import SwappableModel
from cocktail_serve.engines.start_failures import backoff_s, may_pass
from cocktail_serve.errors import CocktailError, EngineError, InvalidRequestError, ModelNotReadyError

COMPUTING_NICE = 3
"""How much the threads that compute for everybody give way to this process's others: the event loop, the tokenizer and
the thread that overtakes, which have short work that somebody waits for. On Linux, where each thread has a niceness of
its own."""

M = TypeVar("M", bound=SwappableModel)
T = TypeVar("T")


def give_way() -> None:
    """Has the calling thread, and those that it starts, compute at `COMPUTING_NICE`. To be called once in a thread."""
    if sys.platform == "linux":
        os.nice(COMPUTING_NICE)


@dataclass(eq=False, slots=True, kw_only=True)
class ModelJob(ForwardJob, Generic[M]):
    """Something to compute under one recipe, from its arrival to its rows of numbers.

    Attributes:
        recipe_digest: names `params`, so that equal ones share passes.
        params: the recipe's parameters, by slot; held until the request is over.
        truncate_to: inputs are cut to this many tokens; None: too long is an error.
        handle: of the caller's, who is told by it which request is over.
        param: where the inputs stand in the caller's request, for errors.
    """

    param: ClassVar[str] = "input"

    recipe_digest: str
    params: Mapping[str, Tensor]
    truncate_to: int | None = None
    handle: Any = None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @abstractmethod
    def tokenize(self, model: M) -> Sequence[Sequence[int]]:
        """Token ids of the inputs, checked, on the thread that owns the tokenizer."""

    @property
    @abstractmethod
    def features_key(self) -> Any:
        """What requests must have in common, beside the parameters, to share a pass; asked after `tokenize`."""

    @abstractmethod
    def forward(self, model: M, batch: Batch[Any]) -> np.ndarray:
        """Rows `[N, D]` float32 of a pass, on the thread of `model`; called on any request of the batch."""

    @abstractmethod
    def finish(self, model: M) -> None:
        """Makes of `vectors`, now complete, what the caller asked for; on the thread of `model`."""


R = TypeVar("R", bound=ModelJob[Any])


class Pipeline(Generic[M, R]):
    """Takes requests from any thread and reports each exactly once when it is over, unless its caller has gone.

    Args:
        name: of the threads.
        load: loads the model, on the first of the threads that compute; again after a while, where it fails for what
            may pass.
        num_passes: passes computed at once, each on a thread and a replica of the model's modules of its own.
        overtakes: whether there is a thread more for who is next while all compute for others; see `BatchQueue`.
        threads_per_pass: torch's threads for each.
        on_loaded, on_failed: called once, on such a thread: one when the model is loaded; the other when it cannot be,
            or when a thread ends for a reason that is not a request's.
        on_retry: called on such a thread with what a load failed for, before it is tried again.
        on_over: called with requests that have their rows or their error, on the pipeline's threads.
        max_request_tokens: a request of more is refused, unless it is background work.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], M],
        *,
        limits: PassLimits,
        num_passes: int,
        overtakes: bool,
        threads_per_pass: int,
        max_request_tokens: int,
        on_loaded: Callable[[M], None],
        on_failed: Callable[[BaseException], None],
        on_retry: Callable[[Exception], None],
        on_over: Callable[[list[R]], None],
    ) -> None:
        self._name = name
        self._load = load
        self._max_request_tokens = max_request_tokens
        self._on_loaded = on_loaded
        self._on_failed = on_failed
        self._on_retry = on_retry
        self._on_over = on_over
        self._threads_per_pass = threads_per_pass
        self._num_passes = num_passes
        self._overtakes = overtakes
        self._batches: BatchQueue[R] = BatchQueue(limits, num_takers=num_passes, overtakes=overtakes)
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-tokenizer")
        self._threads = [
            threading.Thread(target=self._compute, args=(number,), name=f"{name}-model-{number}", daemon=True)
            for number in range(num_passes + overtakes)
        ]
        self._storing = threading.Lock()  # of rows and errors: a request's passes may end at the same moment
        self._is_settled = threading.Event()
        self._is_stopping = threading.Event()
        self._replicas: list[M] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends all threads after what they are doing; requests left behind are over with an error. Blocks."""
        self._is_stopping.set()
        self._end(self._batches.close(), self._stopping())
        self._tokenizing.shutdown(wait=True)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def submit(self, request: R) -> None:
        """Once the model is loaded. Returns at once.

        Raises:
            ModelNotReadyError: the pipeline is stopping.
        """
        try:
            self._tokenizing.submit(self._tokenize, request)
        except RuntimeError as error:
            raise self._stopping() from error

    def call_each(self, function: Callable[[M], Any]) -> list[Future[Any]]:
        """Runs a function between two passes on each thread that computes, with its own replica of the model."""
        return self._batches.call_each([partial(function, replica) for replica in self._replicas])

    def with_tokenizer(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function on the thread that owns the tokenizer."""
        return self._tokenizing.submit(function)

    def _tokenize(self, request: R) -> None:
        if request.abandoned:
            return
        try:
            if self._is_stopping.is_set():
                raise self._stopping()
            token_ids = request.tokenize(self._replicas[0])
            self._check_size(request, token_ids)
        except Exception as error:  # noqa: BLE001  # whatever it is, somebody waits for this request
            self._end([request], error)
            return
        request.set_inputs((request.recipe_digest, request.features_key), token_ids)
        if not self._batches.put(request):
            self._end([request], self._stopping())

    def _check_size(self, request: R, token_ids: Sequence[Sequence[int]]) -> None:
        num_tokens = sum(map(len, token_ids))
        if num_tokens > self._max_request_tokens and not request.background:
            raise InvalidRequestError(
                f"the inputs have {num_tokens} tokens together, and one request may have "
                f"{self._max_request_tokens}; send them in several",
                param=request.param,
            )

    def _compute(self, number: int) -> None:
        try:
            torch.set_num_threads(self._threads_per_pass)  # this thread's, and of threads that have none set
            if number == 0:
                model = self._load_in_the_end()
                self._replicas = [model, *(model.replicate() for _ in self._threads[1:])]
                self._on_loaded(model)
                self._is_settled.set()
            self._is_settled.wait()
            if self._overtakes and number < self._num_passes:
                give_way()
            with torch.inference_mode():  # per thread
                while (work := self._batches.take(number)) is not None:
                    work.run() if isinstance(work, ThreadCall) else self._run(work, self._replicas[number])
        except BaseException as error:  # noqa: BLE001  # nothing above this thread would hear of it
            self._end(self._batches.close(), EngineError(f"a model's thread of pool {self._name!r} has ended"))
            self._on_failed(error)
        finally:
            self._is_settled.set()

    def _load_in_the_end(self) -> M:
        for num_failures in count(1):
            try:
                return self._load()
            except Exception as error:
                if not may_pass(error):
                    raise
                self._on_retry(error)
            if self._is_stopping.wait(backoff_s(num_failures)):
                break
        raise self._stopping()

    def _run(self, batch: Batch[R], model: M) -> None:
        first = batch.entries[0][0]
        try:
            model.bind(first.params)
            rows = first.forward(model, batch)
        except Exception as error:  # noqa: BLE001  # out of memory, a kernel's complaint: every request of it has failed
            self._end(batch.jobs, error)
            return
        with self._storing:
            complete = batch.store(rows)
        for request in complete:
            request.finish(model)
        if complete:
            self._on_over(complete)

    def _end(self, requests: list[R], error: Exception) -> None:
        with self._storing:
            ended = [request for request in requests if request.error is None]
            for request in ended:
                request.error = self._told(error)
        if ended:
            self._on_over(ended)

    def _told(self, error: Exception) -> CocktailError:
        if isinstance(error, CocktailError):
            return error
        told = EngineError(f"the model of pool {self._name!r} failed: {type(error).__name__}: {error}")
        told.__cause__ = error
        return told

    def _stopping(self) -> ModelNotReadyError:
        return ModelNotReadyError(f"pool {self._name!r} is shutting down")
