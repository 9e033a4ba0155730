"""Requests that the server asks itself for a tenant: lines of batches. They take the way that every request takes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from cocktail_serve.engines.base import Background
from cocktail_serve.gateway.authentication import Caller

_KEY = "cocktail_serve.inside"
"""Of the scope, which no client writes."""


@dataclass(frozen=True, slots=True)
class InsideRequest:
    """Who asks, and how it gives way."""

    caller: Caller
    background: Background


@dataclass(frozen=True, slots=True)
class InsideAnswer:
    """What the app answered.

    Attributes:
        headers: by lower-case name.
    """

    status: int
    headers: dict[str, str]
    body: bytes


def inside_request_of(scope: Scope) -> InsideRequest | None:
    """What the server asks itself; None: a client asks."""
    found = scope.get(_KEY)
    return found if isinstance(found, InsideRequest) else None


async def ask_inside(app: ASGIApp, path: str, body: bytes, inside: InsideRequest) -> InsideAnswer:
    """The answer of the app to a POST of JSON. Cancel it, and what the request holds is released."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status, headers, parts = 0, dict[str, str](), list[bytes]()

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # whoever asks stays
        raise AssertionError("nobody sets it")

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.update((name.decode().lower(), value.decode("latin-1")) for name, value in message["headers"])
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
        "app": app,
        "state": {},
        _KEY: inside,
    }
    await app(scope, receive, send)
    return InsideAnswer(status, headers, b"".join(parts))
