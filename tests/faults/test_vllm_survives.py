"""SIGKILL of a gateway whose engine is real vLLM: no process of it stays, and the job is finished by the next life."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bench import invariant
from bench.server import RunningServer, running_server
from tests.gateway_process import until_gone
from tests.models import make_decoder_pool

pytestmark = [pytest.mark.full, pytest.mark.vllm, pytest.mark.timeout(900)]

EXAMPLES = [{"input": f"is {word} a fruit?", "output": "yes"} for word in ("apple", "pear", "fig")]
BODY = {"prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0}


def text_of(server: RunningServer, model: str) -> str:
    text: str = server.post("/v1/completions", {"model": model, **BODY})["choices"][0]["text"]
    return text


def engine_of(server: RunningServer) -> list[psutil.Process]:
    """vLLM's processes, three at least. To be found before the moment that counts: it takes a while."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    assert len(below) >= 3
    return below


def killed(server: RunningServer, below: list[psutil.Process]) -> None:
    """SIGKILL of the gateway; none of the engine's processes is told."""
    server.process.kill()
    server.process.wait()
    assert until_gone(below, timeout_s=20.0) == []


def test_killed_while_a_job_is_scored_and_mixed(tmp_path: Path) -> None:
    pool = make_decoder_pool(tmp_path / "models", ("north", "east"), tied=False, seed=20)
    config = invariant.write_config(tmp_path, {"untied": pool}, slice_s=0.3)
    request: dict[str, Any] = {"name": "fruit", "pool": "untied", "temperature": 0.5, "examples": EXAMPLES}
    log = tmp_path / "server.log"
    with running_server(config, log=log) as server:
        kept = server.post("/v1/cocktails?wait=60", request | {"name": "kept"})
        base = text_of(server, "untied")
        of_kept = text_of(server, kept["id"])
        fresh = request | {"examples": [{"input": f"{row['input']} really?", "output": "no"} for row in EXAMPLES]}
        below = engine_of(server)
        asked = server.post("/v1/cocktails", fresh)
        assert asked["status"] in ("queued", "scoring", "mixing")
        killed(server, below)
    with running_server(config, log=log) as server:
        deadline = time.monotonic() + 60
        while (found := server.http.get(f"/v1/cocktails/{asked['id']}").json())["status"] != "ready":
            assert found["status"] in ("queued", "scoring", "mixing"), found
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert text_of(server, "untied") == base
        assert text_of(server, kept["id"]) == of_kept
        made = text_of(server, asked["id"])
        again = server.post("/v1/cocktails?wait=60", fresh | {"name": "again"})
        assert again["merging_weights"] == pytest.approx(found["merging_weights"], abs=1e-5)
        assert text_of(server, again["id"]) == made
        body = {"model": "untied", **BODY, "max_tokens": 240, "ignore_eos": True, "stream": True}
        below = engine_of(server)
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            killed(server, below)
            with pytest.raises(httpx.TransportError):
                list(lines)
