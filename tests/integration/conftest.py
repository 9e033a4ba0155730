"""One gateway for all tests that only ask it something, and where the fake server finds its faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateways import LiveGateway, live_gateway


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with live_gateway(tmp_path_factory.mktemp("gateway")) as live:
        yield live


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """The folder whose files tell the fake server what to do wrong."""
    folder = tmp_path / "faults"
    folder.mkdir()
    return folder
