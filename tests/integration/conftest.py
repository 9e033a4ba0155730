"""One gateway for all tests that only ask it something, and where the fake server finds its faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.gateways import LiveGateway, live_gateway


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with live_gateway(tmp_path_factory.mktemp("gateway")) as live:
        yield live


@pytest.fixture(scope="module")
def http(gateway: LiveGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=60) as client:
        yield client


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """The folder whose files tell the fake server what to do wrong."""
    folder = tmp_path / "faults"
    folder.mkdir()
    return folder
