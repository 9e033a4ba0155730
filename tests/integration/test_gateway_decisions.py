"""`/v1/decisions` over real sockets: whatever model is asked, whoever asks, whatever is asked."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateways import EXAMPLES, eventually, live_gateway
from tests.tenants import Tenants, code_of, guarded_gateway, make

INLINE = {"examples": EXAMPLES}
QUESTIONS = [
    {"type": "predicate", "name": "fruit", "instructions": "It is a fruit."},
    {"type": "choice", "instructions": "Which is it?", "choices": [{"value": "apple"}, {"value": True}]},
    {
        "type": "score",
        "instructions": "How ripe?",
        "levels": [{"label": "green"}, {"label": "red"}, {"label": "brown"}],
    },
]


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("decisions")
    with guarded_gateway(folder, engine={"args": {"faults": str(folder / "faults"), "token-delay-ms": 20}}) as tenants:
        yield tenants


def decide(http: httpx.Client, model: str = "flan", **fields: Any) -> httpx.Response:
    return http.post("/v1/decisions", json={"model": model, "input": "an apple", "questions": QUESTIONS, **fields})


def check(answer: dict[str, Any]) -> None:
    predicate, choice, score = answer["answers"]
    assert (predicate["type"], predicate["name"]) == ("predicate", "fruit")
    assert 0 < predicate["probability"] < 1
    for kind, each, values in (("choice", choice, ["apple", True]), ("score", score, [0, 1, 2])):
        probabilities = {row["value"]: row["probability"] for row in each["probabilities"]}
        assert (each["type"], each["name"], list(probabilities)) == (kind, None, values)
        assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-9)
        assert 0 < each["confidence"] <= 1
    assert choice["choice"] == max(choice["probabilities"], key=lambda row: row["probability"])["value"]
    mean = sum(row["value"] * row["probability"] for row in score["probabilities"])
    assert score["score"] == pytest.approx(mean, abs=1e-9)


@pytest.mark.parametrize("reading", [None, "labels", "verbatim"])
@pytest.mark.parametrize("model", ["flan", "flan/nq", "decided", "inline"])
def test_every_model_of_a_decoder_pool_decides(http: httpx.Client, model: str, reading: str | None) -> None:
    fields: dict[str, Any] = {} if reading is None else {"reading": reading}
    served = model
    if model == "decided":
        served = make(http, model)["id"]
    elif model == "inline":
        model, fields["cocktail"] = "flan", INLINE
    answer = decide(http, model, **fields)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    check(told)
    assert told["model"] == served or (served == "inline" and told["model"].startswith("flan@"))
    usage = told["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] > 0 == usage["output_tokens"]
    assert decide(http, model, **fields).json() == told


def test_recipes_and_readings_answer_differently(http: httpx.Client) -> None:
    told = [
        decide(http, model, reading=reading).json()["answers"]
        for model in ("flan", "flan/nq")
        for reading in ("labels", "verbatim")
    ]
    assert len({json.dumps(each) for each in told}) == 4
    assert decide(http).json()["answers"] == told[1], "verbatim, where nothing is said"


def test_more_options_than_letters_are_read_verbatim(http: httpx.Client) -> None:
    many = {"type": "choice", "instructions": "?", "choices": [{"value": f"word {number}"} for number in range(400)]}
    (answer,) = decide(http, questions=[many]).json()["answers"]
    assert len(answer["probabilities"]) == 400
    refused = decide(http, questions=[many], reading="labels")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "questions.0")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"questions": []}, "invalid_request", "questions"),
        ({"questions": [QUESTIONS[0]] * 401}, "invalid_request", "questions"),
        ({"questions": [{"type": "guess", "instructions": ""}]}, "invalid_request", "questions.0.type"),
        (
            {"questions": [{**QUESTIONS[1], "choices": [{"value": "a"}, {"value": "a"}]}]},
            "invalid_request",
            "questions.0.choices.1",
        ),
        (
            {"questions": [{**QUESTIONS[2], "levels": [{"label": ""}, {"label": "a"}]}]},
            "invalid_request",
            "questions.0.levels.0.label",
        ),
        (
            {"questions": [QUESTIONS[0], {**QUESTIONS[1], "choices": [{"value": "a"}, {"value": "b " * 300}]}]},
            "context_length_exceeded",
            "questions.1",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "invalid_request", "input.0"),
        ({"model": "bge"}, "wrong_model_kind", "model"),
        ({"model": "none"}, "model_not_found", "model"),
        ({"priority": 1}, "invalid_request", "priority"),
        ({"cache_salt": ""}, "invalid_request", "cache_salt"),
        ({"cocktail": {"examples": []}}, "invalid_examples", "cocktail.examples"),
    ],
)
def test_what_is_no_request_for_decisions(http: httpx.Client, fields: dict[str, Any], code: str, param: str) -> None:
    answer = decide(http, **fields)
    status = 404 if code == "model_not_found" else 400
    assert (answer.status_code, code_of(answer), answer.json()["error"]["param"]) == (status, code, param), answer.text


def test_what_the_client_sends_beside_the_questions_is_taken(http: httpx.Client) -> None:
    answer = decide(
        http, prompt_cache_key="k", prompt_cache_options={"mode": "explicit"}, safety_identifier="who", cache_salt="s"
    )
    assert answer.status_code == 200, answer.text


def test_failures_of_the_engine(tmp_path: Path) -> None:
    with live_gateway(tmp_path) as live, httpx.Client(base_url=live.url, timeout=60) as http:
        (live.faults / "score_overflow").touch()
        answer = decide(http)
        assert (answer.status_code, code_of(answer)) == (422, "not_finite")
        (live.faults / "answer_error").write_text("500 broken")
        assert decide(http).status_code == 502
        assert decide(http).status_code == 200


def test_a_tenants_models_are_its_own(tenants: Tenants) -> None:
    alice, bob = tenants.of("alice"), tenants.of("bob")
    make(alice, "secret")
    assert decide(alice, "secret").status_code == 200
    assert (decide(bob, "secret").status_code, code_of(decide(bob, "secret"))) == (404, "model_not_found")
    assert decide(tenants.client(None)).status_code == 401
    assert decide(tenants.of("alice", "use"), cocktail=INLINE).status_code == 403


def test_tokens_are_limited_and_booked(tenants: Tenants) -> None:
    http = tenants.of("counted")
    tenants.admin.put("/admin/tenants/counted", json={"limits": {"requests_per_minute": 3, "tokens_per_minute": 5000}})
    usage = decide(http).json()["usage"]
    (row,) = http.get("/v1/usage", params={"group_by": "model"}).json()["data"]
    assert (row["model"], row["requests"], row["tokens_in"], row["tokens_out"]) == (
        "flan", 1, usage["input_tokens"], 0,
    )  # fmt: skip
    many = decide(http, questions=QUESTIONS * 100).json()["usage"]
    assert many["input_tokens"] == 100 * usage["input_tokens"], "each question reads the input"
    refused = decide(http)
    assert (refused.status_code, code_of(refused)) == (429, "rate_limit_exceeded")


def test_a_client_that_leaves_frees_the_engine(tenants: Tenants) -> None:
    """The fake takes 20 ms for each question."""
    http = tenants.of("leaves")
    key = http.headers["authorization"]
    body = json.dumps({"model": "flan", "input": "x", "questions": [QUESTIONS[0]] * 400}).encode()
    head = f"POST /v1/decisions HTTP/1.1\r\nhost: x\r\nauthorization: {key}\r\ncontent-type: application/json\r\n"
    url = httpx.URL(tenants.live.url)
    with socket.create_connection((url.host, url.port or 80)) as client:
        client.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: in_flight(tenants) == 1, "its turn")
    begun = time.monotonic()
    eventually(lambda: in_flight(tenants) == 0, "its end", within_s=4.0)
    assert time.monotonic() - begun < 4.0 < 400 * 0.02


def in_flight(tenants: Tenants) -> int:
    rows = tenants.admin.get("/admin/engines").json()["data"]
    (flan,) = [row for row in rows if row["id"] == "flan"]
    count: int = flan["in_flight"]
    return count


def test_decisions_as_examples(http: httpx.Client) -> None:
    rows = [
        {"input": f"a {word}", "choices": ["fruit", "tool"], "answer": answer}
        for word, answer in (("pear", "fruit"), ("saw", "tool"))
    ]
    made = make(http, "told-apart", examples=rows)
    assert (made["status"], made["form"]) == ("ready", None)
    assert len(set(made["losses"].values())) == 3
    kept = http.get(f"/v1/cocktails/{made['id']}/examples").json()["data"]
    assert make(http, "told-apart", examples=kept)["id"] == made["id"], "what is kept says the same again"
    outputs = [{"input": row["input"], "output": row["answer"]} for row in rows]
    other = make(http, "told-apart", examples=outputs)
    assert (other["id"] == made["id"], other["form"]) == (False, "text"), "another loss, another cocktail"
    mixed = http.post("/v1/cocktails", json={"name": "x", "pool": "flan", "examples": [*rows, *outputs]})
    assert (mixed.status_code, code_of(mixed)) == (400, "invalid_examples")
    uploaded = http.post(
        "/v1/files",
        data={"purpose": "fine-tune"},
        files={"file": ("rows.jsonl", "\n".join(map(json.dumps, rows)))},
    )
    job = http.post("/v1/fine_tuning/jobs", json={"model": "flan", "training_file": uploaded.json()["id"]})
    assert job.status_code == 200, job.text
