"""A store that is gone for ten seconds, and one whose disk is full: known models are served on, nothing is lost."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cocktails import ask, check_answer, lasting, request, settled
from tests.gateway_process import GatewayProcess, gateway_process
from tests.postgres import Postgres

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

GONE_S = 10.0


@pytest.fixture
def on_postgres(own_postgres: Postgres, tmp_path: Path) -> Iterator[GatewayProcess]:
    store = {"url": own_postgres.url("postgres"), "lease_s": 3}
    with gateway_process(tmp_path, store=store, args={"score-ms": 300}) as gateway:
        gateway.start()
        yield gateway


def test_a_store_that_is_gone_for_ten_seconds(on_postgres: GatewayProcess, own_postgres: Postgres) -> None:
    gateway = on_postgres
    kept = gateway.http.post("/v1/cocktails?wait=60", json=request(0)).json()
    check_answer(gateway, kept)
    assert ask(gateway, 1)
    gateway.until(lambda: gateway.http.get("/v1/cocktails/fruit-1").json()["status"] == "scoring", "scoring")
    own_postgres.stop()
    back_at = time.monotonic() + GONE_S
    while time.monotonic() < back_at:
        check_answer(gateway, kept)
        refused = gateway.http.post("/v1/cocktails", json=request(2))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_error"), refused.text
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert "x-should-retry" not in refused.headers
        shown = gateway.http.get("/v1/cocktails/fruit-1")
        assert (shown.status_code, shown.json()["status"]) == (200, "scoring"), "no state that is not in the store"
        assert gateway.http.get("/v1/cocktails/fruit-0").json() == kept
        time.sleep(0.5)
    own_postgres.start()
    cocktail = settled(gateway, 1)
    assert cocktail["status"] == "ready", cocktail["error"]
    check_answer(gateway, cocktail)
    assert gateway.http.get("/v1/cocktails/fruit-2").status_code == 404, "what was refused is not there"
    assert ask(gateway, 2)
    check_answer(gateway, settled(gateway, 2))
    gateway.kill()
    gateway.start()
    assert lasting(settled(gateway, 0)) == lasting(kept)
    assert lasting(settled(gateway, 1)) == lasting(cocktail)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """No file of the process may grow beyond what the store has now, which the kernel tells it as a disk does."""
    with gateway_process(tmp_path, args={"score-ms": 300}, store={"lease_s": 600}) as gateway:
        gateway.start()
        kept = gateway.http.post("/v1/cocktails?wait=60", json=request(0)).json()
        assert ask(gateway, 1)
        gateway.until(lambda: gateway.http.get("/v1/cocktails/fruit-1").json()["status"] == "scoring", "scoring")
        unlimited = resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        for number in (2, 3):
            refused = gateway.http.post("/v1/cocktails", json=request(number))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_error"), refused.text
            check_answer(gateway, kept)
        time.sleep(2.0)
        assert gateway.http.get("/v1/cocktails/fruit-1").json()["status"] == "scoring"
        resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, unlimited)
        cocktail = settled(gateway, 1)
        assert cocktail["status"] == "ready", cocktail["error"]
        for number in (2, 3):
            assert gateway.http.get(f"/v1/cocktails/fruit-{number}").status_code == 404
        assert ask(gateway, 2)
        second = settled(gateway, 2)
        gateway.kill()
        gateway.start()
        for number, made in ((0, kept), (1, cocktail), (2, second)):
            assert lasting(settled(gateway, number)) == lasting(made)
            check_answer(gateway, made)
