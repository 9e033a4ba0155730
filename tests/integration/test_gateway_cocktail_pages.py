"""Lists of cocktails page by page, and waiting for what becomes of one: two gateways on one store of either kind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cocktail_serve.gateway.app import create_app
from tests.gateways import LiveGateway
from tests.integration.test_cocktail_service import C, World, until

SOON_S = 5.0
"""Long before the end of a `wait` of a minute."""


@dataclass
class Side:
    """A gateway and a client of it."""

    world: World
    app: Any
    http: httpx.AsyncClient

    async def make(self, name: str, **options: Any) -> dict[str, Any]:
        """A cocktail that is ready; its weights are given."""
        weights = {"base": 0.5, "nq": 0.5}
        body = {"name": name, "pool": "flan", "merging_weights": weights, **options}
        return self.said(await self.http.post("/v1/cocktails", params={"wait": 30}, json=body), 201)

    async def begin(self, name: str) -> dict[str, Any]:
        """One whose models wait to be scored, since the gate of the engine is closed."""
        self.world.scoring.gate.clear()
        body = {"name": name, "pool": "flan", "examples": [C]}
        made = self.said(await self.http.post("/v1/cocktails", json=body), 202)
        await until(lambda: self.world.scoring.num_waiting == 3)
        return made

    async def list(self, **params: Any) -> dict[str, Any]:
        return self.said(await self.http.get("/v1/cocktails", params=params))

    async def get(self, ref: str, **params: Any) -> dict[str, Any]:
        return self.said(await self.http.get(f"/v1/cocktails/{ref}", params=params))

    @staticmethod
    def said(response: httpx.Response, status: int = 200) -> dict[str, Any]:
        assert response.status_code == status, response.text
        body: dict[str, Any] = response.json()
        return body


@pytest.fixture
async def sides(tmp_path: Path, database_url: str) -> AsyncIterator[tuple[Side, Side]]:
    async with AsyncExitStack() as stack:
        sides = []
        for name in ("here", "there"):
            world = World(tmp_path / name, url=database_url)
            engines = {"flan": world.scoring, "mini": world.embedding}
            app = create_app(world.settings, pools=world.pools, engines=engines)
            await stack.enter_async_context(app.router.lifespan_context(app))
            transport = httpx.ASGITransport(app=app)
            client = httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60)
            sides.append(Side(world, app, await stack.enter_async_context(client)))
        yield sides[0], sides[1]


async def test_pages_are_followed_as_those_of_files_and_jobs(sides: tuple[Side, Side]) -> None:
    one, other = sides
    made = [(await one.make(f"name-{number % 2}", seed=number))["id"] for number in range(5)]
    newest = made[::-1]

    whole = await one.list()
    assert [cocktail["id"] for cocktail in whole["data"]] == newest
    ends = {"object": "list", "has_more": False, "first_id": newest[0], "last_id": newest[-1]}
    assert {name: value for name, value in whole.items() if name != "data"} == ends
    assert whole["data"][0] == await one.get(newest[0]), "each as it is by itself"

    await until_known(other, newest)
    for side in sides:
        pages = []
        after: dict[str, str] = {}
        while True:
            page = await side.list(limit=2, **after)
            pages.append([cocktail["id"] for cocktail in page["data"]])
            assert (page["first_id"], page["last_id"]) == (pages[-1][0], pages[-1][-1])
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        assert pages == [newest[:2], newest[2:4], newest[4:]]
        named = await side.list(name="name-0", limit=2, after=made[4])
        assert ([cocktail["id"] for cocktail in named["data"]], named["has_more"]) == ([made[2], made[0]], False)

    empty = {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
    assert await one.list(after=made[0]) == empty
    assert await one.list(name="unknown") == empty


async def until_known(side: Side, ids: list[str]) -> None:
    """Waits for what the other gateway has made; a list alone does not ask the store."""
    service = side.app.state.gateway.service
    await until(lambda: [cocktail.id for cocktail in service.catalog.list("default")] == ids)


async def test_a_page_begins_behind_what_the_other_gateway_has_deleted(sides: tuple[Side, Side]) -> None:
    one, other = sides
    made = [(await one.make(f"name-{number}"))["id"] for number in range(4)]
    await until_known(other, made[::-1])
    page = await one.list(limit=2)
    for cocktail in page["data"]:
        assert (await other.http.delete(f"/v1/cocktails/{cocktail['id']}")).status_code == 200
    await until_known(one, [made[1], made[0]])
    rest = await one.list(limit=2, after=page["last_id"])
    assert ([cocktail["id"] for cocktail in rest["data"]], rest["has_more"]) == ([made[1], made[0]], False)


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 10_001}, "limit"),
        ({"limit": "some"}, "limit"),
        ({"after": "films@00000000"}, "after"),
        ({"after": "films"}, "after"),
    ],
)
def test_a_page_that_cannot_be(gateway: LiveGateway, params: dict[str, Any], param: str) -> None:
    with httpx.Client(base_url=gateway.url) as http:
        answer = http.get("/v1/cocktails", params=params)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_change_of_either_gateway_ends_the_wait(sides: tuple[Side, Side]) -> None:
    one, other = sides
    made = await one.begin("films")
    before = await one.get(made["id"])
    assert before["status"] == "scoring"
    waiting = [asyncio.create_task(side.get(made["id"], wait=60)) for side in sides]
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in waiting)
    one.world.scoring.gate.set()
    for task in waiting:
        changed = await asyncio.wait_for(task, SOON_S)
        assert (changed["status"], changed["progress"]) != (before["status"], before["progress"])
        assert changed["progress"] > before["progress"]
    # one change after the other, up to the last
    seen = [changed["progress"]]
    async with asyncio.timeout(30):
        while (changed := await other.get(made["id"], wait=60))["status"] != "ready":
            seen.append(changed["progress"])
    assert seen == sorted(seen)
    assert changed["progress"] == 1.0


async def test_the_wait_ends_in_time_with_what_it_was(sides: tuple[Side, Side]) -> None:
    made = await sides[0].begin("films")
    began = time.monotonic()
    found = await sides[0].get("films", wait=0.3)
    assert 0.3 <= time.monotonic() - began < SOON_S
    assert (found["id"], found["status"]) == (made["id"], "scoring")
    sides[0].world.scoring.gate.set()


async def test_what_has_ended_is_not_waited_for(sides: tuple[Side, Side]) -> None:
    one, other = sides
    ready = await one.make("films")
    began = time.monotonic()
    for side in sides:
        assert (await side.get("films", wait=60))["id"] == ready["id"]
    assert time.monotonic() - began < SOON_S
    missing = await other.http.get("/v1/cocktails/unknown", params={"wait": 60})
    assert missing.json()["error"]["code"] == "cocktail_not_found"


async def test_a_deletion_by_the_other_gateway_ends_the_wait(sides: tuple[Side, Side]) -> None:
    one, other = sides
    made = await one.begin("films")
    waiting = asyncio.create_task(one.http.get(f"/v1/cocktails/{made['id']}", params={"wait": 60}))
    await asyncio.sleep(0.1)
    assert (await other.http.delete(f"/v1/cocktails/{made['id']}")).status_code == 200
    gone = await asyncio.wait_for(waiting, SOON_S)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "cocktail_not_found")
    one.world.scoring.gate.set()


async def test_a_client_that_leaves_is_not_waited_for(sides: tuple[Side, Side]) -> None:
    """The job goes on."""
    one, _ = sides
    made = await one.begin("films")
    left = asyncio.Event()
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("there is nobody to answer")

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": f"/v1/cocktails/{made['id']}",
        "raw_path": f"/v1/cocktails/{made['id']}".encode(),
        "query_string": b"wait=60",
        "root_path": "",
        "headers": [],
    }
    asked = asyncio.create_task(one.app(scope, receive, send))
    await asyncio.sleep(0.2)
    assert not asked.done()
    left.set()
    async with asyncio.timeout(SOON_S):
        await asyncio.wait([asked])
    metrics = (await one.http.get("/metrics")).text
    assert 'cocktail_requests_total{pool="",route="/v1/cocktails/{ref}",status="499"} 1.0' in metrics
    one.world.scoring.gate.set()
    async with asyncio.timeout(SOON_S):
        while (await one.get("films", wait=60))["status"] != "ready":
            pass


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "soon"])
def test_a_wait_that_cannot_be(gateway: LiveGateway, wait: str) -> None:
    with httpx.Client(base_url=gateway.url) as http:
        answer = http.get("/v1/cocktails/films", params={"wait": wait})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "wait")
