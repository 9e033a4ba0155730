"""What a registry of many cocktails costs the event loop.

    python -m bench.registry                                     # 50,000 cocktails of 5,000 tenants
    python -m bench.registry --cocktails 1000 --tenants 100
    python -m bench.registry --folder /tmp/registry             # filled once, measured as often as you like

Writes the cocktails into a SQLite file, starts the gateway over it in this process (a decoder pool behind the fake
engine, no sockets: requests are handed to the app), and makes the calls of one tenant. Of each call it gives the time
from its beginning to its end, and the longest stretch for which it kept the event loop from everybody else: other
requests wait for that. Calls that never yield are timed as they are.

Prints JSON: for each call the median and the largest over its repetitions, start-up, memory, and the machine. Where
other programs run, `stretch_cpu_ms` is what the call did, and `stretch_max_ms` what they did to it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from fastapi import FastAPI
from sqlalchemy import create_engine, insert, update

from bench.machine import describe_machine
from cocktail_serve.cocktails.cocktail import Cocktail, CrossValidation
from cocktail_serve.cocktails.options import CocktailRequest
from cocktail_serve.cocktails.parsing import parse_request
from cocktail_serve.cocktails.rows import to_row
from cocktail_serve.config import Settings
from cocktail_serve.database import tables
from cocktail_serve.database.database import Database
from cocktail_serve.gateway.app import create_app
from cocktail_serve.gateway.gateway import Gateway
from cocktail_serve.gateway.server import GC_ALLOCATIONS
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import make_recipe
from cocktail_serve.tenants.keys import DEFAULT_TENANT
from cocktail_serve.weighting.candidates import Candidate
from tests.fakes import make_fake_pool

POOL = "flan"
TENANT = DEFAULT_TENANT
"""Whose requests are that come without a key."""

EXPERTS = tuple(f"expert-{number}" for number in range(5))
REPETITIONS = 50
WARM_UP = 3
ROWS = 1000
"""Written at once."""


def make_settings(folder: Path) -> Settings:
    """One pool behind the fake engine; reports are off, so that nothing runs beside the calls."""
    engine = {"type": "fake", "max_model_len": 256}
    pool = {"id": POOL, "kind": "decoder", "base": str(folder / "models"), "engine": engine}
    store = {"url": f"sqlite:///{folder / 'registry.sqlite'}", "cache_dir": str(folder / "cache")}
    return Settings.model_validate({"store": store, "pools": [pool], "reports": False})


def request_of(settings: Settings, pool: Pool, name: str, seed: int) -> CocktailRequest:
    """A request by three examples."""
    examples = [{"input": f"is {word} a fruit?", "output": "yes"} for word in ("apple", "pear", str(seed))]
    return parse_request({"name": name, "pool": POOL, "examples": examples}, settings=settings, pools={POOL: pool})


def ready_cocktail(request: CocktailRequest, pool: Pool, tenant: str, number: int) -> Cocktail:
    """What the job of a request would have made of it, with losses of its own."""
    draw = random.Random(number)
    losses = {name: draw.uniform(0.5, 3.0) for name in pool.members}
    shares = {name: 1 / loss for name, loss in losses.items()}
    weights = {name: share / sum(shares.values()) for name, share in shares.items()}
    return Cocktail(
        uid=f"{number:032x}",
        tenant=tenant,
        name=request.options.name,
        pool_id=pool.id,
        kind=pool.kind,
        digest=request.digest,
        options=request.options,
        created_at=1.7e9 + number,
        used_at=1.7e9 + number,
        ready_at=1.7e9 + number + 1,
        sequence=number,
        change=number,
        status="ready",
        progress=1.0,
        losses=losses,
        merging_weights=weights,
        entropy=1.5,
        mixed_loss=min(losses.values()),
        recipe=make_recipe(pool, weights, dtype="float32"),
        candidates=(Candidate(weights, temperature=5.0, chosen=True),),
        cross_validation=CrossValidation("ready", "unsure", "Within chance.", min(losses.values()), EXPERTS[0], 1.0, 5),
    )


async def fill(settings: Settings, pool: Pool, *, num_cocktails: int, num_tenants: int) -> None:
    """Writes ready cocktails of tenants in turn: two versions of each name."""
    database = Database(settings.store.database_url)
    await database.open()
    await database.close()
    template = request_of(settings, pool, "films", 0)
    engine = create_engine(settings.store.database_url)
    with engine.begin() as connection:
        for start in range(0, num_cocktails, ROWS):
            rows = []
            for number in range(start, min(start + ROWS, num_cocktails)):
                tenant, turn = number % num_tenants, number // num_tenants
                options = replace(template.options, name=f"task-{turn // 2}", seed=number)
                request = replace(template, options=options)
                of_tenant = TENANT if tenant == 0 else f"tenant-{tenant}"
                rows.append(to_row(ready_cocktail(request, pool, of_tenant, number + 1)))
            connection.execute(insert(tables.cocktails), rows)
        connection.execute(update(tables.changes).values(last=num_cocktails))
    engine.dispose()


class Stretches:
    """The longest step of the event loop since it was last asked for: a callback, or a task up to where it waits."""

    def __init__(self) -> None:
        self._wall = self._cpu = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Times each step until the block ends."""
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            wall, cpu = time.perf_counter(), time.thread_time()
            run(handle)
            self._wall = max(self._wall, time.perf_counter() - wall)
            self._cpu = max(self._cpu, time.thread_time() - cpu)

        asyncio.Handle._run = timed  # type: ignore[method-assign]
        try:
            yield
        finally:
            asyncio.Handle._run = run  # type: ignore[method-assign]

    def taken(self) -> tuple[float, float]:
        """Seconds by the clock, and of the loop's thread on a core, which other programs lengthen less."""
        longest, self._wall, self._cpu = (self._wall, self._cpu), 0.0, 0.0
        return longest


