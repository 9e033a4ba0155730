"""Unit tests run in this process alone: what needs another one, a server or a database lies in tests/integration."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cocktail_serve.checkpoints import mapping
from cocktail_serve.database.database import Database
from cocktail_serve.merging import native
from tests.no_process import no_process
from vllm_cocktail.unmerged import native_kernel

UNIT = Path(__file__).parent
REFUSED = pytest.StashKey[list[str]]()


def pytest_collection_finish() -> None:
    """What is written in C is compiled once a machine, and matplotlib asks once for its fonts, both by the first one
    that needs it: no test is to be that one."""
    native.load_kernel()
    mapping._library()
    native_kernel.load_native()
    importlib.import_module("matplotlib.font_manager")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Around the fixtures of whole sessions too, which no fixture could watch.

    Called for the tests of other folders as well.
    """
    if not item.path.is_relative_to(UNIT):
        return (yield)
    with no_process() as item.stash[REFUSED]:
        return (yield)


@pytest.fixture(autouse=True)
def refused(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The processes that the test wanted to start: it fails even where the code under test made nothing of it."""
    starts = request.node.stash[REFUSED]
    yield starts
    assert starts == [], "a unit test starts no process: move it to tests/integration"


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry's file with its tables and no row. To be copied: making the tables takes longer than most commands."""
    path = tmp_path_factory.mktemp("registry") / "registry.sqlite"

    async def make() -> None:
        database = Database(f"sqlite:///{path}")
        await database.open()
        await database.close()

    asyncio.run(make())
    assert [other.name for other in path.parent.iterdir() if other.stat().st_size] == [path.name]
    return path
