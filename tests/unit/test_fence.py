"""The fence, without vLLM: who may enter, what counts as in flight, what a refusal looks like."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from vllm_cocktail.fence import UNFENCED_PATHS, ASGIMessage, ASGIScope, Fence, FenceMiddleware, Receive, Send

A, B = "a" * 64, "b" * 64


def open_fence(*, managed: bool = True) -> Fence:
    fence = Fence(managed=managed)
    fence.open({A})
    return fence


class App:
    """Answers when told to, so that a request can be looked at while it is in flight."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.finish = asyncio.Event()
        self.finish.set()
        self.fails = False
        self.paths: list[str] = []

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        self.paths.append(scope.get("path", scope["type"]))
        self.entered.set()
        await self.finish.wait()
        if self.fails:
            raise RuntimeError("the app failed")
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})


def scope_of(path: str = "/v1/completions", *, recipe: str | None = None, **more: Any) -> ASGIScope:
    headers = [] if recipe is None else [(b"x-cocktail-recipe", recipe.encode())]
    return {"type": "http", "path": path, "root_path": "", "method": "POST", "headers": headers, **more}


async def call(middleware: FenceMiddleware, scope: ASGIScope) -> list[ASGIMessage]:
    sent: list[ASGIMessage] = []

    async def receive() -> ASGIMessage:
        return {"type": "websocket.connect"}

    async def send(message: ASGIMessage) -> None:
        sent.append(message)

    await middleware(scope, receive, send)
    return sent


def header(message: ASGIMessage, name: str) -> str | None:
    return next((value.decode() for key, value in message["headers"] if key.decode() == name), None)


async def test_the_resident_recipe_enters_and_is_named_on_the_answer() -> None:
    app = App()
    start, _ = await call(FenceMiddleware(app, open_fence()), scope_of(recipe=A))
    assert start["status"] == 200
    assert header(start, "x-cocktail-recipe") == A


@pytest.mark.parametrize(
    ("managed", "recipe", "status"),
    [(True, None, 409), (True, B, 409), (True, "", 409), (False, None, 200), (False, B, 409), (False, A, 200)],
)
async def test_who_may_enter_an_open_fence(managed: bool, recipe: str | None, status: int) -> None:
    app = App()
    start, body = await call(FenceMiddleware(app, open_fence(managed=managed)), scope_of(recipe=recipe))
    assert start["status"] == status
    assert bool(app.paths) == (status == 200)
    if status == 409:
        answer = json.loads(body["body"])
        missing = "header x-cocktail-recipe is missing: it names the recipe to answer"
        message = missing if recipe is None else f"recipe {recipe} is not resident"
        assert answer["error"] == {
            "message": message,
            "type": "conflict_error",
            "param": None,
            "code": "recipe_not_resident",
        }
        assert answer["resident"] == A
        assert [message["type"] for message in (start, body)] == ["http.response.start", "http.response.body"]
        assert header(start, "content-type") == "application/json"
        assert header(start, "content-length") == str(len(body["body"]))
        assert header(start, "retry-after") == "1"
    else:
        assert header(start, "x-cocktail-recipe") == A, "who names none is told whose answer it is"


@pytest.mark.parametrize("managed", [True, False])
@pytest.mark.parametrize(
    ("recipe", "status"), [(A, 200), (B, 200), ("c" * 64, 409), ("a", 409), ("", 409), (None, 409)]
)
async def test_who_may_enter_a_fence_of_several_recipes(managed: bool, recipe: str | None, status: int) -> None:
    """Whoever names none is nobody's: there is no recipe that it could mean."""
    app, fence = App(), Fence(managed=managed)
    fence.open({A, B})
    start, body = await call(FenceMiddleware(app, fence), scope_of(recipe=recipe))
    assert start["status"] == status
    assert bool(app.paths) == (status == 200)
    if status == 200:
        assert header(start, "x-cocktail-recipe") == recipe
    else:
        answer = json.loads(body["body"])
        assert (answer["error"]["code"], answer["resident"]) == ("recipe_not_resident", None)