async def asked(app: FastAPI, method: str, path: str, body: Any = None, *, query: str = "") -> Any:
    """Hands a request to the app, without a client whose work would count as the app's; the body of its answer.

    Raises:
        RuntimeError: another status than 2xx.
    """
    content = b"" if body is None else json.dumps(body).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    sent: list[Any] = []
    is_read = False

    async def receive() -> Any:
        nonlocal is_read
        if is_read:
            await asyncio.Event().wait()  # the client stays
        is_read = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    answer = b"".join(message.get("body", b"") for message in sent)
    if not 200 <= sent[0]["status"] < 300:
        raise RuntimeError(f"{method} {path} answered {sent[0]['status']}: {answer.decode()}")
    return answer


async def measured(call: Callable[[int], Awaitable[object]], stretches: Stretches) -> dict[str, float]:
    """Milliseconds of a call, and of the loop's longest step while it ran."""
    totals, longest, on_core = [], [], []
    for number in range(-WARM_UP, REPETITIONS):
        await asyncio.sleep(0.005)
        stretches.taken()
        started = time.perf_counter()
        await asyncio.create_task(_awaited(call(number)))
        total = time.perf_counter() - started
        if number >= 0:
            wall, cpu = stretches.taken()
            totals.append(total * 1000)
            longest.append(wall * 1000)
            on_core.append(cpu * 1000)
    return {
        "ms": round(statistics.median(totals), 3),
        "stretch_ms": round(statistics.median(longest), 3),
        "stretch_max_ms": round(max(longest), 3),
        "stretch_cpu_ms": round(statistics.median(on_core), 3),
        "stretch_cpu_max_ms": round(max(on_core), 3),
    }


async def _awaited(call: Awaitable[object]) -> None:
    await call


