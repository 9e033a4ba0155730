"""What is started once for all tests that only ask it something: the whole product, a PostgreSQL server."""

from __future__ import annotations

import atexit
import contextlib
import gc
import signal
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.server import RunningServer, running_server
from cocktail_serve.database.database import Database
from tests.models import make_encoder_pool, pool_section
from tests.postgres import Postgres, find_binaries, running_postgres
from tests.zoo.families import Zoo
from tests.zoo.other_release import NoOtherReleaseError, running_other_release

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell has what runs in the background ignore interrupts, and so would all that tests start and interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Stack:
    """A gateway with two decoder pools in real vLLM and an encoder pool in real sentence-transformers.

    Attributes:
        decoders: folders by pool id (`tied`, `untied`) and model name (`base`, `north`, `east`, `south`).
        encoders: folders of the pool `mini` by model name (`base`, `faq`, `code`).
        model_ids: of the ready cocktails and plain models, by (decoder pool, mixture).
    """

    server: RunningServer
    decoders: Mapping[str, Mapping[str, Path]]
    encoders: Mapping[str, Path]
    model_ids: Mapping[tuple[str, str], str]

    @property
    def base_url(self) -> str:
        return f"{self.server.url}/v1"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    from bench import invariant  # and with it the clients of OpenAI

    folder = tmp_path_factory.mktemp("stack")
    decoders = invariant.make_pools(folder)
    encoders = make_encoder_pool(folder / "mini", ("faq", "code"))
    mini = pool_section("mini", "encoder", encoders, {"type": "sentence_transformers", "dtype": "float32"})
    config = invariant.write_config(folder, decoders, slice_s=0.3, more_pools=[mini])
    with running_server(config, log=folder / "server.log") as server:
        model_ids = invariant.create_cocktails(server, decoders)
        yield Stack(server, decoders, encoders, model_ids)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    binaries = find_binaries()
    if binaries is None:
        pytest.skip(
            "no PostgreSQL here: neither initdb on the path nor /usr/lib/postgresql; apt-get install postgresql"
        )
    with running_postgres(binaries) as server:
        yield server


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    root = tmp_path_factory.mktemp("zoo")
    with contextlib.ExitStack() as stack:
        try:
            yield Zoo(root, stack.enter_context(running_other_release()))
        except NoOtherReleaseError as error:
            yield Zoo(root, None, str(error))


@pytest.fixture(params=["sqlite", "postgresql"])
async def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """URL of an empty database of its own: the same test on each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'deep' / 'registry.sqlite'}"
        return
    import asyncpg

    server: Postgres = request.getfixturevalue("postgres")
    name = f"t{uuid.uuid4().hex}"
    admin = await asyncpg.connect(host=str(server.folder), user=server.user, database="postgres")
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        yield server.url(name)
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The database of `database_url`, open."""
    database = Database(database_url)
    await database.open()
    yield database
    await database.close()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected, a million objects and more, lives to the end: no collection of garbage need look
    at it again, of which each would take a second, those that pytest makes at its end as well."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        # libraries written in C count what is left of theirs at the interpreter's end, and would complain
        atexit.register(gc.unfreeze)
        gc.enable()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Where several workers share the tests (`-n`), one of them runs all that need the stack, or the zoo, and all of a
    file: what they share is started once."""
    if item.config.pluginmanager.hasplugin("xdist"):
        shared = {"stack", "zoo"}.intersection(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group(*shared or [item.path.stem]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever needs the stack comes last: two idle engines beside the other tests would take their memory and cores."""
    items.sort(key=lambda item: "stack" in getattr(item, "fixturenames", ()))
