"""One gateway for all tests that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateways import LiveGateway, live_gateway


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with live_gateway(tmp_path_factory.mktemp("gateway")) as live:
        yield live