async def test_recipes_side_by_side_are_counted_together() -> None:
    app, fence = App(), Fence()
    fence.open({A, B})
    app.finish.clear()
    requests = [asyncio.create_task(call(FenceMiddleware(app, fence), scope_of(recipe=recipe))) for recipe in (A, B)]
    await asyncio.sleep(0)
    assert fence.in_flight == 2
    fence.close()
    assert fence.resident is None
    assert not await fence.until_empty(0)
    fence.open({B})
    app.finish.set()
    assert [header(start, "x-cocktail-recipe") for start, _ in await asyncio.gather(*requests)] == [A, B]
    start, _ = await call(FenceMiddleware(app, fence), scope_of(recipe=A))
    assert start["status"] == 409
    assert fence.resident == B


def test_a_poisoned_fence_serves_nothing() -> None:
    fence = Fence()
    fence.open({A, B})
    fence.poison("a mix failed")
    fence.open({A})
    assert (list(fence.serves), fence.resident) == ([], None)


async def test_two_recipe_headers_are_one_wrong_one() -> None:
    scope = scope_of(recipe=A)
    scope["headers"].append((b"x-cocktail-recipe", B.encode()))
    start, _ = await call(FenceMiddleware(App(), open_fence()), scope)
    assert start["status"] == 409


@pytest.mark.parametrize("managed", [True, False])
@pytest.mark.parametrize("recipe", [None, A, B])
async def test_nobody_enters_while_a_mix_is_on(managed: bool, recipe: str | None) -> None:
    fence = open_fence(managed=managed)
    fence.close()
    assert fence.state == "mixing"
    start, body = await call(FenceMiddleware(App(), fence), scope_of(recipe=recipe))
    assert start["status"] == 409
    error = json.loads(body["body"])["error"]
    assert error["code"] == "recipe_not_resident"
    assert error["message"] == "another recipe is being mixed into the engine; try again"
    fence.open({A})
    assert fence.state == "open"


async def test_a_new_fence_is_closed_and_asks_for_a_recipe() -> None:
    start, _ = await call(FenceMiddleware(App(), Fence(managed=False)), scope_of())
    assert start["status"] == 409
    fence = Fence()
    assert (fence.state, fence.managed) == ("mixing", True)


async def test_a_poisoned_fence_stays_shut() -> None:
    fence = open_fence()
    fence.poison("a mix failed")
    fence.poison("and so did what came after")
    fence.open({A})
    fence.close()
    assert fence.state == "poisoned"
    assert fence.resident is None
    start, body = await call(FenceMiddleware(App(), fence), scope_of(recipe=A))
    assert start["status"] == 503
    error = json.loads(body["body"])["error"]
    assert (error["code"], error["type"]) == ("engine_poisoned", "server_error")
    assert error["message"] == "the engine lost its parameters and must be restarted: a mix failed"
    assert header(start, "retry-after") is None, "waiting does not help"


@pytest.mark.parametrize("path", sorted(UNFENCED_PATHS))
async def test_paths_off_the_engine_pass_a_poisoned_fence(path: str) -> None:
    fence = open_fence()
    fence.poison("gone")
    app = App()
    start, _ = await call(FenceMiddleware(app, fence), scope_of(path))
    assert start["status"] == 200
    assert header(start, "x-cocktail-recipe") is None


@pytest.mark.parametrize(
    "path", ["/health/", "//health", "/v1/models/x", "/v1/cocktail/mix/", "/V1/MODELS", "", "/new"]
)
async def test_any_other_path_is_fenced(path: str) -> None:
    start, _ = await call(FenceMiddleware(App(), open_fence()), scope_of(path))
    assert start["status"] == 409


async def test_a_path_under_a_root_path_is_known() -> None:
    start, _ = await call(FenceMiddleware(App(), open_fence()), scope_of("/proxy/health", root_path="/proxy"))
    assert start["status"] == 200


