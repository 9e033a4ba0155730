"""Batches in a registry, without a server: resumed, taken over, expired, tried again; and how lines are read."""

from __future__ import annotations

import asyncio
import itertools
import json
import tracemalloc
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from pydantic import ByteSize

from cocktail_serve.batches import runner as runners
from cocktail_serve.batches.batch import Batch, BatchLine, LineAnswer
from cocktail_serve.batches.request import MAX_ERRORS, MAX_LINES, BatchBody, read_lines
from cocktail_serve.batches.runner import BatchRunner, LineReply, LineRequest
from cocktail_serve.batches.store import MAX_UNFINISHED, BatchStore
from cocktail_serve.config import Limits
from cocktail_serve.database import tables
from cocktail_serve.database.database import Database
from cocktail_serve.errors import ConflictError, NotFoundError, QuotaExceededError, RateLimitError
from cocktail_serve.finetuning.files import Files
from cocktail_serve.usage.actor import SERVER

PATH = "/v1/completions"
ME, OTHER = "me", "other"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Server:
    """Answers lines at once, or holds them; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.replies: list[LineReply] = []

    async def __call__(self, request: LineRequest) -> LineReply:
        self.asked.append(json.loads(request.body)["prompt"])
        await self.may_answer.wait()
        if self.replies:
            return self.replies.pop(0)
        return LineReply(200, "req_1", b'{"text":"yes"}')


class World:
    """A registry, and gateways that work with it."""

    def __init__(self, database: Database) -> None:
        self.clock = Clock()
        self.files = Files(database, clock=self.clock)
        self.store = BatchStore(database, self.files, clock=self.clock)
        self.server = Server()
        self.runners: list[BatchRunner] = []
        self.executor = ThreadPoolExecutor(1)

    def gateway(self, me: str = ME, ask: Callable[[LineRequest], Awaitable[LineReply]] | None = None) -> BatchRunner:
        runner = BatchRunner(self.store, self.files, self.executor)
        runner.me = me
        runner.start(ask or self.server)
        self.runners.append(runner)
        return runner

    async def add(self, num_lines: int, *, owner: str = ME, tenant: str = "acme", **fields: Any) -> Batch:
        content = "\n".join(
            json.dumps(
                {"custom_id": f"c{n}", "method": "POST", "url": PATH, "body": {"model": f"m{n % 2}", "prompt": str(n)}}
            )
            for n in range(num_lines)
        ).encode()
        file = await self.files.add(tenant, "f", content, purpose="batch")
        body = BatchBody.model_validate(
            {"input_file_id": file.id, "endpoint": PATH, "completion_window": "24h", **fields}
        )
        return await self.store.add(tenant, body, owner=owner, actor=SERVER)

    async def until(self, batch: Batch, condition: Callable[[Batch], bool]) -> Batch:
        async with asyncio.timeout(30):
            while not condition(found := await self.store.get(batch.tenant, batch.id)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return found

    async def read(self, batch: Batch, file_id: str | None) -> list[dict[str, Any]]:
        assert file_id is not None
        return [json.loads(line) for line in (await self.files.content(batch.tenant, file_id)).splitlines()]


@pytest.fixture
async def world(database: Database) -> Any:
    world = World(database)
    yield world
    for runner in world.runners:
        await runner.stop()
    world.executor.shutdown()


async def test_lines_are_asked_once_those_of_one_model_together(world: World) -> None:
    batch = await world.add(20)
    world.gateway().submit(batch)
    done = await world.until(batch, lambda batch: batch.is_final)
    assert (done.status, done.num_total, done.num_completed, done.num_failed) == ("completed", 20, 20, 0)
    assert sorted(world.server.asked, key=int) == [str(n) for n in range(20)]
    evens = [int(prompt) % 2 for prompt in world.server.asked]
    assert sum(a != b for a, b in pairwise(evens)) <= 8, "but where workers overlap"
    answers = await world.read(done, done.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"c{n}" for n in range(20)]
    assert answers[0]["response"] == {"status_code": 200, "request_id": "req_1", "body": {"text": "yes"}}


async def test_another_gateway_goes_on_where_a_dead_one_was(world: World) -> None:
    batch = await world.add(12)
    first = world.gateway()

    async def five(request: LineRequest) -> LineReply:
        if len(world.server.asked) >= 5:
            await asyncio.Event().wait()
        return await world.server(request)

    first._ask = five
    first.submit(batch)
    await world.until(batch, lambda batch: batch.num_completed == 5)
    second = world.gateway(OTHER)
    await second.adopt(OTHER, frozenset({ME, OTHER}))
    assert len(world.server.asked) == 5, "the first lives"
    await second.adopt(OTHER, frozenset({OTHER}))
    done = await world.until(batch, lambda batch: batch.is_final)
    assert (done.status, done.num_completed, done.owner) == ("completed", 12, OTHER)
    assert len(world.server.asked) == 12, "none that was answered is asked again"
    # the first was only slow: what it writes changes nothing any more
    answer = runners._not_answered(BatchLine(1, b'{"custom_id": "c0"}'), "expired")
    assert not await world.store.answered(batch, answer)
    assert await world.store.get("acme", batch.id) == done


async def test_a_slow_gateway_writes_no_lines_over_those_of_another(world: World) -> None:
    batch = await world.add(4)
    lines, models, _ = read_lines(await world.files.content("acme", batch.input_file_id), PATH)

    asked, may_go_on = itertools.count(), asyncio.Event()

    async def two(request: LineRequest) -> LineReply:
        if next(asked) >= 2:
            await may_go_on.wait()
        return await world.server(request)

    await world.gateway(OTHER, two).adopt(OTHER, frozenset({OTHER}))
    await world.until(batch, lambda batch: batch.num_completed == 2)
    assert await world.store.begin(batch, lines, models) is None
    may_go_on.set()
    done = await world.until(batch, lambda batch: batch.is_final)
    assert (done.num_total, done.num_completed, done.error_file_id) == (4, 4, None)
    assert len(await world.read(done, done.output_file_id)) == 4


async def test_a_gateway_takes_its_own_up_again(world: World) -> None:
    batch = await world.add(3)
    gateway = world.gateway()
    await gateway.adopt(ME, frozenset({ME}))
    await world.until(batch, lambda batch: batch.status == "completed")
    await gateway.adopt(ME, frozenset({ME}))
    assert len(world.server.asked) == 3


async def test_what_is_not_answered_in_its_window_is_given_up(world: World) -> None:
    batch = await world.add(6)
    world.clock.now += 86_400 - 0.3
    world.server.replies = [LineReply(200, "req_1", b"{}")]

    async def one(request: LineRequest) -> LineReply:
        if world.server.asked:
            await asyncio.Event().wait()
        return await world.server(request)

    world.gateway(ask=one).submit(batch)
    done = await world.until(batch, lambda batch: batch.is_final)
    assert (done.status, done.num_completed, done.num_failed) == ("expired", 1, 5)
    assert done.expired_at is not None
    errors = await world.read(done, done.error_file_id)
    assert {(each["response"], each["error"]["code"]) for each in errors} == {(None, "batch_expired")}
    assert len(await world.read(done, done.output_file_id)) == 1


@pytest.mark.parametrize("num_answered", [0, 2])
async def test_what_ends_in_another_process_ends_as_it_would_have(world: World, num_answered: int) -> None:
    batch = await world.add(2)
    lines, models, _ = read_lines(await world.files.content("acme", batch.input_file_id), PATH)
    begun = await world.store.begin(batch, lines, models)
    assert begun is not None
    for line in lines[:num_answered]:
        assert await world.store.answered(begun, LineAnswer(line.position, b"{}", is_error=False))
    await world.store._change(begun, tables.batches.c.status == "in_progress", status="finalizing")
    await world.gateway().adopt(ME, frozenset({ME}))
    done = await world.until(batch, lambda batch: batch.is_final)
    assert done.status == ("completed" if num_answered else "expired")
    assert (done.num_completed, done.num_failed, world.server.asked) == (num_answered, 2 - num_answered, [])


async def test_an_answer_that_comes_while_a_batch_ends_is_not_counted_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await world.add(2)
    lines, models, _ = read_lines(await world.files.content("acme", batch.input_file_id), PATH)
    begun = await world.store.begin(batch, lines, models)
    assert begun is not None
    read = world.store._answers
    kept: list[bool] = []

    async def slowly(*args: Any, **options: Any) -> Any:
        found = await read(*args, **options)
        kept.append(await world.store.answered(begun, LineAnswer(len(kept) + 1, b"{}", is_error=False)))
        return found

    monkeypatch.setattr(world.store, "_answers", slowly)
    await world.store.finish(begun, "expired", lambda line: runners._not_answered(line, "expired"))
    done = await world.store.get("acme", batch.id)
    assert (done.status, done.num_completed, done.num_failed, kept) == ("expired", 0, 2, [False, False])
    assert len(await world.read(done, done.error_file_id)) == 2


async def test_what_may_pass_is_tried_again_and_what_fails_thrice_has_failed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "MAX_WAIT_S", 0.01)
    batch = await world.add(1)
    busy = [LineReply(status, "", b"{}", retry_after_s=60.0) for status in (429, 503, 503, 429, 503)]
    world.server.replies = [*busy, LineReply(502, "", b"{}", retry_after_s=1.0)]
    world.gateway().submit(batch)
    done = await world.until(batch, lambda batch: batch.is_final)
    assert (done.num_completed, len(world.server.asked)) == (1, 7)
    second = await world.add(1)
    world.server.replies = [LineReply(502, "req_2", b'{"error":{}}', retry_after_s=1.0)] * 3
    world.runners[0].submit(second)
    done = await world.until(second, lambda batch: batch.is_final)
    assert (done.status, done.num_failed) == ("completed", 1)
    (error,) = await world.read(done, done.error_file_id)
    assert (error["response"]["status_code"], error["error"]) == (502, None)


async def test_a_line_gives_way_until_it_has_often_enough(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "MAX_WAIT_S", 0.01)
    gave_way = []

    async def ask(request: LineRequest) -> LineReply:
        gave_way.append(request.gives_way)
        is_broken_off = request.gives_way
        return LineReply(503 if is_broken_off else 200, "", b"{}", 1.0 if is_broken_off else None, is_broken_off)

    batch = await world.add(1)
    world.gateway(ask=ask).submit(batch)
    await world.until(batch, lambda batch: batch.status == "completed")
    assert gave_way == [True] * runners.MAX_GIVEN_WAY + [False]


async def test_answers_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "MAX_OUTPUT_BYTES", 300)
    batch = await world.add(20)
    world.gateway().submit(batch)
    done = await world.until(batch, lambda batch: batch.is_final)
    assert done.status == "completed"
    assert 0 < done.num_completed < 10
    errors = await world.read(done, done.error_file_id)
    assert {each["error"]["code"] for each in errors} == {"output_too_large"}


async def test_one_tenant_does_not_take_all_places(world: World) -> None:
    world.server.may_answer.clear()
    gateway = world.gateway()
    for _ in range(3):
        gateway.submit(await world.add(10))
    gateway.submit(await world.add(2, tenant="small"))
    async with asyncio.timeout(30):
        while len(world.server.asked) < runners.LINES_OF_TENANT + 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert len(world.server.asked) == runners.LINES_OF_TENANT + 2


async def test_cancelling_is_heard_of_by_whoever_works_on_it(world: World) -> None:
    world.server.may_answer.clear()
    batch = await world.add(5)
    gateway = world.gateway()
    gateway.submit(batch)
    await world.until(batch, lambda batch: batch.status == "in_progress")
    assert (await world.store.cancel("acme", batch.id, actor=SERVER)).status == "cancelling"
    await gateway.adopt(ME, frozenset({ME}))
    done = await world.until(batch, lambda batch: batch.is_final)
    assert (done.status, done.num_failed) == ("cancelled", 5)
    with pytest.raises(NotFoundError):
        await world.store.cancel("other", batch.id, actor=SERVER)
    finished = await world.add(0)
    gateway.submit(finished)
    await world.until(finished, lambda batch: batch.status == "failed")
    with pytest.raises(ConflictError):
        await world.store.cancel("acme", finished.id, actor=SERVER)


async def test_the_input_may_be_deleted_once_it_was_read(world: World) -> None:
    gone = await world.add(1)
    await world.files.delete("acme", gone.input_file_id)
    world.gateway().submit(gone)
    failed = await world.until(gone, lambda batch: batch.is_final)
    assert (failed.status, failed.errors[0].code) == ("failed", "invalid_file")
    world.server.may_answer.clear()
    kept = await world.add(2, output_expires_after={"anchor": "created_at", "seconds": 3600})
    world.runners[0].submit(kept)
    await world.until(kept, lambda batch: batch.status == "in_progress")
    await world.files.delete("acme", kept.input_file_id)
    world.server.may_answer.set()
    done = await world.until(kept, lambda batch: batch.is_final)
    assert done.num_completed == 2
    assert done.output_file_id is not None
    assert (await world.files.get("acme", done.output_file_id)).expires_at == world.clock.now + 3600


async def test_a_tenant_has_so_many_unfinished(world: World) -> None:
    for _ in range(MAX_UNFINISHED):
        await world.add(1)
    with pytest.raises(RateLimitError, match="unfinished"):
        await world.add(1)
    await world.add(1, tenant="other")


async def test_no_batch_begins_for_a_tenant_that_keeps_all_it_may(world: World) -> None:
    batch = await world.add(5)
    limits = Limits(example_bytes=ByteSize(1000))
    world.files._limits_of = lambda _: limits
    world.gateway().submit(batch)
    done = await world.until(batch, lambda batch: batch.is_final)
    assert done.output_file_id is not None
    assert (await world.files.get("acme", done.output_file_id)).num_bytes > 500, "never refused"
    body = BatchBody(input_file_id=batch.input_file_id, endpoint=PATH, completion_window="24h")
    with pytest.raises(QuotaExceededError, match="delete"):
        await world.store.add("acme", body, owner=ME, actor=SERVER)
    await world.files.delete("acme", done.output_file_id)
    await world.store.add("acme", body, owner=ME, actor=SERVER)


async def test_old_ones_are_swept_and_their_files_stay(world: World) -> None:
    batch = await world.add(1)
    world.gateway().submit(batch)
    done = await world.until(batch, lambda batch: batch.is_final)
    await world.store.sweep(older_than_s=10)
    assert await world.store.get("acme", batch.id) == done
    world.clock.now += 11
    await world.store.sweep(older_than_s=10)
    with pytest.raises(NotFoundError):
        await world.store.get("acme", batch.id)
    assert len(await world.read(done, done.output_file_id)) == 1


def test_a_request_that_could_not_be_written_again_is_told_and_not_asked() -> None:
    def line(depth: int) -> bytes:
        body = b'{"model":"m","prompt":' + b"[" * depth + b"]" * depth + b"}"
        return b'{"custom_id":"a","method":"POST","url":"%b","body":%b}' % (PATH.encode(), body)

    lines, _, errors = read_lines(line(150), PATH)
    assert (len(lines), errors) == (1, []), "the server says of it what it says of one alone"
    for depth in (300, 900, 5000):
        lines, _, (error,) = read_lines(line(depth), PATH)
        assert (lines, error.code, error.line) == ([], "invalid_json_line", 1)


def test_a_file_of_short_lines_takes_little_memory() -> None:
    content = b"ab\n" * 1_000_000
    tracemalloc.start()
    _, _, errors = read_lines(content, PATH)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(errors) == MAX_ERRORS
    assert peak < 2 * len(content)


def test_a_file_is_bounded_in_lines_and_in_errors() -> None:
    line = {"method": "POST", "url": PATH, "body": {}}
    many = b"\n".join(json.dumps(line | {"custom_id": str(n)}).encode() for n in range(MAX_LINES + 1))
    lines, models, errors = read_lines(many, PATH)
    assert (len(lines), len(models), [error.code for error in errors]) == (MAX_LINES, MAX_LINES, ["too_many_tasks"])
    assert len(read_lines(b"x\n" * 1000, PATH)[2]) == MAX_ERRORS
    lines, _, errors = read_lines(b"\xef\xbb\xbf\n" + many[:200].split(b"\n")[0] + b"\r\n\n", PATH)
    assert ([line.position for line in lines], errors) == ([2], [])
