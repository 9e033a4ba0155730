"""What is around the routes: packed bodies, and HEAD."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from cocktail_serve.errors import InvalidRequestError, PayloadTooLargeError
from cocktail_serve.gateway.middleware import MAX_PIECE, ContentDecoding

LIMIT = 4 * MAX_PIECE


async def received(*pieces: bytes, coding: bytes | None = b"gzip", limit: int = LIMIT) -> list[bytes]:
    """The pieces of a body as an app behind the middleware receives them, and that the client's leaving comes after."""
    messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = False
    got: list[bytes] = []

    async def receive() -> Message:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            got.append(message["body"])
            if not message.get("more_body", False):
                break
        for _ in range(2):
            assert await receive() == {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    headers = [] if coding is None else [(b"content-encoding", coding)]
    await ContentDecoding(app, max_bytes=limit)({"type": "http", "headers": headers}, receive, send)
    return got


BODY = json.dumps({"input": [f"text {number}" for number in range(2000)]}).encode()


@pytest.mark.parametrize("coding", [b"gzip", b"x-gzip", b" GZIP "])
async def test_gzip_in_one_piece(coding: bytes) -> None:
    assert b"".join(await received(gzip.compress(BODY), coding=coding)) == BODY


async def test_gzip_in_pieces_of_any_size() -> None:
    packed = gzip.compress(BODY)
    for size in (1, 7, 1000):
        pieces = [packed[start : start + size] for start in range(0, len(packed), size)]
        assert b"".join(await received(*pieces, b"")) == BODY


@pytest.mark.parametrize("coding", [None, b"identity", b""])
async def test_other_bodies_are_left_alone(coding: bytes | None) -> None:
    assert await received(b"ab", b"c", coding=coding) == [b"ab", b"c"]


async def test_a_bomb_is_not_unpacked() -> None:
    """A thousand times what is sent: refused at the limit, after pieces that each hold the loop for a moment only."""
    bomb = gzip.compress(bytes(64 * LIMIT))
    assert len(bomb) < LIMIT / 4
    taken: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": bomb, "more_body": False}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            taken.append(len((await receive())["body"]))

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "headers": [(b"content-encoding", b"gzip")]}
    with pytest.raises(PayloadTooLargeError, match=f"larger than {LIMIT} bytes when unpacked"):
        await ContentDecoding(app, max_bytes=LIMIT)(scope, receive, send)
    assert taken == [MAX_PIECE] * 4


async def test_exactly_the_limit_is_taken() -> None:
    body = bytes(LIMIT)
    assert b"".join(await received(gzip.compress(body))) == body
    with pytest.raises(PayloadTooLargeError):
        await received(gzip.compress(body + b"x"))


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda packed: b"",
    "not packed": lambda packed: BODY,
    "cut": lambda packed: packed[:-9],
    "cut in its checksum": lambda packed: packed[:-1],
    "wrong checksum": lambda packed: packed[:-8] + bytes(8),
    "another behind it": lambda packed: packed + packed,
    "zlib": lambda packed: zlib.compress(BODY),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
async def test_what_is_not_gzip(broken: Callable[[bytes], bytes]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await received(broken(gzip.compress(BODY)))
    assert caught.value.code == "invalid_content_encoding"


@pytest.mark.parametrize("coding", [b"br", b"deflate", b"zstd", b"gzip, gzip"])
async def test_other_codings_are_refused_by_name(coding: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=coding.decode()) as caught:
        await received(BODY, coding=coding)
    assert caught.value.code == "unsupported_content_encoding"


async def test_a_client_that_leaves_in_the_middle() -> None:
    messages: list[Message] = [{"type": "http.request", "body": gzip.compress(BODY)[:50], "more_body": True}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive, send).body()

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "headers": [(b"content-encoding", b"gzip")]}
    with pytest.raises(ClientDisconnect):
        await ContentDecoding(app, max_bytes=LIMIT)(scope, receive, send)