async def test_a_request_counts_until_the_app_has_finished() -> None:
    app, fence = App(), open_fence()
    app.finish.clear()
    request = asyncio.create_task(call(FenceMiddleware(app, fence), scope_of(recipe=A)))
    await app.entered.wait()
    assert fence.in_flight == 1
    fence.close()
    assert not await fence.until_empty(0)
    draining = asyncio.create_task(fence.until_empty(30))
    app.finish.set()
    assert await draining
    assert fence.in_flight == 0
    await request


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_a_request_that_ends_badly_counts_out(how: str) -> None:
    app, fence = App(), open_fence()
    app.finish.clear()
    app.fails = how == "fails"
    request = asyncio.create_task(call(FenceMiddleware(app, fence), scope_of(recipe=A)))
    await app.entered.wait()
    if how == "fails":
        app.finish.set()
    else:
        request.cancel()
    with pytest.raises((RuntimeError, asyncio.CancelledError)):
        await request
    assert fence.in_flight == 0
    assert await fence.until_empty(0)


async def test_an_answer_names_the_recipe_that_gave_it_not_the_one_resident_at_its_end() -> None:
    app, fence = App(), open_fence()
    app.finish.clear()
    request = asyncio.create_task(call(FenceMiddleware(app, fence), scope_of(recipe=A)))
    await app.entered.wait()
    fence.close()
    fence.open({B})
    app.finish.set()
    assert header((await request)[0], "x-cocktail-recipe") == A


@pytest.mark.parametrize("scope", [scope_of("/health"), scope_of(recipe=A), {"type": "lifespan"}])
async def test_the_app_hears_and_answers_the_client_itself(scope: ASGIScope) -> None:
    heard: list[ASGIMessage] = []

    async def echo(scope: ASGIScope, receive: Receive, send: Send) -> None:
        heard.append(await receive())
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"{}"})

    sent = await call(FenceMiddleware(echo, open_fence()), scope)
    assert heard == [{"type": "websocket.connect"}], "what `call` has to say"
    stamp = {"headers": [(b"x-cocktail-recipe", A.encode())]} if scope.get("headers") else {}
    assert sent == [
        {"type": "http.response.start", "status": 200, **stamp},
        {"type": "http.response.body", "body": b"{}"},
    ]


async def test_what_the_app_says_in_headers_stays() -> None:
    async def app(scope: ASGIScope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})

    (start,) = await call(FenceMiddleware(app, open_fence()), scope_of(recipe=A))
    assert start["headers"] == [(b"x-own", b"1"), (b"x-cocktail-recipe", A.encode())]


async def test_a_scope_without_a_root_path_is_known() -> None:
    scope = scope_of("/health")
    del scope["root_path"]
    start, _ = await call(FenceMiddleware(App(), Fence()), scope)
    assert start["status"] == 200


async def test_lifespan_passes() -> None:
    app = App()
    await call(FenceMiddleware(app, Fence()), {"type": "lifespan"})
    assert app.paths == ["lifespan"]


async def test_a_websocket_is_counted_like_a_request() -> None:
    app, fence = App(), open_fence()
    app.finish.clear()
    socket = asyncio.create_task(call(FenceMiddleware(app, fence), scope_of(recipe=A, type="websocket")))
    await app.entered.wait()
    assert fence.in_flight == 1
    app.finish.set()
    await socket
    assert fence.in_flight == 0


async def test_a_websocket_for_another_recipe_is_denied_with_the_same_body() -> None:
    extensions = {"websocket.http.response": {}}
    sent = await call(FenceMiddleware(App(), open_fence()), scope_of(recipe=B, type="websocket", extensions=extensions))
    assert sent[0]["type"] == "websocket.http.response.start"
    assert sent[0]["status"] == 409
    assert sent[1]["type"] == "websocket.http.response.body"
    assert json.loads(sent[1]["body"])["resident"] == A


async def test_a_websocket_of_an_old_server_is_closed() -> None:
    (sent,) = await call(FenceMiddleware(App(), open_fence()), scope_of(recipe=B, type="websocket"))
    assert sent == {"type": "websocket.close", "code": 1013, "reason": "recipe_not_resident"}


async def test_a_shut_path_is_nobodys() -> None:
    app = App()
    middleware = FenceMiddleware(app, open_fence(), shut={"/v1/responses": "it reads no chat template"})
    start, body = await call(middleware, scope_of("/v1/responses", recipe=A))
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (501, "not_served")
    assert app.paths == []
    assert (await call(middleware, scope_of(recipe=A)))[0]["status"] == 200
