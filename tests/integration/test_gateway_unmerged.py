"""A pool that is served unmerged, over HTTP: any number of cocktails at once, made without a mix."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cocktail_serve.engines.vllm.fake import fake_text
from tests.gateways import EXAMPLES, live_gateway

ADMIN = "the-operators-own"
DELAY_S = 0.02


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    args = {"token_delay_ms": str(1000 * DELAY_S), "mix_ms": "60000"}
    engine = {"mode": "unmerged", "max_concurrency": 16, "args": args}
    folder = tmp_path_factory.mktemp("unmerged")
    with (
        live_gateway(folder, admin_key=ADMIN, engine=engine) as live,
        httpx.Client(base_url=live.url, headers={"authorization": f"Bearer {ADMIN}"}, timeout=60) as client,
    ):
        yield client


def make(http: httpx.Client, name: str, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/cocktails?wait=30", json={"name": name, "pool": "flan", **body})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def ask(http: httpx.Client, model: str, prompt: str, **options: Any) -> str:
    answer = http.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": 30, **options})
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_cocktails_of_many_are_answered_at_once_each_by_its_own_recipe(http: httpx.Client) -> None:
    digests = {}
    for number in range(16):
        weights = {"base": number / 16, "nq": 1 - number / 16}
        made = make(http, f"mixture-{number}", merging_weights=weights)
        assert made["recipe"]["form"] == "unmerged"
        digests[made["id"]] = made["recipe"]["digest"]
    started = time.monotonic()
    with ThreadPoolExecutor(len(digests)) as threads:
        answers = list(threads.map(lambda model: ask(http, model, f"hello {model}"), digests))
    assert time.monotonic() - started < 16 * 30 * DELAY_S / 3, "one after another takes three times as long"
    for (model, digest), text in zip(digests.items(), answers, strict=True):
        assert text == fake_text(digest, f"hello {model}", num_tokens=30)


def test_a_cocktail_is_made_by_scoring_alone(http: httpx.Client) -> None:
    made = make(http, "films", examples=EXAMPLES)
    assert (made["status"], set(made["losses"])) == ("ready", {"base", "ag-news", "nq"})
    assert made["mixed_loss"] is not None
    inline = {"cocktail": {"examples": EXAMPLES, "temperature": 2.0}}
    answer = http.post("/v1/completions", json={"model": "flan", "prompt": "hello", **inline})
    assert answer.json()["model"].startswith("flan@")
    searched = make(http, "searched", examples=EXAMPLES, weighting="search")
    assert len(searched["candidates"]) > 1


def test_what_needs_merged_parameters_is_refused_with_what_to_do(http: httpx.Client) -> None:
    body = {"name": "ties", "pool": "flan", "examples": EXAMPLES, "method": "ties"}
    answer = http.post("/v1/cocktails", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "method_not_served")
    assert answer.json()["error"]["param"] == "method"
    assert "engine.mode: merged" in answer.json()["error"]["message"]
    assert http.get("/v1/cocktails", params={"name": "ties"}).json()["data"] == []
    made = make(http, "arithmetic", examples=EXAMPLES, method="task_arithmetic", method_params={"lambda": 0.5})
    assert ask(http, made["id"], "hello") == fake_text(made["recipe"]["digest"], "hello", num_tokens=30)


@pytest.mark.parametrize("xargs", [{"cocktail_recipe": "{}"}, {"cocktail_row": ["x", 1.0]}, {}], ids=str)
def test_nobody_but_the_gateway_says_which_coefficients(http: httpx.Client, xargs: dict[str, Any]) -> None:
    answer = http.post("/v1/completions", json={"model": "flan", "prompt": "hello", "vllm_xargs": xargs})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "vllm_xargs")


def test_the_operator_sees_how_and_why_and_pins_nothing(http: httpx.Client) -> None:
    engine = http.get("/admin/engines/flan").json()
    assert (engine["mode"], engine["mode_reason"]) == ("unmerged", "engine.mode is unmerged")
    assert (engine["phase"], engine["resident"], engine["swaps"]) == (None, None, 0)
    assert engine["detail"]["mixing_path"] == "unmerged"
    (encoder,) = (each for each in http.get("/admin/engines").json()["data"] if each["id"] == "bge")
    assert (encoder["mode"], encoder["mode_reason"]) == ("merged", None)
    assert {pool["id"]: pool["mode"] for pool in http.get("/v1/pools").json()["data"]} == {
        "bge": "merged",
        "flan": "unmerged",
    }
    refused = http.post("/admin/engines/flan", json={"pin": "flan/nq"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "pin")
    assert http.post("/admin/engines/flan", json={"drain": True}).json()["drained"] is True
    drained = http.post("/v1/completions", json={"model": "flan", "prompt": "hello"})
    assert drained.status_code == 503
    assert http.post("/admin/engines/flan", json={"drain": False}).json()["drained"] is False
    assert ask(http, "flan/nq", "hello")
    metrics = http.get("/metrics").text
    assert 'cocktail_mixing_path{kernel="none",path="unmerged",pool="flan",replica="0"} 1.0' in metrics
