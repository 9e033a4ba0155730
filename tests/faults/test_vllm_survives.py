"""SIGKILL of a gateway whose engine is real vLLM: no process of it stays, and the job is finished by the next life."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bench import invariant
from bench.server import RunningServer, running_server
from cocktail_serve.pool import Mode
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


def make_pool(folder: Path, mode: Mode) -> dict[str, Path]:
    make = make_decoder_pool if mode == "merged" else invariant.make_adapter_pool
    return make(folder, ("north", "east"), tied=False, seed=20)


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_killed_while_a_job_is_scored_and_mixed(tmp_path: Path, mode: Mode) -> None:
    config = invariant.write_config(tmp_path, {"untied": make_pool(tmp_path / "models", mode)}, slice_s=0.3, mode=mode)
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


def test_a_worker_killed_under_a_shared_batch(tmp_path: Path) -> None:
    """Every stream ends in an error event; the next life answers each cocktail as the last one did."""
    config = invariant.write_config(
        tmp_path, {"untied": make_pool(tmp_path / "models", "unmerged")}, slice_s=0.3, mode="unmerged"
    )
    mixtures = [{"north": 1.0}, {"base": 0.5, "east": 0.5}, {"base": 0.2, "north": 0.3, "east": 0.5}]
    with running_server(config, log=tmp_path / "server.log") as server:
        models = ["untied"]
        for index, weights in enumerate(mixtures):
            request = {"name": f"hand-{index}", "pool": "untied", "merging_weights": weights}
            models.append(server.post("/v1/cocktails?wait=60", request)["id"])
        before = [text_of(server, model) for model in models]
        assert len(set(before)) == len(before)
        worker = engine_of(server)[-1]

        def last_event(model: str) -> str:
            body = {"model": model, **BODY, "max_tokens": 240, "ignore_eos": True, "stream": True}
            with server.http.stream("POST", "/v1/completions", json=body) as response:
                lines = (line for line in response.iter_lines() if line)
                next(lines)
                if model == models[-1]:
                    worker.kill()
                *_, last = lines
            return last

        with ThreadPoolExecutor(len(models)) as threads:
            ends = list(threads.map(last_event, models))
        for end in ends:
            assert json.loads(end.removeprefix("data: "))["error"]["code"] == "engine_error"
        deadline = time.monotonic() + 120
        while server.http.get("/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert [text_of(server, model) for model in models] == before