def timed(call: Callable[[], object], *, times: int = 200) -> dict[str, float]:
    """Milliseconds of a call that never yields."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append((time.perf_counter() - started) * 1000)
    return {"ms": round(statistics.median(taken), 5), "max_ms": round(max(taken), 5)}


async def measure_calls(app: FastAPI, stretches: Stretches) -> dict[str, dict[str, float]]:
    """Every call that reads or changes the registry, by a tenant that has its share of the cocktails."""
    gateway: Gateway = app.state.gateway
    service = gateway.service
    catalog = service.catalog
    model = catalog.list(TENANT)[0]
    assert model.recipe is not None
    digest, resolved = model.recipe.digest, model.id
    body = {"pool": POOL, "merging_weights": {"base": 0.5, EXPERTS[0]: 0.5}}

    async def create(number: int) -> None:
        await asked(app, "POST", "/v1/cocktails", {"name": f"made-{number + WARM_UP}", **body}, query="wait=30")

    async def delete(number: int) -> None:
        await asked(app, "DELETE", f"/v1/cocktails/made-{number + WARM_UP}")

    return {
        "GET /v1/models": await measured(lambda _: asked(app, "GET", "/v1/models"), stretches),
        "GET /v1/models/{id}": await measured(lambda _: asked(app, "GET", f"/v1/models/{resolved}"), stretches),
        "GET /v1/cocktails": await measured(lambda _: asked(app, "GET", "/v1/cocktails"), stretches),
        "GET /v1/cocktails/{id}": await measured(lambda _: asked(app, "GET", f"/v1/cocktails/{resolved}"), stretches),
        "GET /metrics": await measured(lambda _: asked(app, "GET", "/metrics"), stretches),
        "beat": await measured(lambda _: service._cluster_loop.beat(), stretches),
        "create, until ready": await measured(create, stretches),
        "delete": await measured(delete, stretches),
        "models()": timed(lambda: catalog.models(TENANT)),
        "list()": timed(lambda: catalog.list(TENANT)),
        "uses()": timed(lambda: catalog.uses(POOL, digest)),
        "uses(), of none": timed(lambda: catalog.uses(POOL, "0" * 64)),
        "statuses()": timed(catalog.statuses),
        "unfinished()": timed(catalog.unfinished),
        "resolve()": timed(lambda: catalog.resolve(TENANT, resolved), times=2000),
    }


async def measure(folder: Path, *, num_cocktails: int, num_tenants: int) -> dict[str, Any]:
    """Makes the store, starts the gateway over it, measures."""
    (folder / "empty").mkdir(exist_ok=True, parents=True)
    pool = make_fake_pool(folder / "models", EXPERTS, pool_id=POOL)
    settings, empty = make_settings(folder), make_settings(folder / "empty")
    if not (folder / "registry.sqlite").exists():
        await fill(settings, pool, num_cocktails=num_cocktails, num_tenants=num_tenants)
    stretches = Stretches()
    async with started(empty, pool):  # imports what a gateway needs
        pass
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    async with started(settings, pool) as (app, start):
        gc.collect()
        memory = process.memory_info().rss - before
        gc.freeze()  # as the server does, and
        gc.set_threshold(GC_ALLOCATIONS)
        await until_ready(app)
        with stretches.watched():
            calls = await measure_calls(app, stretches)
    return {
        **start,
        "memory_mib": round(memory / 2**20, 1),
        "calls": calls,
    }


@asynccontextmanager
async def started(settings: Settings, pool: Pool) -> AsyncIterator[tuple[FastAPI, dict[str, float]]]:
    """A gateway that runs until the block ends, and the seconds that its start took; its engine may not be ready."""
    app = create_app(settings, pools={POOL: pool})
    wall, cpu = time.perf_counter(), time.process_time()
    async with app.router.lifespan_context(app):
        spent = {"start_s": time.perf_counter() - wall, "start_cpu_s": time.process_time() - cpu}
        yield app, {name: round(seconds, 2) for name, seconds in spent.items()}


async def until_ready(app: FastAPI) -> None:
    """Waits for the fake engine."""
    while True:
        try:
            await asked(app, "GET", "/ready")
            return
        except RuntimeError:
            await asyncio.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cocktails", type=int, default=50_000)
    parser.add_argument("--tenants", type=int, default=5_000)
    parser.add_argument("--folder", type=Path, help="kept for the next run, which finds its registry there")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = arguments.folder or Path(name)
        measuring = measure(folder, num_cocktails=arguments.cocktails, num_tenants=arguments.tenants)
        result = asyncio.run(measuring)
    workload = {"cocktails": arguments.cocktails, "tenants": arguments.tenants}
    print(json.dumps({"machine": describe_machine(), "workload": workload, **result}, indent=2))


if __name__ == "__main__":
    main()
