"""The short way past the router."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Response

from cocktail_serve.errors import QueueTimeoutError
from cocktail_serve.gateway.direct_route import DirectRequest, DirectRoute, DirectRouting
from cocktail_serve.gateway.error_handlers import add_error_handlers


class Router:
    """Counts who has been sent the long way."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.paths: list[str] = []

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        self.paths.append(scope["path"])
        await self.app(scope, receive, send)


@pytest.fixture
def long_way() -> Router:
    router = APIRouter(route_class=DirectRoute)

    @router.post("/fast")
    async def fast(request: DirectRequest) -> None:
        await request.answer(Response(await request.body() + request.scope["route"].path.encode()))

    @router.post("/late")
    async def late(request: DirectRequest) -> None:
        raise QueueTimeoutError("too many", retry_after_s=7)

    @router.post("/broken")
    async def broken(request: DirectRequest) -> None:
        raise ZeroDivisionError

    app = FastAPI()
    app.include_router(router)
    add_error_handlers(app)

    @app.post("/slow")
    async def slow() -> str:
        return "slow"

    return Router(app)


@pytest.fixture
async def http(long_way: Router) -> AsyncIterator[httpx.AsyncClient]:
    direct = DirectRouting(long_way, routes=long_way.app.routes)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(direct), base_url="http://test") as client:
        yield client


async def test_a_direct_route_is_called_at_once(http: httpx.AsyncClient, long_way: Router) -> None:
    answer = await http.post("/fast?x=1", content=b"body of ")
    assert (answer.status_code, answer.text) == (200, "body of /fast")
    assert long_way.paths == []


async def test_its_errors_are_mapped_as_everywhere(http: httpx.AsyncClient, long_way: Router) -> None:
    answer = await http.post("/late")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert answer.json()["error"]["code"] == "queue_timeout"
    assert long_way.paths == []


async def test_other_errors_go_on_to_the_boundary(http: httpx.AsyncClient) -> None:
    with pytest.raises(ZeroDivisionError):
        await http.post("/broken")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/fast", 405), ("POST", "/slow", 200), ("POST", "/fast/", 307), ("POST", "/none", 404)],
)
async def test_all_else_goes_to_the_router(
    http: httpx.AsyncClient, long_way: Router, method: str, path: str, status: int
) -> None:
    assert (await http.request(method, path)).status_code == status
    assert long_way.paths == [path]
