"""Two gateway processes on one store, each with an engine of its own: one is killed, or stands still, at work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cocktails import ask, check_answer, lasting, request, settled
from tests.gateway_process import GatewayProcess, gateway_process, until_gone
from tests.postgres import Postgres

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

LEASE_S = 2.0


@pytest.fixture(params=["sqlite", "postgresql"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[GatewayProcess, GatewayProcess]]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'registry.sqlite'}"
    else:
        server: Postgres = request.getfixturevalue("own_postgres")
        url = server.url("postgres")
    options = {"store": {"url": url, "lease_s": LEASE_S, "poll_s": 0.1}, "args": {"score-ms": 400}}
    with gateway_process(tmp_path / "one", **options) as one, gateway_process(tmp_path / "other", **options) as other:
        one.start()
        other.start()
        yield one, other


def until_scoring(gateway: GatewayProcess, number: int) -> None:
    path = f"/v1/cocktails/fruit-{number}"
    gateway.until(lambda: gateway.http.get(path).json()["status"] == "scoring", "scoring")


def test_both_serve_what_either_made(pair: tuple[GatewayProcess, GatewayProcess]) -> None:
    one, other = pair
    for number, (maker, server) in enumerate([(one, other), (other, one)]):
        made = maker.http.post("/v1/cocktails?wait=30", json=request(number))
        assert made.status_code == 201, made.text
        # at once: no time to poll in between
        assert server.http.get(f"/v1/models/{made.json()['id']}").status_code == 200
        check_answer(server, made.json())
        assert server.http.post("/v1/cocktails", json=request(number)).status_code == 200
        assert maker.http.delete(f"/v1/cocktails/fruit-{number}").status_code == 200
        assert server.http.get(f"/v1/cocktails/fruit-{number}").status_code == 404


def test_a_job_whose_gateway_is_killed_is_finished_by_the_other(pair: tuple[GatewayProcess, GatewayProcess]) -> None:
    one, other = pair
    reference = other.http.post("/v1/cocktails?wait=30", json=request(1) | {"name": "same"}).json()
    assert ask(one, 1)
    until_scoring(one, 1)
    below = one.below()
    waiting_since = time.monotonic()
    one.kill()
    cocktail = settled(other, 1)
    assert time.monotonic() - waiting_since > LEASE_S / 2, "not before its lease was over"
    assert cocktail["status"] == "ready"
    assert lasting(cocktail)["merging_weights"] == reference["merging_weights"]
    check_answer(other, cocktail)
    assert until_gone(below) == []
    one.start()
    assert lasting(settled(one, 1)) == lasting(cocktail)
    check_answer(one, cocktail)


def test_a_gateway_that_stood_still_cannot_overwrite(pair: tuple[GatewayProcess, GatewayProcess]) -> None:
    one, other = pair
    assert ask(one, 1)
    until_scoring(one, 1)
    os.kill(one.pid, signal.SIGSTOP)
    try:
        cocktail = settled(other, 1)
        assert cocktail["status"] == "ready"
        assert other.http.delete("/v1/cocktails/fruit-1").status_code == 200
        assert ask(other, 2)
        second = settled(other, 2)
    finally:
        os.kill(one.pid, signal.SIGCONT)
    # it wakes in the middle of the job that was taken from it, and of a cocktail that is gone
    one.until(lambda: one.http.get("/v1/cocktails/fruit-2").status_code == 200, "the news")
    time.sleep(2.0)
    for gateway in pair:
        assert gateway.http.get("/v1/cocktails/fruit-1").status_code == 404
        assert [found["id"] for found in gateway.http.get("/v1/cocktails").json()["data"]] == [second["id"]]
        check_answer(gateway, second)
    # and it is a full member again
    assert ask(one, 3)
    check_answer(other, settled(other, 3))


def test_a_gateway_that_ends_hands_its_jobs_over_at_once(pair: tuple[GatewayProcess, GatewayProcess]) -> None:
    one, other = pair
    assert ask(one, 1)
    until_scoring(one, 1)
    one.kill(signal.SIGTERM)
    cocktail = settled(other, 1)
    assert cocktail["status"] == "ready"
    check_answer(other, cocktail)
