"""Which inputs share the next forward pass: joined across callers, cut by length, fair between tenants, recipes
and callers.

Knows neither torch nor asyncio: jobs go in from any thread, batches come out on the threads that compute.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Generic, TypeVar

import numpy as np

from cocktail_serve.engines.fairness import MAX_KEPT, ServedTokensByTenant

MAX_WINDOW = 256
"""Inputs looked at when a batch is formed: enough to find company of like length, few enough to sort in no time."""

CONTENDED_S = 1.0
CONTENDED_SHARE = 4
"""While several tenants ask (within so many seconds), a pass holds a fraction of its tokens: whoever is next waits for
the passes that run, and on a CPU a quarter of a full pass already costs little more per token."""

HOLD_S = 0.006
"""How long the last thread that is free is kept for a tenant who is behind and has just been served, while the others
compute for all who wait. A client that sends one request after the other is between two of them only for milliseconds,
and each would otherwise find all threads in the middle of a pass."""

GATHER_S = 0.004
"""How long a thread waits for company for a few short inputs while another computes. The answers of a pass bring their
callers' next requests within milliseconds, one by one: the first of them would start a pass for itself."""

BACKGROUND_EVERY = 16
"""At least one batch in this many is background work, where any waits: traffic delays it, but never starves it."""


@dataclass(frozen=True, slots=True)
class PassLimits:
    """How large a forward pass may grow.

    Attributes:
        max_tokens: inputs times longest input, padding included. A single longer input still gets a pass of its own.
        pass_tokens: what starting one more pass costs, in tokens computed meanwhile: padding up to this much is
            cheaper than a second pass, and inputs of less wait for company where others compute.
    """

    max_tokens: int
    pass_tokens: int


@dataclass(eq=False, slots=True)
class ForwardJob:
    """One request's inputs on their way through the model.

    Attributes:
        background: gives way to jobs that are not.
        tenant: whose it is.
        key: jobs of equal key may share a pass: same parameters, same features beside the tokens.
        token_ids: the inputs, in the caller's order; set with `set_inputs` before the job is queued.
        queued_at, started_at: `time.monotonic()` when it was queued, and of the first pass.
        abandoned: the caller has gone; what has not started is dropped.
        error: why it failed; the rest of it is dropped.
        vectors: `[N, D]` float32, filled batch by batch, in the caller's order.
    """

    background: bool = False
    tenant: str = ""
    key: Hashable = field(default=None, init=False)
    token_ids: Sequence[Sequence[int]] = field(default=(), init=False)
    pending: list[int] = field(default_factory=list, init=False)
    num_missing: int = field(default=0, init=False)
    queued_at: float = field(default=0.0, init=False)
    started_at: float | None = field(default=None, init=False)
    abandoned: bool = field(default=False, init=False)
    error: Exception | None = field(default=None, init=False)
    vectors: np.ndarray | None = field(default=None, init=False)

    def set_inputs(self, key: Hashable, token_ids: Sequence[Sequence[int]]) -> None:
        self.key = key
        self.token_ids = token_ids
        self.pending = sorted(range(len(token_ids)), key=lambda index: -len(token_ids[index]))
        self.num_missing = len(token_ids)

    @property
    def is_over(self) -> bool:
        return self.abandoned or self.error is not None or not self.pending

    def store(self, indices: Sequence[int], rows: np.ndarray) -> bool:
        """Keeps the vectors of some inputs; True when they were the last ones missing."""
        if self.vectors is None:
            self.vectors = np.empty((len(self.token_ids), rows.shape[1]), dtype=np.float32)
        self.vectors[indices] = rows
        self.num_missing -= len(indices)
        return self.num_missing == 0


J = TypeVar("J", bound=ForwardJob)


@dataclass(frozen=True, slots=True)
class Batch(Generic[J]):
    """Inputs of one forward pass.

    Attributes:
        entries: jobs with the indices of their inputs, in the order of the rows.
    """

    key: Hashable
    entries: list[tuple[J, list[int]]]

    @property
    def token_ids(self) -> list[Sequence[int]]:
        return [job.token_ids[index] for job, indices in self.entries for index in indices]

    def store(self, vectors: np.ndarray) -> list[J]:
        """Hands `[rows, D]` float32 to the jobs; returns those that are now complete."""
        complete, row = [], 0
        for job, indices in self.entries:
            if job.store(indices, vectors[row : row + len(indices)]):
                complete.append(job)
            row += len(indices)
        return complete

    @property
    def jobs(self) -> list[J]:
        return [job for job, _ in self.entries]


