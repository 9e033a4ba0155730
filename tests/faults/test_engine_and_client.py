"""Engines that are killed at work, a gateway that is killed while it streams, a client that stops reading."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cocktail_serve.engines.vllm.fake import fake_text
from tests.faults.cocktails import ask, check_answer, request, settled
from tests.gateway_process import GatewayProcess, gateway_process, until_gone

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

DRAIN_S = 0.5
STREAM: dict[str, Any] = {"model": "flan/nq", "prompt": "tell", "stream": True}


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[GatewayProcess]:
    """Each word, each scoring and each mix takes a while."""
    args = {"score-ms": 300, "mix-ms": 300, "token-delay-ms": 50}
    with gateway_process(tmp_path, args=args, engine={"drain_s": DRAIN_S}) as gateway:
        gateway.start()
        yield gateway


def engine_of(gateway: GatewayProcess) -> psutil.Process:
    (engine,) = [process for process in gateway.below() if "--token-delay-ms" in process.cmdline()]
    return engine


def is_at_work(gateway: GatewayProcess, status: str) -> bool:
    """Whether the engine itself is at what the job's status says, which the job is from before it asks the engine."""
    if gateway.http.get("/v1/cocktails/fruit-1").json()["status"] != status:
        return False
    engine = gateway.engine()
    if status == "mixing":
        return bool(engine["phase"] == "mixing")
    return engine["phase"] == "open" and engine["in_flight"] > 0


@pytest.mark.parametrize("status", ["scoring", "mixing"])
def test_an_engine_killed_at_a_jobs_work(slow: GatewayProcess, status: str) -> None:
    kept = slow.http.post("/v1/cocktails?wait=60", json=request(0)).json()
    assert ask(slow, 1)
    slow.until(lambda: is_at_work(slow, status), f"an engine at {status}")
    engine_of(slow).kill()
    cocktail = settled(slow, 1)
    assert cocktail["status"] == "ready", cocktail["error"]
    for each in (cocktail, kept):
        slow.until(lambda: slow.http.get("/ready").status_code == 200, "a ready engine")
        check_answer(slow, each)


def test_an_engine_killed_while_it_streams(slow: GatewayProcess) -> None:
    kept = slow.http.post("/v1/cocktails?wait=60", json=request(0)).json()
    with slow.http.stream("POST", "/v1/completions", json=STREAM | {"max_tokens": 400}) as response:
        lines = (line for line in response.iter_lines() if line)
        seen = [next(lines) for _ in range(5)]
        engine_of(slow).kill()
        *more, last = lines
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in [*seen, *more]]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
    digest = recipe_of_expert(slow)
    assert "".join(texts) == fake_text(digest, "tell", num_tokens=len(texts)), "what came was its own"
    slow.until(lambda: slow.http.get("/ready").status_code == 200, "a ready engine")
    check_answer(slow, kept)


def test_a_gateway_killed_while_it_streams(slow: GatewayProcess) -> None:
    kept = slow.http.post("/v1/cocktails?wait=60", json=request(0)).json()
    below = slow.below()
    with slow.http.stream("POST", "/v1/completions", json=STREAM | {"max_tokens": 400}) as response:
        lines = (line for line in response.iter_lines() if line)
        for _ in range(5):
            assert "[DONE]" not in next(lines)
        slow.kill()
        with pytest.raises(httpx.TransportError):
            list(lines)
    assert until_gone(below) == []
    slow.start()
    check_answer(slow, kept)


@contextmanager
def unread_stream(gateway: GatewayProcess, **options: Any) -> Iterator[None]:
    """A client that asks for a long stream, reads its first bytes and then no more."""
    body = json.dumps(STREAM | options).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(head + body)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        yield


def test_a_client_that_stops_reading_takes_little_memory(tmp_path: Path) -> None:
    """Its answer comes as fast as the engine can, and fills every buffer on the way; the engine has to wait then."""
    with gateway_process(tmp_path, engine={"max_model_len": 10_000_000}) as gateway:
        gateway.start()
        gateway.http.post("/v1/completions", json=STREAM | {"stream": False, "max_tokens": 1}).raise_for_status()
        process = psutil.Process(gateway.pid)
        before = peak = process.memory_info().rss
        with unread_stream(gateway, max_tokens=2_000_000):  # 300 MB of events
            until = time.monotonic() + 5.0
            while time.monotonic() < until:
                peak = max(peak, process.memory_info().rss)
                time.sleep(0.05)
        assert peak - before < 64 * 2**20, f"{(peak - before) / 2**20:.0f} MiB"


def test_a_client_that_stops_reading_holds_up_nobody(tmp_path: Path) -> None:
    args = {"token-delay-ms": 0.001}
    engine = {"drain_s": DRAIN_S, "max_model_len": 10_000_000}
    with gateway_process(tmp_path, args=args, engine=engine) as gateway:
        gateway.start()
        with unread_stream(gateway, max_tokens=2_000_000, n=20):
            time.sleep(5.0)
            asked = time.monotonic()
            other = gateway.http.post("/v1/completions", json={"model": "flan", "prompt": "a", "max_tokens": 3})
            assert other.status_code == 200, other.text
            assert time.monotonic() - asked < DRAIN_S + 5.0
            assert other.json()["choices"][0]["text"] == fake_text(recipe_of_base(gateway), "a", num_tokens=3)


def recipe_of_expert(gateway: GatewayProcess) -> str:
    return _digest_of(gateway, {"nq": 1.0})


def recipe_of_base(gateway: GatewayProcess) -> str:
    return _digest_of(gateway, {"base": 1.0})


def _digest_of(gateway: GatewayProcess, weights: dict[str, float]) -> str:
    """Of the recipe that is one model alone."""
    body = {"name": "alone", "pool": "flan", "merging_weights": weights}
    made = gateway.http.post("/v1/cocktails?wait=60", json=body)
    assert made.status_code in (200, 201), made.text
    digest: str = made.json()["recipe"]["digest"]
    return digest
