"""The fence: no request reaches the engine under other parameters than those it names.

A pause of vLLM is no fence: requests that were queued inside it run after the resume, on the new parameters. So the
requests are counted here, before the engine, and a mix starts only when none is left. Pure ASGI without vLLM.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from cocktail_serve.errors import ClientError
from vllm_cocktail.replies import FORGET_PATH, MIX_PATH, STATUS_PATH, FenceState

ASGIScope = MutableMapping[str, Any]
ASGIMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
ASGIApp = Callable[[ASGIScope, Receive, Send], Awaitable[None]]

RECIPE_HEADER = "x-cocktail-recipe"
"""On a request: digest of the recipe that must answer it. On an answer: digest of the recipe that did."""

UNFENCED_PATHS = frozenset(
    {
        "/detokenize",
        "/docs",
        "/docs/oauth2-redirect",
        "/health",
        "/load",
        "/metrics",
        "/openapi.json",
        "/ping",
        "/redoc",
        "/tokenize",
        FORGET_PATH,
        MIX_PATH,
        STATUS_PATH,
        "/v1/models",
        "/version",
    }
)
"""Exact paths that never compute with the parameters. Everything else is fenced, also what vLLM adds one day."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not enter.

    Attributes:
        status: 409 where the right recipe can come to be served, 503 where the engine is lost, 400 where the request
            must change, 501 where no request would do.
    """

    status: int
    code: str
    message: str


def error_body(
    status: int, code: str | None, message: str, *, resident: str | None, param: str | None = None
) -> dict[str, Any]:
    """What the plugin answers in place of the engine: OpenAI's shape, and the resident recipe."""
    kind = {400: "invalid_request_error", 409: "conflict_error"}.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}, "resident": resident}


class Fence:
    """Who may use the parameters now. Lives on one event loop; every method but `until_empty` returns at once.

    Args:
        managed: whether every request must name its recipe.

    Attributes:
        serves: digests of the recipes that the engine answers by: one, where it holds one at a time; none when it is
            poisoned. While the fence is closed, those of before.
        state: `mixing` is closed, whatever for: also before the first `open`.
        in_flight: requests inside.

    The fence starts closed; `open` follows when the server is ready.
    """

    def __init__(self, *, managed: bool = True) -> None:
        self.managed = managed
        self.state: FenceState = "mixing"
        self.serves: Collection[str] = ()
        self.in_flight = 0
        self._poison = ""
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def resident(self) -> str | None:
        """Digest of the recipe that the engine holds; None: it is lost, or answers by several."""
        return next(iter(self.serves)) if len(self.serves) == 1 else None

    def refusal(self, recipe_digest: str | None) -> Refusal | None:
        """Why a request that names `recipe_digest` may not enter now, or None if it may."""
        if self.state == "poisoned":
            return Refusal(
                503, "engine_poisoned", f"the engine lost its parameters and must be restarted: {self._poison}"
            )
        if self.state == "mixing":
            return Refusal(409, "recipe_not_resident", "another recipe is being mixed into the engine; try again")
        if recipe_digest is None and (self.managed or self.resident is None):
            return Refusal(
                409, "recipe_not_resident", f"header {RECIPE_HEADER} is missing: it names the recipe to answer"
            )
        if recipe_digest is not None and recipe_digest not in self.serves:
            return Refusal(409, "recipe_not_resident", f"recipe {recipe_digest} is not resident")
        return None

    def enter(self) -> None:
        """Counts a request in. Call it in the same step as `refusal`, with no await between."""
        self.in_flight += 1
        self._empty.clear()

    def leave(self) -> None:
        """Counts a request out, once nothing of it can reach the engine any more."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._empty.set()

    def close(self) -> None:
        """Lets nobody in until `open`; those inside stay."""
        if self.state != "poisoned":
            self.state = "mixing"

    async def until_empty(self, timeout_s: float) -> bool:
        """Waits until nobody is inside; False if somebody still is after `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return self.in_flight == 0
        return True

    def open(self, serves: Collection[str]) -> None:
        """Lets requests for these recipes in, and for no others. A poisoned fence stays shut."""
        if self.state != "poisoned":
            self.serves = serves
            self.state = "open"

    def poison(self, reason: str) -> None:
        """Shuts the fence for good: nobody knows which parameters the engine holds."""
        if self.state != "poisoned":
            self.state = "poisoned"
            self.serves = ()
            self._poison = reason


Bind = Callable[[ASGIScope, Receive, str | None], Awaitable[tuple[str, Receive]]]
"""Reads which recipe a request brings, given what its header says, and gives back what the app is to receive.

Raises ClientError for a request that may not enter."""


class FenceMiddleware:
    """Puts every request that can reach the engine behind a fence. ASGI middleware, streams and websockets included.

    A request counts as in flight until the app has finished with it, whatever the client does meanwhile.

    Args:
        bind: where requests bring their recipe with them: gives it to the engine, or keeps the request out.
        shut: exact paths that nobody may enter, and why: what the engine does there, and does not.
    """

    def __init__(
        self, app: ASGIApp, fence: Fence, bind: Bind | None = None, shut: Mapping[str, str] | None = None
    ) -> None:
        self.app = app
        self.fence = fence
        self._bind = bind
        self._shut = shut or {}

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in UNFENCED_PATHS:
            return await self.app(scope, receive, send)
        if path in self._shut:
            shut = Refusal(501, "not_served", f"{path} is not served: {self._shut[path]}")
            return await _refuse(scope, receive, send, shut, resident=self.fence.resident)
        named = _header(scope, RECIPE_HEADER)
        brings_recipe = self._bind is not None and named is None and not self.fence.managed
        refusal = None if brings_recipe else self.fence.refusal(named)
        if refusal is None and self._bind is not None:
            try:
                named, receive = await self._bind(scope, receive, named)
            except ClientError as error:
                refusal = Refusal(400, error.code, error.message)
            else:
                refusal = self.fence.refusal(named)  # it took a while
        if refusal is not None:
            return await _refuse(scope, receive, send, refusal, resident=self.fence.resident)
        self.fence.enter()
        try:
            await self.app(scope, receive, _stamp(send, self.fence.resident if named is None else named))
        finally:
            self.fence.leave()


def _header(scope: ASGIScope, name: str) -> str | None:
    """A header's value; several of one name are one wrong value, never a choice."""
    values = [value for key, value in scope["headers"] if key == name.encode()]
    return b",".join(values).decode("latin-1") if values else None


def _stamp(send: Send, recipe_digest: str | None) -> Send:
    """Says on the answer which recipe gave it."""

    async def stamped(message: ASGIMessage) -> None:
        if message["type"] == "http.response.start" and recipe_digest is not None:
            headers = [*message.get("headers", ()), (RECIPE_HEADER.encode(), recipe_digest.encode())]
            message = {**message, "headers": headers}
        await send(message)

    return stamped


async def _refuse(scope: ASGIScope, receive: Receive, send: Send, refusal: Refusal, *, resident: str | None) -> None:
    prefix = "http.response"
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1013, "reason": refusal.code})
            return
        prefix = "websocket.http.response"
    body = json.dumps(error_body(refusal.status, refusal.code, refusal.message, resident=resident)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 409:
        headers.append((b"retry-after", b"1"))
    await send({"type": f"{prefix}.start", "status": refusal.status, "headers": headers})
    await send({"type": f"{prefix}.body", "body": body})
