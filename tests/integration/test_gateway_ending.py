"""A server that is told to end, and what it wrote down by then: a real process, signals and all."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.models import make_decoder_pool, make_encoder_pool, pool_section

ADMIN_KEY = "admin-key-s3cret-0001"
MARK = "s3cret"
DEADLINE_S = 60.0
TOKEN_MS = 50
GRACE_S = 3.0

SCRIPT = (
    "import sys\n"
    "from cocktail_serve.config import load_settings\n"
    "from cocktail_serve.gateway.server import serve\n"
    "serve(load_settings(sys.argv[1]), on_listening=lambda url: print(url, flush=True))"
)


class Served:
    """A `serve` process.

    Attributes:
        http: a client with the admin key.
        log: what the process wrote to stderr.
    """

    def __init__(self, process: subprocess.Popen[bytes], http: httpx.Client, log: Path) -> None:
        self.process = process
        self.http = http
        self.log = log

    def chat(self, **fields: Any) -> dict[str, Any]:
        return {"model": "flan/nq", "messages": [{"role": "user", "content": "hi"}], **fields}


@contextmanager
def served(folder: Path, *, engine: dict[str, Any], encoders: bool = False, **server: Any) -> Iterator[Served]:
    """A server of a decoder pool on the fake engine.

    Args:
        encoders: a pool of encoders too, whose libraries take most of a start.
    """
    models = folder / "models"
    if not models.exists():
        make_decoder_pool(models, ("nq",))
    pools = [
        {
            "id": "flan",
            "kind": "decoder",
            "base": str(models / "base"),
            "experts": {"nq": str(models / "nq")},
            "engine": {"type": "fake", "max_model_len": 2048, "slice_s": 0.05, "args": engine},
        }
    ]
    if encoders:
        of_pool = make_encoder_pool(folder / "encoders", ("quora",))
        pools.append(pool_section("bge", "encoder", of_pool, {"type": "sentence_transformers"}))
    config = folder / "config.yaml"
    section = {"port": 0, "auth": "required", "shutdown_grace_s": GRACE_S, "log_format": "json", **server}
    config.write_text(yaml.safe_dump({"server": section, "store": {"cache_dir": "cache"}, "pools": pools}))
    log = folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(config)],
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, "COCKTAIL_ADMIN_KEY": ADMIN_KEY},
        )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        assert url.startswith("http://"), log.read_text()
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        with httpx.Client(base_url=url, timeout=DEADLINE_S, headers=headers) as http:
            until(lambda: http.get("/ready").status_code == 200)
            yield Served(process, http, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


class Stream(threading.Thread):
    """A client that reads an answer to its end."""

    def __init__(self, http: httpx.Client, body: dict[str, Any]) -> None:
        super().__init__()
        self._http = http
        self._body = body
        self.lines: list[str] = []
        self.has_begun = threading.Event()
        self.start()
        assert self.has_begun.wait(DEADLINE_S)

    def run(self) -> None:
        with self._http.stream("POST", "/v1/chat/completions", json=self._body | {"stream": True}) as response:
            for line in filter(None, response.iter_lines()):
                self.lines.append(line)
                self.has_begun.set()


def test_told_to_end_it_finishes_what_it_can_and_begins_nothing(tmp_path: Path) -> None:
    engine = {"token-delay-ms": TOKEN_MS, "score-ms": 2000}
    with served(tmp_path, engine=engine, encoders=True) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children
        examples = [{"input": "is it a fruit?", "output": "yes"}]
        short = Stream(server.http, server.chat(max_tokens=int(GRACE_S * 1000 / TOKEN_MS / 2)))
        long = Stream(server.http, server.chat(max_tokens=1000))
        job = server.http.post("/v1/cocktails", json={"name": "unfinished", "pool": "flan", "examples": examples})
        assert job.status_code == 202
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.http.get("/ready").status_code == 503)
        assert time.monotonic() - told < 1.0
        assert server.http.get("/ready").json()["status"] == "stopping"
        assert server.http.get("/health").status_code == 200
        for path, body in (
            ("/v1/chat/completions", server.chat()),
            ("/v1/cocktails", {"name": "late", "pool": "flan", "examples": examples}),
            ("/v1/embeddings", {"model": "bge", "input": "a"}),
        ):
            refused = server.http.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_ready")
            assert 1 <= int(refused.headers["retry-after"]) <= 120
        short.join(DEADLINE_S)
        long.join(DEADLINE_S)
        assert short.lines[-1] == "data: [DONE]"
        assert json.loads(long.lines[-1].removeprefix("data: "))["error"]["code"] == "model_not_ready"
        assert server.process.wait(DEADLINE_S) in (0, -signal.SIGTERM)
        assert GRACE_S <= time.monotonic() - told < GRACE_S + 20
        until(lambda: not any(child.is_running() for child in children))
    with served(tmp_path, engine={}) as server:
        until(lambda: server.http.get("/v1/cocktails/unfinished").json()["status"] == "ready")
        assert server.http.get("/v1/cocktails/late").status_code == 404


def test_with_nothing_open_it_ends_at_once_and_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with served(tmp_path, engine={}, shutdown_grace_s=600) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) in (0, -signal.SIGTERM)
    with served(tmp_path, engine={"token-delay-ms": TOKEN_MS}, shutdown_grace_s=600) as server:
        stream = Stream(server.http, server.chat(max_tokens=1500))
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.http.get("/ready").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) in (0, -signal.SIGTERM)
        stream.join(DEADLINE_S)
        assert "error" in stream.lines[-1]


def test_no_log_holds_what_was_asked_or_a_key(tmp_path: Path) -> None:
    """Marked texts through every route, well-formed and not; then all logs are searched."""
    faults = tmp_path / "faults"
    faults.mkdir()
    with served(tmp_path, engine={"faults": str(faults)}, encoders=True, expert_roots=[str(tmp_path)]) as server:
        http, pick = server.http, random.Random(0)

        def secret() -> str:
            return f"{MARK}-{pick.randrange(10**9)}"

        key = http.post("/admin/keys", json={"tenant": "someone", "scopes": ["use", "create"]}).json()["key"]
        examples = [{"input": secret(), "output": secret()} for _ in range(3)]
        named = {"name": "named", "pool": "flan", "examples": examples, "metadata": {"note": secret()}}
        assert http.post("/v1/cocktails?wait=30", json=named).status_code == 201
        pairs = [{"query": secret(), "pos": [secret()], "neg": [secret()]} for _ in range(2)]
        assert http.post("/v1/cocktails?wait=30", json={"name": "e", "pool": "bge", "examples": pairs}).is_success
        messages = [{"role": "user", "content": secret()}]
        chat = {"model": "named", "messages": messages, "max_tokens": 6}
        known = http.post("/v1/chat/completions", json=chat, headers={"x-request-id": "id-of-mine"})
        assert known.headers["x-request-id"] == "id-of-mine"
        assert known.status_code == 200
        for fault in ("stream_error", "stream_cut", "mix_invalid", "mix_failed", "die"):
            until(lambda: http.get("/ready").status_code == 200)
            (faults / fault).touch()
            body = {"name": f"f-{fault.replace('_', '-')}", "pool": "flan", "examples": examples, "alpha": None}
            body["merging_weights"] = {"base": 0.1 + pick.random() / 2}
            http.post("/v1/cocktails?wait=30", json=body)
            weights = {"base": 0.5 - pick.random() / 4}
            weights["nq"] = 1 - weights["base"]
            http.post("/v1/cocktails?wait=30", json={"name": "w", "pool": "flan", "merging_weights": weights})
            with http.stream("POST", "/v1/chat/completions", json=chat | {"stream": True}) as response:
                response.read()
        until(lambda: http.get("/ready").status_code == 200)

        def a_job_failed() -> bool:
            """Tried again where something else, as a report in the background, met the fault."""
            if " failed: invalid_mix" in server.log.read_text():
                return True
            (faults / "mix_invalid").touch()
            base = 0.1 + pick.random() / 2
            body = {"name": "failing", "pool": "flan", "merging_weights": {"base": base, "nq": 1 - base}}
            http.post("/v1/cocktails?wait=30", json=body)
            return False

        until(a_job_failed)
        document = http.get("/openapi.json").json()
        bodies: list[Any] = [
            {"model": secret(), "messages": messages, "prompt": secret(), "input": secret(), "name": secret()},
            {"model": "flan", "messages": messages, "prompt": secret(), "max_tokens": secret(), "stop": [secret()]},
            {"model": "flan", "messages": secret()},
            {"model": "flan", "messages": messages, "cocktail": {"examples": examples, "target": secret()}},
            {"model": "bge", "input": [secret(), 5]},
            {"name": "x", "pool": "flan", "examples": [{"input": secret()}], "weighting": secret()},
            {"name": "new", "path": secret(), "pin": secret(), "tenant": secret()},
            [secret()],
        ]
        for path, operations in document["paths"].items():
            for method in operations:
                concrete = path
                while "{" in concrete:
                    concrete = concrete[: concrete.index("{")] + secret() + concrete[concrete.index("}") + 1 :]
                for headers in ({}, {"authorization": f"Bearer {key}"}, {"authorization": f"Bearer ck-{secret()}"}):
                    content = f'{{"broken": "{secret()}'
                    http.request(method, concrete, content=content, headers=headers | _JSON)
                    http.request(method, f"{concrete}?{secret()}={secret()}", json=pick.choice(bodies), headers=headers)
        for body in bodies:
            for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/cocktails"):
                http.post(path, json=body)
        upload = {"file": ("f.jsonl", f'{{"input": "{secret()}"}}'.encode())}
        http.post("/v1/files", data={"purpose": "fine-tune"}, files=upload)
        http.post("/v1/files", data={"purpose": secret()}, files=upload)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(DEADLINE_S)
    logs = [server.log, *(tmp_path / "cache" / "engines").glob("*.log")]
    assert len(logs) == 2
    for log in logs:
        text = log.read_text()
        assert MARK not in text, next(line for line in text.splitlines() if MARK in line)[:500]
        assert key not in text
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    of_requests = [line for line in lines if line["logger"] == "cocktail_serve.requests"]
    assert len(of_requests) > 100
    assert all(line["request_id"] for line in of_requests)
    (mine,) = [line for line in of_requests if line["request_id"] == "id-of-mine"]
    assert (mine["route"], mine["status"], mine["pool"]) == ("/v1/chat/completions", 200, "flan")
    assert (mine["tenant"], mine["model"], mine["tokens_out"]) == ("default", known.json()["model"], 6)
    assert mine["tokens_in"] > 0
    # a swap is told with the cocktail that it was for
    swaps = [line["message"] for line in lines if line["message"].startswith("flan: recipe ")]
    assert any(f"({known.json()['model']} of default) from files in" in message for message in swaps), swaps
    # a job that fails is told with the request that asked for it
    failed = [line for line in lines if line["message"].startswith("cocktail ") and " failed" in line["message"]]
    assert failed
    assert all(line["request_id"].startswith("req_") for line in failed)


_JSON = {"content-type": "application/json"}
