"""A pool of several engines as clients, the operator and scrapers see it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cocktail_serve.gateway.metrics import RESIDENT_DIGITS
from tests.command_line import run
from tests.gateways import EXAMPLES, eventually, live_gateway

ADMIN = "the-operators-own"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[httpx.Client]:
    engine = {"replicas": 2, "args": {"faults": str(folder / "faults"), "token_delay_ms": "5"}}
    with (
        live_gateway(folder, engine=engine, admin_key=ADMIN) as live,
        httpx.Client(base_url=live.url, headers={"authorization": f"Bearer {ADMIN}"}, timeout=60) as client,
    ):
        all_ready(client)
        yield client


def all_ready(http: httpx.Client) -> None:
    eventually(lambda: states(http) == ["ready", "ready"], "the start of both")


def states(http: httpx.Client) -> Any:
    return http.get("/ready").json()["pools"]["flan"]["replicas"]


def servers(folder: Path) -> set[int]:
    """Processes of its engines: the gateway runs in this one, and others may."""
    return {each.pid for each in psutil.Process().children() if str(folder) in " ".join(each.cmdline())}


def engine_of(http: httpx.Client) -> Any:
    return made(http.get("/admin/engines/flan"))


def made(response: httpx.Response) -> Any:
    assert response.is_success, response.text
    return response.json()


def chat(http: httpx.Client, model: str, max_tokens: int = 5) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": max_tokens}
    return http.post("/v1/chat/completions", json=body)


def samples(http: httpx.Client, name: str) -> dict[tuple[str, str], float]:
    """By pool and replica."""
    return {
        (sample.labels["pool"], sample.labels["replica"]): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
        if sample.name == name
    }


def test_each_replica_is_shown(http: httpx.Client) -> None:
    cocktail = made(http.post("/v1/cocktails?wait=30", json={"name": "mine", "pool": "flan", "examples": EXAMPLES}))
    assert cocktail["status"] == "ready"
    assert chat(http, "mine").status_code == 200
    seen = engine_of(http)
    assert [each["replica"] for each in seen["replicas"]] == [0, 1]
    assert all(each["node"] and each["state"] == "ready" for each in seen["replicas"])
    assert seen["phase"] is seen["resident"] is seen["restart"] is None
    assert seen["swaps"] == sum(each["swaps"] for each in seen["replicas"]) >= 1
    holding = [each for each in seen["replicas"] if each["resident"]["recipe"] == cocktail["recipe"]["digest"]]
    assert holding
    assert {"id": cocktail["id"], "tenant": "default"} in holding[0]["resident"]["models"]
    (encoder,) = made(http.get("/admin/engines/bge"))["replicas"]
    assert (encoder["replica"], encoder["node"]) == (0, "")


def test_metrics_tell_replicas_apart_and_which_recipe_each_holds(http: httpx.Client) -> None:
    cocktail = made(http.post("/v1/cocktails?wait=30", json={"name": "held", "pool": "flan", "examples": EXAMPLES[:2]}))
    assert chat(http, "held").status_code == 200
    assert samples(http, "cocktail_engine_ready") == {("flan", "0"): 1, ("flan", "1"): 1, ("bge", "0"): 1}
    resident = samples(http, "cocktail_resident")
    assert set(resident) == {("flan", "0"), ("flan", "1")}
    digest = cocktail["recipe"]["digest"]
    assert int(digest[:RESIDENT_DIGITS], 16) in {int(value) for value in resident.values()}
    assert set(samples(http, "vllm:num_requests_running")) == {("flan", "0"), ("flan", "1")}
    swaps = samples(http, "cocktail_swap_seconds_count")
    assert swaps["flan", "0"] + swaps["flan", "1"] == engine_of(http)["swaps"]


def test_decisions_are_those_of_the_model_whichever_replica_answers(http: httpx.Client) -> None:
    question = {"type": "choice", "instructions": "Which is it?", "choices": [{"value": "apple"}, {"value": "pear"}]}

    def decided(model: str) -> Any:
        body = {"model": model, "input": "an apple", "questions": [question]}
        return made(http.post("/v1/decisions", json=body))["answers"]

    models = ("flan", "flan/nq", "flan/ag-news")
    by_either = {model: decided(model) for model in models}
    for number in (0, 1):
        made(http.post("/admin/engines/flan", json={"drain": True, "replica": number}))
        assert {model: decided(model) for model in models} == by_either
        made(http.post("/admin/engines/flan", json={"drain": False, "replica": number}))
    assert len({str(answers) for answers in by_either.values()}) == 3


def test_one_is_drained_while_the_other_answers(http: httpx.Client) -> None:
    drained = made(http.post("/admin/engines/flan", json={"drain": True, "replica": 0}))
    assert [each["drained"] for each in drained["replicas"]] == [True, False]
    assert drained["drained"] is False
    assert all(chat(http, model).status_code == 200 for model in ("flan", "flan/nq", "flan/ag-news"))
    made(http.post("/admin/engines/flan", json={"drain": False, "replica": 0}))
    unknown = http.post("/admin/engines/flan", json={"drain": True, "replica": 2})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "replica_not_found")
    assert http.post("/admin/engines/bge", json={"drain": False, "replica": 0}).status_code == 200


def test_the_pool_is_ready_while_one_of_its_engines_is_not(http: httpx.Client, folder: Path) -> None:
    assert len(servers(folder)) == 2
    os.kill(min(servers(folder)), signal.SIGKILL)
    eventually(lambda: "restarting" in states(http), "the loss of one")
    ready = http.get("/ready")
    assert ready.status_code == 200
    assert ready.json()["pools"]["flan"]["state"] == "ready"
    assert all(chat(http, model).status_code == 200 for model in ("flan", "flan/nq", "flan/ag-news"))
    assert sum(samples(http, "cocktail_engine_restarts_total").values()) == 1
    all_ready(http)


def test_the_command_restarts_all_without_a_failed_request(
    http: httpx.Client, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, is_over = servers(folder), False

    def client(model: str) -> list[int]:
        answers = []
        while not is_over:
            answers.append(chat(http, model).status_code)
        return answers

    with ThreadPoolExecutor() as clients:
        asked = [clients.submit(client, model) for model in ("flan", "flan/nq", "flan/ag-news", "mine")]
        words = ("restart", "flan", "--server", str(http.base_url), "--key", ADMIN)
        code, out, err = run(capsys, *words)
        is_over = True
        answers = [status for each in asked for status in each.result()]
    assert (code, out.strip()) == (0, "2 of 2 replicas restarted"), err
    assert set(answers) == {200}
    assert len(answers) > 8
    assert servers(folder).isdisjoint(before)
    restart = engine_of(http)["restart"]
    assert restart == {"done": 2, "total": 2, "replica": None, "error": None}


def test_what_cannot_be_restarted_is_refused_with_a_reason(
    http: httpx.Client, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    refused = http.post("/admin/engines/bge/restart", json={})
    assert refused.status_code == 400
    assert "restart the server" in refused.json()["error"]["message"]
    assert http.post("/admin/engines/nothing/restart", json={}).status_code == 404
    assert http.post("/admin/engines/flan/restart", json={"drain_s": -1}).status_code == 400
    assert http.post("/admin/engines/flan/restart", json={}, headers={"authorization": "Bearer no"}).status_code == 401
    code, _, err = run(capsys, "restart", "nothing", "--server", str(http.base_url), "--key", ADMIN)
    assert code == 2
    assert "there is no engine 'nothing'" in err
