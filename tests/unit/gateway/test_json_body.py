"""Only what JSON is gets in."""

from __future__ import annotations

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.gateway.json_body import MAX_DEPTH, json_object
from cocktail_serve.gateway.schemas.cocktails import CurrentVersion
from cocktail_serve.request_schema import parse_as


def request(*pieces: bytes, content_type: str | None = "application/json") -> Request:
    messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = False

    async def receive() -> Message:
        return messages.pop(0)

    headers = [] if content_type is None else [(b"content-type", content_type.encode())]
    return Request({"type": "http", "headers": headers}, receive)


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON; charset=utf-8", "application/merge-patch+json"]
)
async def test_json(content_type: str) -> None:
    assert await json_object(request(b'{"a": [1, 2.5, null]}', content_type=content_type)) == {"a": [1, 2.5, None]}


async def test_a_body_in_pieces() -> None:
    assert await json_object(request(b'{"a"', b"", b": 1}")) == {"a": 1}


async def test_a_client_that_leaves_before_the_end_of_its_body() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    headers = [(b"content-type", b"application/json")]
    with pytest.raises(ClientDisconnect):
        await json_object(Request({"type": "http", "headers": headers}, receive))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b'{"a": 1} x',
        b"{'a': 1}",
    ],
)
async def test_not_json(body: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await json_object(request(body))
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "jsonish"])
async def test_other_content_types(content_type: str | None) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await json_object(request(b"{}", content_type=content_type))
    assert caught.value.code == "unsupported_content_type"


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
async def test_nesting(opening: bytes, closing: bytes) -> None:
    def nested(levels: int) -> bytes:
        return b'{"x":' + opening * (levels - 1) + b"1" + closing * (levels - 1) + b"}"

    assert await json_object(request(nested(MAX_DEPTH)))
    for levels in (MAX_DEPTH + 1, 500, 100_000):
        with pytest.raises(InvalidRequestError):
            await json_object(request(nested(levels)))


async def test_wide_is_not_deep() -> None:
    assert len((await json_object(request(b'{"a": [' + b"[]," * 1000 + b"[]]}")))["a"]) == 1001


def test_schemas_name_the_field() -> None:
    with pytest.raises(InvalidRequestError, match="unknown field 'name'; known are current") as unknown:
        parse_as(CurrentVersion, {"current": None, "name": "x"})
    assert unknown.value.param == "name"
    with pytest.raises(InvalidRequestError) as wrong:
        parse_as(CurrentVersion, {"current": 7}, param="body")
    assert wrong.value.param == "body.current"
