"""Answers batches line by line, beside tenants' own requests, and goes on where another process left them."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from cocktail_serve.batches.batch import Batch, BatchError, BatchLine, BatchStatus, LineAnswer
from cocktail_serve.batches.request import read_lines
from cocktail_serve.batches.store import BatchStore, custom_id_of
from cocktail_serve.errors import InvalidRequestError, NotFoundError, StorageError
from cocktail_serve.finetuning.files import Files

logger = logging.getLogger(__name__)

LINES_AT_ONCE = 8
"""Lines of all batches that a gateway asks at once."""

LINES_OF_TENANT = 4
"""Of them those of one tenant, however many batches it has."""

MAX_GIVEN_WAY = 3
"""How often a line is broken off for the sake of requests; after that it is asked as they are, so that it ends."""

MAX_ENGINE_FAILURES = 3
"""Answers of an engine that failed before a line counts as failed: it may be what kills the engine."""

MAX_WAIT_S = 30.0
"""Between two tries of a line for which there was no room."""

MAX_OUTPUT_BYTES = 128 * 1024**2
"""Answers of one batch; further lines are not asked."""


@dataclass(frozen=True, slots=True)
class LineRequest:
    """What a line asks.

    Attributes:
        body: JSON.
        gives_way: whether it is broken off when a tenant's own request for another model waits.
    """

    batch: Batch
    body: bytes
    gives_way: bool


@dataclass(frozen=True, slots=True)
class LineReply:
    """What the server answered.

    Attributes:
        retry_after_s: seconds after which the same may be answered otherwise; None: never.
        gave_way: whether it was broken off for the sake of other requests.
    """

    status: int
    request_id: str
    body: bytes
    retry_after_s: float | None = None
    gave_way: bool = False


Ask = Callable[[LineRequest], Awaitable[LineReply]]
"""Has the server answer a line as it would answer the tenant, when it has nothing else to do."""


class BatchRunner:
    """The batches that this gateway works on, one task each. A hook of the cluster loop (`cluster_loop.Adopt`).

    Args:
        executor: where files are read, away from the event loop.
    """

    def __init__(self, store: BatchStore, files: Files, executor: Executor) -> None:
        self._store = store
        self._files = files
        self._executor = executor
        self._ask: Ask | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._places = asyncio.Semaphore(LINES_AT_ONCE)
        self._places_of: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(LINES_OF_TENANT))
        self.me = ""

    def start(self, ask: Ask) -> None:
        """Answers lines from now on."""
        self._ask = ask

    async def stop(self) -> None:
        """Ends all where they are: they go on in the next process, or in another gateway. May be called twice."""
        self._ask = None
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def submit(self, batch: Batch) -> None:
        """Begins with a batch of this gateway, or goes on with it."""
        if self._ask is None or batch.id in self._tasks:
            return
        task = asyncio.get_running_loop().create_task(self._run(batch, self._ask), name=f"batch {batch.id}")
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._ended(batch.id))

    def cancel(self, batch_id: str) -> None:
        """Ends the asking of a batch that was cancelled; its files are made."""
        if batch_id in self._tasks:
            self._cancelled[batch_id].set()

    async def adopt(self, me: str, alive: frozenset[str]) -> None:
        """Goes on with the batches that nobody works on, and hears of those that were cancelled elsewhere.

        Args:
            me: id of this gateway.
            alive: ids of all that are there.
        """
        self.me = me
        if self._ask is None:
            return
        for batch in await self._store.unfinished():
            if batch.id in self._tasks:
                if batch.status == "cancelling":
                    self.cancel(batch.id)
            elif batch.owner not in alive or batch.owner == me:
                claimed = await self._store.claim(batch, me)
                if claimed is not None:
                    self.submit(claimed)

    def _ended(self, batch_id: str) -> None:
        del self._tasks[batch_id]
        self._cancelled.pop(batch_id, None)

    async def _run(self, batch: Batch, ask: Ask) -> None:
        try:
            if batch.status == "validating":
                begun = await self._read(batch)
                if begun is None:
                    return
                batch = begun
            end = await self._answer_all(batch, ask) if batch.status == "in_progress" else _end_of(batch)
            if end is not None:
                await self._store.finish(batch, end, lambda line: _not_answered(line, end))
        except StorageError:
            # said in the log by the database; taken up again once it answers
            logger.warning("batch %s rests until the registry is there", batch.id)
        except Exception:
            logger.exception("batch %s failed by a fault of the server, and is taken up again", batch.id)

    async def _read(self, batch: Batch) -> Batch | None:
        """The batch once its lines are known; None where they are of no use, or it is another's by now."""
        try:
            content = await self._files.content(batch.tenant, batch.input_file_id, purpose="batch")
        except (NotFoundError, InvalidRequestError) as error:
            await self._store.fail(batch, [BatchError("invalid_file", error.message)])
            return None
        lines, models, errors = await asyncio.get_running_loop().run_in_executor(
            self._executor, read_lines, content, batch.endpoint
        )
        if errors:
            await self._store.fail(batch, errors)
            return None
        return await self._store.begin(batch, lines, models)

    async def _answer_all(self, batch: Batch, ask: Ask) -> BatchStatus | None:
        """Asks the lines that have no answer yet; how the batch ends, None: not here."""
        positions, num_bytes = await self._store.pending(batch)
        work = _Work(deque(positions), num_bytes)
        cancelled = asyncio.ensure_future(self._cancelled[batch.id].wait())
        workers = [asyncio.ensure_future(self._work(batch, work, ask)) for _ in range(LINES_OF_TENANT)]
        done = asyncio.gather(*workers)
        left_s = max(0.0, batch.expires_at - self._store.clock())
        try:
            ends: set[asyncio.Future[Any]] = {done, cancelled}
            await asyncio.wait(ends, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                is_mine = all(await done)
                return ("completed" if is_mine else None) if not cancelled.done() else "cancelled"
            return "cancelled" if cancelled.done() else "expired"
        finally:
            for task in (*workers, cancelled):
                task.cancel()
            await asyncio.gather(*workers, cancelled, return_exceptions=True)
            if done.done() and not done.cancelled():
                done.exception()

    async def _work(self, batch: Batch, work: _Work, ask: Ask) -> bool:
        """Answers one line after another; whether the batch stayed this gateway's."""
        while work.positions:
            position = work.positions.popleft()
            line = await self._store.line(batch, position)
            if line is None:
                continue
            if work.num_bytes >= MAX_OUTPUT_BYTES:
                answer = _refused(
                    line,
                    "output_too_large",
                    f"the answers of this batch are over {MAX_OUTPUT_BYTES} bytes; send several batches",
                )
            else:
                answer = await self._answer(batch, line, ask)
            work.num_bytes += len(answer.content)
            if not await self._store.answered(batch, answer):
                return False
        return True

    async def _answer(self, batch: Batch, line: BatchLine, ask: Ask) -> LineAnswer:
        body = orjson.dumps(orjson.loads(line.content)["body"])
        num_broken_off = num_failures = 0
        while True:
            async with self._places_of[batch.tenant], self._places:
                request = LineRequest(batch, body, gives_way=num_broken_off < MAX_GIVEN_WAY)
                reply = await ask(request)
            if reply.retry_after_s is None:
                break
            if reply.status >= 500 and reply.status != 503:
                num_failures += 1
                if num_failures == MAX_ENGINE_FAILURES:
                    break
            num_broken_off += reply.gave_way
            await asyncio.sleep(min(reply.retry_after_s, MAX_WAIT_S))
        response = {"status_code": reply.status, "request_id": reply.request_id, "body": orjson.Fragment(reply.body)}
        return _answer_of(line, response=response, is_error=reply.status >= 400)


@dataclass(slots=True)
class _Work:
    """What is left of a batch.

    Attributes:
        positions: of the lines that nobody has begun with.
        num_bytes: of the answers so far.
    """

    positions: deque[int]
    num_bytes: int


def _end_of(batch: Batch) -> BatchStatus | None:
    """How a batch ends whose end another process had begun."""
    is_answered = batch.num_completed + batch.num_failed >= batch.num_total
    ends: dict[BatchStatus, BatchStatus] = {
        "cancelling": "cancelled",
        "finalizing": "completed" if is_answered else "expired",
    }
    return ends.get(batch.status)


def _not_answered(line: BatchLine, end: BatchStatus) -> LineAnswer:
    if end == "cancelled":
        return _refused(line, "batch_cancelled", "the batch was cancelled before this request was answered")
    return _refused(line, "batch_expired", "the window of the batch ended before this request was answered")


def _refused(
    line: BatchLine, code: Literal["batch_cancelled", "batch_expired", "output_too_large"], message: str
) -> LineAnswer:
    return _answer_of(line, response=None, error={"code": code, "message": message}, is_error=True)


def _answer_of(
    line: BatchLine, *, response: dict[str, Any] | None, error: dict[str, str] | None = None, is_error: bool
) -> LineAnswer:
    answer = {
        "id": f"batch_req_{secrets.token_hex(16)}",
        "custom_id": custom_id_of(line),
        "response": response,
        "error": error,
    }
    return LineAnswer(line.position, orjson.dumps(answer), is_error)
