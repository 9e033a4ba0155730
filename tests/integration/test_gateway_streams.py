"""Streams that break, clients that leave, engines that die, servers that stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from cocktail_serve.config import ServerConfig
from cocktail_serve.errors import ConfigError
from cocktail_serve.gateway.server import bind
from tests.gateways import LiveGateway, eventually, live_gateway
from tests.models import make_decoder_pool

DEADLINE_S = 30.0
SLOW_MS = 150
"""Between two words of the slow engine: an answer of 200 of them lasts as long as `DEADLINE_S`."""

BEFORE_ITS_END_S = DEADLINE_S / 2
"""What ended by then was ended."""

BODY: dict[str, Any] = {"model": "flan/nq", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("slow")
    args = {"faults": str(folder / "faults"), "token-delay-ms": SLOW_MS}
    with live_gateway(folder, engine={"args": args, "drain_s": 0.2}) as live:
        yield live


@pytest.fixture(scope="module")
def http(slow: LiveGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=slow.url, timeout=DEADLINE_S) as client:
        yield client


def counted(http: httpx.Client, status: int, *, route: str = "/v1/chat/completions") -> float:
    """How many answers of the decoder pool ended so."""
    sample = f'cocktail_requests_total{{pool="flan",route="{route}",status="{status}"}} '
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(sample)) for line in lines if line.startswith(sample))


def num_in_flight(http: httpx.Client) -> int:
    number: int = http.get("/ready").json()["pools"]["flan"]["detail"].get("in_flight", -1)
    return number


def is_ready(http: httpx.Client) -> bool:
    return http.get("/ready").status_code == 200


def events_of(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


@pytest.mark.parametrize("fault", ["stream_error", "stream_cut"])
def test_a_broken_stream_ends_in_an_error(slow: LiveGateway, http: httpx.Client, fault: str) -> None:
    (slow.faults / fault).touch()
    failed, whole = counted(http, 502), counted(http, 200)
    with http.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True, "max_tokens": 6}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events_of(response)
    assert len(chunks) == 3
    assert json.loads(last)["error"]["code"] == "engine_error"
    assert set(json.loads(last)["error"]) == {"message", "type", "param", "code"}
    eventually(lambda: counted(http, 502) == failed + 1, "its count under the error's status")
    assert counted(http, 200) == whole, "an answer is counted once"


def test_the_official_client_raises_on_it(slow: LiveGateway) -> None:
    (slow.faults / "stream_cut").touch()
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(**BODY | {"stream": True, "max_tokens": 6})
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.code == "engine_error"


def test_a_client_that_leaves_ends_its_stream_in_the_engine(http: httpx.Client) -> None:
    eventually(lambda: num_in_flight(http) == 0, "an idle engine")
    left, whole = counted(http, 499), counted(http, 200)
    with httpx.stream("POST", http.base_url.join("/v1/chat/completions"), json=BODY | {"stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert num_in_flight(http) == 1
    eventually(lambda: num_in_flight(http) == 0, "the end of the request inside the engine", within_s=BEFORE_ITS_END_S)
    eventually(lambda: counted(http, 499) == left + 1, "the count of a client that left", within_s=BEFORE_ITS_END_S)
    assert counted(http, 200) == whole
    # the turn is free too: nobody has to be drained for another recipe's sake
    answer = http.post("/v1/chat/completions", json=BODY | {"model": "flan/ag-news", "max_tokens": 1})
    assert answer.status_code == 200
    assert 'cocktail_drained_total{pool="flan",replica="0"} 0.0' in http.get("/metrics").text


def test_a_client_that_leaves_shows_in_the_metrics(http: httpx.Client) -> None:
    def num_gone() -> bool:
        return 'route="/v1/chat/completions",status="499"' in http.get("/metrics").text

    with httpx.Client(base_url=http.base_url) as leaving, pytest.raises(httpx.ReadTimeout):
        leaving.post("/v1/chat/completions", json=BODY | {"max_tokens": 20}, timeout=1.0)
    eventually(num_gone, "the count of a client that left", within_s=BEFORE_ITS_END_S)


def test_an_engine_that_dies_is_502_then_comes_back(slow: LiveGateway, http: httpx.Client) -> None:
    (slow.faults / "die").touch()
    response = http.post("/v1/chat/completions", json=BODY | {"max_tokens": 2})
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "engine_error"
    eventually(lambda: is_ready(http), "the engine's return")
    assert http.post("/v1/chat/completions", json=BODY | {"max_tokens": 2}).status_code == 200


def test_an_engine_that_dies_turns_ready_red(slow: LiveGateway, http: httpx.Client) -> None:
    with http.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        engine = next(
            child for child in psutil.Process().children(recursive=True) if "--token-delay-ms" in child.cmdline()
        )
        engine.kill()
        *_, last = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
    not_ready = http.get("/ready")
    assert not_ready.status_code == 503
    assert not_ready.json()["status"] == "not_ready"
    assert not_ready.json()["pools"]["flan"]["state"] != "ready"
    assert not_ready.json()["pools"]["bge"]["state"] == "ready"
    assert http.get("/health").status_code == 200
    eventually(lambda: is_ready(http), "the engine's return")


def test_a_hung_engine_is_not_ready_within_the_deadline(tmp_path: Path) -> None:
    with live_gateway(tmp_path, server={"ready_deadline_s": 0.5}) as live:
        (live.faults / "hang").touch()
        started = time.monotonic()
        assert httpx.get(f"{live.url}/ready", timeout=DEADLINE_S).status_code == 503
        assert time.monotonic() - started < 5
        assert httpx.get(f"{live.url}/health").status_code == 200


def test_a_job_that_fails_while_its_caller_waits_answers_its_error(slow: LiveGateway, http: httpx.Client) -> None:
    (slow.faults / "mix_invalid").touch()
    body = {"name": "unmixable", "pool": "flan", "merging_weights": {"base": 0.25, "nq": 0.75}}
    failed = http.post("/v1/cocktails", params={"wait": 20}, json=body)
    assert failed.status_code == 400
    assert failed.json()["error"]["code"] == "invalid_mix"
    kept = http.get("/v1/cocktails/unmixable").json()
    assert kept["status"] == "failed"
    assert kept["error"] == failed.json()["error"]
    assert kept["current"] is False
    assert http.get(f"/v1/cocktails/{kept['id']}/report").json()["status"] == "failed"
    gone = http.post("/v1/chat/completions", json=BODY | {"model": "unmixable"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    again = http.post("/v1/cocktails", params={"wait": 20}, json=body)
    assert (again.status_code, again.json()["id"]) == (201, kept["id"])


def test_a_stream_that_outlives_the_server_is_told(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        args = {"token-delay-ms": SLOW_MS}
        with live_gateway(tmp_path, engine={"args": args}) as live:
            url = f"{live.url}/v1/chat/completions"
            body = BODY | {"stream": True}
            response = stack.enter_context(httpx.stream("POST", url, json=body, timeout=DEADLINE_S))
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
        *_, last = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "model_not_ready"


class TestServe:
    @pytest.fixture
    def config(self, tmp_path: Path) -> Path:
        models = make_decoder_pool(tmp_path / "models", ("nq",))
        engine = {"type": "fake", "max_model_len": 256, "args": {"token-delay-ms": 100}}
        pool = {
            "id": "flan",
            "kind": "decoder",
            "base": str(models["base"]),
            "experts": {"nq": str(models["nq"])},
            "engine": engine,
        }
        path = tmp_path / "config.yaml"
        store = {"cache_dir": str(tmp_path / "cache")}
        path.write_text(yaml.safe_dump({"server": {"port": 0}, "store": store, "pools": [pool]}))
        return path

    def test_open_streams_finish_and_nothing_stays(self, config: Path) -> None:
        script = (
            "import sys\n"
            "from cocktail_serve.config import load_settings\n"
            "from cocktail_serve.gateway.server import serve\n"
            "serve(load_settings(sys.argv[1]), on_listening=lambda url: print(url, flush=True))"
        )
        command = [sys.executable, "-c", script, str(config)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), process.stderr.read() if process.stderr else ""
            with httpx.Client(base_url=url, timeout=DEADLINE_S) as http:
                eventually(lambda: is_ready(http), "a ready engine")
                children = psutil.Process(process.pid).children(recursive=True)
                assert children
                with http.stream(
                    "POST", "/v1/chat/completions", json=BODY | {"stream": True, "max_tokens": 20}
                ) as response:
                    lines = response.iter_lines()
                    next(lines)
                    process.send_signal(signal.SIGTERM)
                    rest = [line for line in lines if line]
            assert len(rest) == 20
            assert rest[-1] == "data: [DONE]"
            assert process.wait(DEADLINE_S) in (0, -signal.SIGTERM)
            eventually(lambda: not any(child.is_running() for child in children), "the end of the engine")
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def test_a_port_in_use(self) -> None:
        with bind(ServerConfig(port=0)) as listener:
            port = listener.getsockname()[1]
            with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: the port is in use") as caught:
                bind(ServerConfig(port=port))
        assert caught.value.param == "server.port"

    def test_addresses_of_others(self) -> None:
        with pytest.raises(ConfigError, match="none of this machine's"):
            bind(ServerConfig(host="192.0.2.1", port=0))
        with pytest.raises(ConfigError, match="cannot resolve"):
            bind(ServerConfig(host="no such host", port=0))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may use any port")
    def test_privileged_ports(self) -> None:
        with pytest.raises(ConfigError, match="1024"):
            bind(ServerConfig(port=1))

    def test_a_free_port(self) -> None:
        with bind(ServerConfig(port=0)) as listener, socket.create_connection(listener.getsockname()[:2]):
            assert listener.getsockname()[1] > 0
