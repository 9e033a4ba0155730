"""Streams on their way through: what is passed on, and which ends are failures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest

from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.vllm.connections import EngineResponse
from cocktail_serve.engines.vllm.responses import iter_events
from cocktail_serve.errors import CocktailError, DrainedError, EngineError, InvalidRequestError

TOKEN, LAST = b'{"choices":[{"finish_reason":null}]}', b'{"choices":[{"finish_reason":"stop"}]}'
DONE = b"[DONE]"


class Owner:
    is_draining = False

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_released = 0

    def give_back(self, lease: Lease) -> None:
        self.num_released += 1

    def charge(self, tenant: str, num_tokens: int) -> None:
        self.num_tokens += num_tokens


class Blocks:
    """An answer that comes in these blocks, and breaks off after them if it is to."""

    def __init__(self, blocks: Sequence[bytes], *, breaks: bool = False) -> None:
        self._blocks = list(blocks)
        self._breaks = breaks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self._blocks:
            yield self._blocks.pop(0)
        if self._breaks:
            raise ConnectionResetError("cut")

    async def read(self) -> bytes:
        return b"".join([block async for block in self])


def stream_of(*payloads: bytes) -> bytes:
    return b"".join(b"data: " + payload + b"\n\n" for payload in payloads)


async def events(blocks: Sequence[bytes], lease: Lease, *, breaks: bool = False) -> list[bytes]:
    answer = cast(EngineResponse, Blocks(blocks, breaks=breaks))
    return [payload async for payload in iter_events(answer, lease)]


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_payloads_are_passed_on_however_they_are_cut(size: int) -> None:
    content = b": alive\n\n" + stream_of(TOKEN, TOKEN, LAST, DONE)
    owner = Owner()
    blocks = [content[start : start + size] for start in range(0, len(content), size)]
    assert await events(blocks, Lease(owner, tenant="t")) == [TOKEN, TOKEN, LAST]
    assert owner.num_released == 1
    assert owner.num_tokens == 5, "one for each event, about"


def typed(*names: str) -> bytes:
    return b"".join(b'event: %b\ndata: {"type":"%b"}\n\n' % (name.encode(), name.encode()) for name in names)


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("last", ["response.completed", "response.incomplete", "response.failed"])
async def test_a_stream_of_typed_events_ends_with_its_last(size: int, last: str) -> None:
    content = typed("response.created", "response.output_text.delta", last)
    blocks = [content[start : start + size] for start in range(0, len(content), size)]
    owner = Owner()
    payloads = await events(blocks, Lease(owner, tenant="t"))
    assert payloads == [
        b'{"type":"%b"}' % name for name in (b"response.created", b"response.output_text.delta", last.encode())
    ]
    assert owner.num_released == 1


async def test_a_stream_of_typed_events_without_its_last_is_a_failure() -> None:
    with pytest.raises(EngineError, match="before its answer was finished"):
        await events([typed("response.created", "response.output_text.delta")], Lease(Owner()))


@pytest.mark.parametrize(
    ("payloads", "message"),
    [
        ((TOKEN, DONE), "before its answer was finished"),
        ((TOKEN,), "before its answer was finished"),
        ((TOKEN, LAST), "before its answer was finished"),
        ((TOKEN, b'{"choices":[{"finish_reason":"abort"}]}'), "aborted"),
        ((TOKEN, b'{"error":{"message":"no memory","code":500}}', DONE), "no memory"),
        ((TOKEN, b'{"error":"no memory"}', DONE), "no memory"),
        ((TOKEN, b'{"error": {"message": "EngineCore died", "code": 500}}', DONE), "EngineCore died"),
    ],
)
async def test_any_other_end_is_a_failure(payloads: Sequence[bytes], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        await events([stream_of(*payloads)], Lease(Owner()))


async def test_a_fault_of_the_request_is_the_clients() -> None:
    with pytest.raises(InvalidRequestError, match="too long"):
        await events([stream_of(TOKEN, b'{"error":{"message":"too long","code":400}}')], Lease(Owner()))


@pytest.mark.parametrize("end", [(), (b'{"choices":[{"finish_reason":"abort"}]}',)])
@pytest.mark.parametrize("error", [None, DrainedError("its turn is over")])
async def test_a_stream_that_broke_off_says_why_where_we_ended_it(
    end: Sequence[bytes], error: CocktailError | None
) -> None:
    lease = Lease(Owner())
    if error is not None:
        lease.end(error)
    with pytest.raises(DrainedError if error else EngineError):
        await events([stream_of(TOKEN, *end)], lease, breaks=True)
