"""SIGKILL of the gateway at every step of a job: after a restart it is finished, once, and nothing is left behind."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import pytest

from tests.faults.cocktails import ask, check_answer, lasting, request, settled
from tests.gateway_process import GatewayProcess, Strike, gateway_process, until_gone

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

NUM_RANDOM = 6


def left_behind(gateway: GatewayProcess) -> list[Path]:
    """Temporary files in the cache, and folders of sockets that belong to no engine that runs."""
    in_cache = [path for path in gateway.cache_dir.rglob("*") if path.name.endswith(".tmp")]
    links = [path for path in (gateway.cache_dir / "engines").iterdir() if path.is_symlink()]
    assert len(links) == 1, "one engine, one folder for its socket"
    return in_cache


class Reference:
    """Cocktails as a gateway that nobody kills makes them."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._gateway = gateway

    def of(self, number: int) -> dict[str, Any]:
        made = self._gateway.http.post("/v1/cocktails?wait=60", json=request(number))
        assert made.status_code in (200, 201), made.text
        return lasting(made.json())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    with gateway_process(tmp_path_factory.mktemp("undisturbed")) as gateway:
        gateway.start()
        yield Reference(gateway)


def check_after_restart(gateway: GatewayProcess, reference: Reference, number: int, *, acknowledged: bool) -> None:
    """What was acknowledged is there and gets finished; what was not is there as a whole, or not at all."""
    name = f"fruit-{number}"
    if not acknowledged and gateway.http.get(f"/v1/cocktails/{name}").status_code == 404:
        assert ask(gateway, number)
    cocktail = settled(gateway, number)
    assert lasting(cocktail) == reference.of(number)
    check_answer(gateway, cocktail)
    assert len(gateway.http.get("/v1/cocktails", params={"name": name}).json()["data"]) == 1
    assert left_behind(gateway) == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["commit", "engine"])
def test_killed_at_every_step(
    tmp_path: Path, reference: Reference, at: Literal["commit", "engine"], when: Literal["before", "after"]
) -> None:
    """One life for each step: it finishes what the last one was killed at, then begins a job and is killed itself."""
    with gateway_process(tmp_path, store={"lease_s": 600}) as gateway:
        below: list[psutil.Process] = []
        acknowledged = True
        for number in range(1, 40):
            gateway.start(strike=Strike(at, number, when))
            assert until_gone(below) == [], "no engine outlives its gateway"
            below = gateway.below()
            assert below, "an engine"
            if number > 1:
                check_after_restart(gateway, reference, number - 1, acknowledged=acknowledged)
            gateway.arm()
            acknowledged = ask(gateway, number)
            if acknowledged and ends_alive(gateway, number):
                assert number > (8 if at == "commit" else 5), f"a job has more steps than {number}"
                return
            gateway.join()
    pytest.fail("the job never came to its end")


def ends_alive(gateway: GatewayProcess, number: int) -> bool:
    """Whether the job is finished by the life that began it; False: that was killed."""
    deadline = time.monotonic() + 60
    while gateway.is_alive:
        assert time.monotonic() < deadline, gateway.log()
        try:
            if gateway.http.get(f"/v1/cocktails/fruit-{number}").json()["status"] == "ready":
                return True
        except httpx.TransportError:
            time.sleep(0.02)
    return False


def test_killed_at_random_moments(tmp_path: Path, reference: Reference) -> None:
    """With an engine slow enough that most of the moments lie within its work."""
    moments = random.Random(20261124)
    with gateway_process(tmp_path, args={"score-ms": 150, "mix-ms": 150}, store={"lease_s": 600}) as gateway:
        asked: dict[int, bool] = {}
        for number in range(1, NUM_RANDOM + 1):
            gateway.start()
            below = gateway.below()
            asked[number] = ask(gateway, number)
            time.sleep(moments.uniform(0.0, 1.5))
            gateway.kill()
            assert until_gone(below) == []
        gateway.start()
        for number, acknowledged in asked.items():
            check_after_restart(gateway, reference, number, acknowledged=acknowledged)


def test_sockets_of_dead_engines_are_swept(tmp_path: Path) -> None:
    with gateway_process(tmp_path) as gateway:
        gateway.start()
        (link,) = [path for path in (gateway.cache_dir / "engines").iterdir() if path.is_symlink()]
        folder = link.resolve()
        assert folder.parent == Path(tempfile.gettempdir())
        gateway.kill()
        assert folder.exists(), "a killed process cleans nothing"
        gateway.start()
        assert not folder.exists()