class ThreadCall:
    """Something to do between two passes on a thread that computes."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.future: Future[Any] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except Exception as error:  # noqa: BLE001  # whoever asked for it decides what it means
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


def cut_by_length(lengths: Sequence[int], limits: PassLimits) -> list[int]:
    """Cuts inputs, longest first, into passes.

    A pass ends when it is full, or when the padding of one more input would bring its padding to what a pass of its
    own costs.

    Args:
        lengths: tokens per input, descending.

    Returns:
        The end (exclusive) of each pass; the last is `len(lengths)`.
    """
    ends: list[int] = []
    start = padding = 0
    for position, length in enumerate(lengths):
        longest = lengths[start]
        padding += longest - length
        if position > start and ((position - start + 1) * longest > limits.max_tokens or padding > limits.pass_tokens):
            ends.append(position)
            start, padding = position, 0
    if lengths:
        ends.append(len(lengths))
    return ends


class _Lane(Generic[J]):
    """Jobs of one priority. The tenant served least lately is next; its keys take turns, and within a key its callers
    do."""

    def __init__(self, limits: PassLimits) -> None:
        self._limits = limits
        self._contended_limits = replace(limits, max_tokens=max(1, limits.max_tokens // CONTENDED_SHARE))
        self._served_tokens = ServedTokensByTenant()
        self._served_at: dict[str, float] = {}  # when a pass of a tenant last began or ended; a second at least
        self._turns: dict[str, OrderedDict[Hashable, deque[J]]] = {}

    def add(self, job: J) -> None:
        self._turns.setdefault(job.tenant, OrderedDict()).setdefault(job.key, deque()).append(job)

    def drain(self) -> list[J]:
        jobs = [job for turns in self._turns.values() for queue in turns.values() for job in queue]
        self._turns.clear()
        return jobs

    def waits_for_company(self, now: float) -> float:
        """Seconds that the jobs here should be given to become more; 0: none."""
        num_tokens, since = 0, now
        for job in chain.from_iterable(chain.from_iterable(turns.values() for turns in self._turns.values())):
            if job.is_over:
                continue
            since = min(since, job.queued_at)
            some = islice(job.pending, self._limits.pass_tokens)  # enough, if they are so many
            num_tokens += sum(len(job.token_ids[index]) for index in some)
            if num_tokens >= self._limits.pass_tokens:
                return 0.0
        return max(0.0, since + GATHER_S - now) if num_tokens else 0.0

    def held_for_s(self, computed: Collection[str], overtaking: Collection[str], now: float) -> float:
        """Seconds that the last free thread should be kept for a tenant who is behind; 0: for none.

        Args:
            computed: tenants for whom the other threads compute.
            overtaking: tenants for whom the one that overtakes does.
        """
        waiting = [name for name, turns in self._turns.items() if _has_work(turns)]
        if not waiting or not set(waiting).issubset(computed):
            return 0.0
        least = min(self._served_tokens.of(name, now).recent(now) for name in waiting)
        left_s = 0.0
        for name, served_at in self._served_at.items():
            kept_s = HOLD_S if name in overtaking else served_at + HOLD_S - now
            if kept_s > left_s and name not in computed and self._served_tokens.of(name, now).recent(now) < least:
                left_s = kept_s
        return left_s

    def answered(self, batch: Batch[J]) -> None:
        """A pass has ended."""
        now = time.monotonic()
        for job in batch.jobs:
            self._note_served(job.tenant, now)

    def next_batch(self) -> Batch[J] | None:
        """The next pass, filled up with inputs of all tenants."""
        now = time.monotonic()
        tenant = self._next_tenant(now)
        if tenant is None:
            return None
        key, jobs = next(iter(self._turns[tenant].items()))
        others = (queues.get(key, ()) for other, queues in self._turns.items() if other != tenant)
        company = islice(chain.from_iterable(others), MAX_WINDOW)
        limits = self._contended_limits if self._is_contended(now) else self._limits
        return self._take(tenant, key, [*jobs, *company], limits, now)

    def next_overtaking(self, computed: Collection[str]) -> Batch[J] | None:
        """A small pass for the next tenant alone; None where one of its passes is computed already.

        Args:
            computed: tenants for whom passes are computed now.
        """
        now = time.monotonic()
        tenant = self._next_tenant(now)
        if tenant is None or tenant in computed:
            return None
        key, jobs = next(iter(self._turns[tenant].items()))
        return self._take(tenant, key, [*jobs], self._contended_limits, now)

    def _next_tenant(self, now: float) -> str | None:
        """The tenant served least lately of those who wait, with a job that is not over at the head of its turns."""
        while self._turns:
            tenant = min(self._turns, key=lambda name: self._served_tokens.of(name, now).recent(now))
            turns = self._turns[tenant]
            key, jobs = next(iter(turns.items()))
            while jobs and jobs[0].is_over:
                jobs.popleft()
            if jobs:
                return tenant
            del turns[key]
            if not turns:
                del self._turns[tenant]
        return None

    def _take(self, tenant: str, key: Hashable, jobs: Sequence[J], limits: PassLimits, now: float) -> Batch[J]:
        batch = self._form(key, jobs, limits, now)
        self._turns[tenant][key].rotate(-1)
        self._turns[tenant].move_to_end(key)
        return batch

    def _is_contended(self, now: float) -> bool:
        """Whether several tenants have been served lately, or wait."""
        others = sum(now - served_at < CONTENDED_S for served_at in self._served_at.values())
        return others > 1 or len(self._turns) > 1

    def _note_served(self, tenant: str, now: float) -> None:
        if tenant not in self._served_at and len(self._served_at) >= MAX_KEPT:
            self._served_at = {name: at for name, at in self._served_at.items() if now - at < CONTENDED_S}
        self._served_at[tenant] = now

    def _form(self, key: Hashable, jobs: Sequence[J], limits: PassLimits, now: float) -> Batch[J]:
        """The pass that holds the longest input of the first job, filled up with inputs of like length."""
        anchor = jobs[0]
        window: list[tuple[int, J, int]] = []
        for job in jobs:
            if not job.is_over:
                room = MAX_WINDOW - len(window)
                window += [(len(job.token_ids[index]), job, index) for index in job.pending[:room]]
            if len(window) == MAX_WINDOW:
                break
        window.sort(key=lambda entry: -entry[0])
        position = next(
            place for place, (_, job, index) in enumerate(window) if job is anchor and index == anchor.pending[0]
        )
        start = 0
        for end in cut_by_length([length for length, _, _ in window], limits):
            if position < end:
                break
            start = end
        chosen: dict[J, list[int]] = {}
        for _, job, index in window[start:end]:
            chosen.setdefault(job, []).append(index)
        for job, indices in chosen.items():
            job.started_at = job.started_at or now
            num_tokens = sum(len(job.token_ids[index]) for index in indices)
            self._served_tokens.of(job.tenant, now).charge(num_tokens, now)
            self._note_served(job.tenant, now)
            taken = set(indices)
            # A pass takes from the window only, so only the head of a long list has to be gone through.
            job.pending[:MAX_WINDOW] = [index for index in job.pending[:MAX_WINDOW] if index not in taken]
        return Batch(key, list(chosen.items()))


def _has_work(turns: Mapping[Hashable, Iterable[ForwardJob]]) -> bool:
    return any(not job.is_over for job in chain.from_iterable(turns.values()))


def _tenants(batches: Iterable[Batch[Any]]) -> set[str]:
    return {job.tenant for batch in batches for job in batch.jobs}


class BatchQueue(Generic[J]):
    """Jobs in from any thread, batches out to as many threads as there are passes at once.

    Args:
        num_takers: threads that take.
        overtakes: one thread more, the last, computes while all others do, and only for the tenant who is next and has
            no pass of its own among those: it would have to wait for the end of another's. The cores are shared out
            between the passes by the kernel then.
    """

    def __init__(self, limits: PassLimits, *, num_takers: int = 1, overtakes: bool = False) -> None:
        self._traffic: _Lane[J] = _Lane(limits)
        self._background: _Lane[J] = _Lane(limits)
        self._num_takers = num_takers
        self._calls: tuple[deque[ThreadCall], ...] = tuple(deque() for _ in range(num_takers + overtakes))
        lock = threading.RLock()
        self._condition = threading.Condition(lock)
        self._overtaking = threading.Condition(lock)  # what the last thread waits on
        self._computing: dict[int, Batch[J]] = {}  # by taker
        self._traffic_in_a_row = 0
        self._is_closed = False

    def put(self, job: J) -> bool:
        """False where the queue is closed."""
        with self._condition:
            if self._is_closed:
                return False
            job.queued_at = time.monotonic()
            (self._background if job.background else self._traffic).add(job)
            if self._num_free:
                self._condition.notify()
            else:
                self._overtaking.notify()
        return True

    def call_each(self, functions: Sequence[Callable[[], Any]]) -> list[Future[Any]]:
        """Runs one function on each taker's thread before its next batch; cancelled where the queue is closed."""
        calls = [ThreadCall(function) for function in functions]
        with self._condition:
            for waiting, call in zip(self._calls, calls, strict=True):
                if self._is_closed:
                    call.future.cancel()
                else:
                    waiting.append(call)
            self._wake_all()
        return [call.future for call in calls]

    def take(self, taker: int = 0) -> Batch[J] | ThreadCall | None:
        """Waits for work; None once the queue is closed.

        Args:
            taker: which of the threads asks.
        """
        with self._condition:
            self._end_pass(taker)
            while not self._is_closed:
                if self._calls[taker]:
                    return self._calls[taker].popleft()
                if taker == self._num_takers:
                    pause_s, batch, woken = 0.0, self._next_overtaking(), self._overtaking
                else:
                    pause_s, woken = self._pause_s(), self._condition
                    batch = None if pause_s else self._next_batch()
                if batch is not None:
                    self._computing[taker] = batch
                    (self._condition if self._num_free else self._overtaking).notify()  # for what is left
                    return batch
                woken.wait(pause_s or None)
        return None

    def close(self) -> list[J]:
        """Ends `take` after the pass that runs; returns the jobs left behind."""
        with self._condition:
            self._is_closed = True
            for calls in self._calls:
                for call in calls:
                    call.future.cancel()
                calls.clear()
            self._wake_all()
            return self._traffic.drain() + self._background.drain()

    def _end_pass(self, taker: int) -> None:
        batch = self._computing.pop(taker, None)
        if batch is not None and not batch.jobs[0].background:
            self._traffic.answered(batch)

    @property
    def _num_free(self) -> int:
        """Threads that do not compute, the one that overtakes left out."""
        return self._num_takers - len(self._computing) + (self._num_takers in self._computing)

    def _wake_all(self) -> None:
        self._condition.notify_all()
        self._overtaking.notify_all()

    def _pause_s(self) -> float:
        """How long a thread should wait, while others compute, before it takes what is there."""
        if not self._computing:
            return 0.0
        now = time.monotonic()
        held_s = 0.0
        if self._num_free == 1:
            overtaking = [batch for taker, batch in self._computing.items() if taker == self._num_takers]
            others = [batch for taker, batch in self._computing.items() if taker != self._num_takers]
            held_s = self._traffic.held_for_s(_tenants(others), _tenants(overtaking), now)
        return max(held_s, self._traffic.waits_for_company(now))

    def _next_overtaking(self) -> Batch[J] | None:
        return None if self._num_free else self._traffic.next_overtaking(_tenants(self._computing.values()))

    def _next_batch(self) -> Batch[J] | None:
        if self._traffic_in_a_row < BACKGROUND_EVERY - 1:
            batch = self._traffic.next_batch()
            if batch is not None:
                self._traffic_in_a_row += 1
                return batch
        self._traffic_in_a_row = 0
        return self._background.next_batch() or self._traffic.next_batch()
