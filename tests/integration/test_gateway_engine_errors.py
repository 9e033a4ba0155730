"""What a client is told of an engine's errors: one status and code for each, whole or inside a stream."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.gateways import EXAMPLES, LiveGateway, live_gateway

BODY: dict[str, Any] = {"model": "flan", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6}
TOO_LONG = "This model's maximum context length is 256 tokens. Please reduce the length of the input prompt."

ERRORS = [
    ("400 top_p must be in (0, 1]", 400, "invalid_request"),
    (f"400 {TOO_LONG}", 400, "context_length_exceeded"),
    ("404 The model `flan` does not exist.", 502, "engine_error"),
    ("413 too large", 400, "invalid_request"),
    ("422 an image that cannot be had", 400, "invalid_request"),
    ("429 too many requests", 503, "model_not_ready"),
    ("500 EngineCore died", 502, "engine_error"),
    ("501 beam search is not built in", 400, "invalid_request"),
    ("503 Request failed; please retry", 503, "model_not_ready"),
]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with live_gateway(tmp_path_factory.mktemp("engine_errors")) as live:
        yield live


@pytest.fixture(scope="module")
def http(live: LiveGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=30) as client:
        yield client


@pytest.mark.parametrize(("engine_says", "status", "code"), ERRORS, ids=[text[:12] for text, *_ in ERRORS])
def test_whole_and_inside_a_stream_alike(
    live: LiveGateway, http: httpx.Client, engine_says: str, status: int, code: str
) -> None:
    path = "/v1/chat/completions"
    (live.faults / "answer_error").write_text(engine_says)
    whole = http.post(path, json=BODY)
    (live.faults / "answer_error").write_text(engine_says)
    refused = http.post(path, json=BODY | {"stream": True})
    (live.faults / "stream_error").write_text(engine_says)
    at_once = http.post(path, json=BODY | {"stream": True, "max_tokens": 1})
    (live.faults / "stream_error").write_text(engine_says)
    late = http.post(path, json=BODY | {"stream": True})

    assert late.status_code == 200
    *chunks, last = [line.removeprefix("data: ") for line in late.text.splitlines() if line]
    assert len(chunks) == 3
    for answer in (whole, refused, at_once):
        assert answer.status_code == status, answer.text
        assert answer.headers.get("retry-after") == ("5" if status == 503 else None)
    told = whole.json()["error"]
    assert (told["type"], told["code"]) == ("server_error" if status >= 500 else "invalid_request_error", code)
    assert engine_says[4:] in told["message"]
    assert [json.loads(last), refused.json(), at_once.json()] == [whole.json()] * 3


def test_the_log_tells_a_stream_that_broke_off(
    live: LiveGateway, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Its status is 200, like that of one that did not."""
    caplog.set_level(logging.INFO, "cocktail_serve.requests")
    assert "[DONE]" in http.post("/v1/chat/completions", json=BODY | {"stream": True}).text
    (live.faults / "answer_error").write_text("500 EngineCore died")
    http.post("/v1/chat/completions", json=BODY)
    (live.faults / "stream_error").write_text("500 EngineCore died")
    assert "[DONE]" not in http.post("/v1/chat/completions", json=BODY | {"stream": True}).text
    http.get("/v1/models/none")
    http.post("/v1/chat/completions", json={"model": 5})
    deadline = time.monotonic() + 20
    while len(caplog.records) < 5:  # an answer's line is written behind its end
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [(record.__dict__["status"], record.__dict__.get("error")) for record in caplog.records] == [
        (200, None),
        (502, "engine_error"),
        (200, "engine_error"),
        (404, "model_not_found"),
        (400, "invalid_request"),
    ]


def test_a_loss_that_is_not_finite_is_the_callers_and_final(live: LiveGateway, http: httpx.Client) -> None:
    body = {"name": "overflows", "pool": "flan", "examples": EXAMPLES, "experts": ["nq"]}
    for params in ({"wait": "30"}, {"dry_run": "true"}):
        (live.faults / "score_overflow").touch()
        answer = http.post("/v1/cocktails", params=params, json=body)
        # asked again, the engine would give losses: nobody has asked it again
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "not_finite"), answer.text
        assert "leave the model out with 'experts'" in answer.json()["error"]["message"]
        assert not (live.faults / "score_overflow").exists()


@pytest.mark.parametrize(
    ("engine_says", "status", "code"),
    [("400 token ids must lie between 0 and 9", 400, "invalid_request"), ("501 not built in", 400, "invalid_request")],
)
def test_examples_that_the_engine_refuses_are_the_callers(
    live: LiveGateway, http: httpx.Client, engine_says: str, status: int, code: str
) -> None:
    (live.faults / "score_error").write_text(engine_says)
    body = {"name": "refused", "pool": "flan", "examples": EXAMPLES, "experts": ["nq"], "seed": int(engine_says[:3])}
    answer = http.post("/v1/cocktails", params={"wait": "30"}, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


@pytest.mark.parametrize("engine_says", ["503 please retry", "500 no memory for a moment"])
def test_a_job_outlasts_what_may_pass(live: LiveGateway, http: httpx.Client, engine_says: str) -> None:
    (live.faults / "score_error").write_text(engine_says)
    # examples of its own: kept scores would ask the engine for nothing
    examples = [{**row, "output": f"{row['output']} {engine_says}"} for row in EXAMPLES]
    body = {"name": "lasting", "pool": "flan", "examples": examples, "experts": ["nq"]}
    answer = http.post("/v1/cocktails", params={"wait": "30"}, json=body)
    assert (answer.status_code, answer.json()["status"]) == (201, "ready"), answer.text
    assert not (live.faults / "score_error").exists()
