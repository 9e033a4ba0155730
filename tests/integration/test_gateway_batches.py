"""`/v1/batches` by the official client, strict: the whole journey, what fails, and who may see it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.gateways import LiveGateway, live_gateway
from tests.tenants import MESSAGES, Tenants, ask, code_of, guarded_gateway, make

DEADLINE_S = 60.0
SLOW_MS = 20


@pytest.fixture(scope="module")
def client(gateway: LiveGateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=gateway.base_url, api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("batches")
    args = {"faults": str(folder / "faults"), "token-delay-ms": SLOW_MS}
    with guarded_gateway(folder, engine={"args": args}) as tenants:
        yield tenants


def client_of(http: httpx.Client) -> OpenAI:
    key = http.headers["authorization"].removeprefix("Bearer ")
    return OpenAI(base_url=f"{http.base_url}/v1", api_key=key, max_retries=0, _strict_response_validation=True)


def lines_of(endpoint: str, *bodies: dict[str, Any]) -> bytes:
    lines = (
        {"custom_id": f"line-{number}", "method": "POST", "url": endpoint, "body": body}
        for number, body in enumerate(bodies, start=1)
    )
    return "\n".join(map(json.dumps, lines)).encode()


def begin(client: OpenAI, endpoint: Any, content: bytes, **fields: Any) -> Any:
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    assert (file.purpose, file.bytes) == ("batch", len(content))
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def until(client: OpenAI, batch_id: str, *statuses: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while (batch := client.batches.retrieve(batch_id)).status not in statuses:
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def read(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).read().splitlines()]


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/completions": {"prompt": "what is the capital of france", "max_tokens": 4},
    "/v1/responses": {"input": "what is the capital of france", "max_output_tokens": 4},
    "/v1/decisions": {
        "input": "an apple",
        "questions": [{"type": "choice", "instructions": "", "choices": [{"value": "is red"}, {"value": "is blue"}]}],
    },
    "/v1/embeddings": {"input": ["paris", "berlin"]},
}


@pytest.mark.parametrize("endpoint", BODIES)
def test_the_whole_journey(client: OpenAI, gateway: LiveGateway, endpoint: str) -> None:
    models = ["bge", "bge/quora"] if endpoint == "/v1/embeddings" else ["flan", "flan/nq", "flan/ag-news"]
    bodies = [BODIES[endpoint] | {"model": models[number % len(models)]} for number in range(7)]
    made = begin(client, endpoint, lines_of(endpoint, *bodies), metadata={"team": "night"})
    assert made.status in ("validating", "in_progress", "finalizing", "completed")
    assert made.expires_at == made.created_at + 86_400
    batch = until(client, made.id, "completed", "failed")
    assert (batch.status, batch.errors, batch.error_file_id) == ("completed", None, None)
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (7, 7, 0)
    assert (batch.endpoint, batch.metadata, batch.completion_window) == (endpoint, {"team": "night"}, "24h")
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    answers = read(client, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"line-{number}" for number in range(1, 8)]
    for answer, body in zip(answers, bodies, strict=True):
        assert answer["error"] is None
        assert answer["id"].startswith("batch_req_")
        assert (answer["response"]["status_code"], bool(answer["response"]["request_id"])) == (200, True)
        assert answer["response"]["body"]["model"] == body["model"]
        alone = httpx.post(f"{gateway.url}{endpoint}", json=body, timeout=60).json()
        told = answer["response"]["body"]
        for field in ("answers", "choices", "usage"):
            assert told.get(field) == alone.get(field)
        for one, other in zip(told.get("data", ()), alone.get("data", ()), strict=True):
            assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-5)
        if endpoint == "/v1/responses":
            assert told["output"][0]["content"] == alone["output"][0]["content"]
    output = client.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert batch.id in [each.id for each in client.batches.list()]
    assert [each.id for each in client.batches.list(limit=1).data] == [batch.id]
    with pytest.raises(openai.ConflictError) as caught:
        client.batches.cancel(batch.id)
    assert caught.value.code == "batch_finished"
    assert client.files.delete(output.id).deleted


def test_lines_that_fail_are_told_apart_from_those_that_do_not(client: OpenAI) -> None:
    chat = BODIES["/v1/chat/completions"]
    bodies = [chat | {"model": "flan"}, chat | {"model": "flan/none"}, chat | {"model": "flan", "max_tokens": 10**6}]
    bodies += [chat | {"model": "flan", "vllm_xargs": {"cocktail_recipe": "{}"}}, {"model": "flan"}]
    batch = until(
        client, begin(client, "/v1/chat/completions", lines_of("/v1/chat/completions", *bodies)).id, "completed"
    )
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 4)
    assert [each["custom_id"] for each in read(client, batch.output_file_id)] == ["line-1"]
    errors = read(client, batch.error_file_id)
    told = [(each["response"]["status_code"], each["response"]["body"]["error"]["code"]) for each in errors]
    assert told == [
        (404, "model_not_found"),
        (400, "context_length_exceeded"),
        (400, "field_not_accepted"),
        (400, "invalid_request"),
    ]


@pytest.mark.parametrize(
    ("content", "code", "line", "param"),
    [
        (b"", "empty_file", None, None),
        (b"\n \n", "empty_file", None, None),
        (b"{}\nno json", "invalid_request", 1, "custom_id"),
        (b"no json", "invalid_json_line", 1, None),
        (b"[1]", "invalid_json_line", 1, None),
        (lines_of("/v1/completions", {}), "mismatched_url", 1, "url"),
        (lines_of("/v1/chat/completions", {}).replace(b"POST", b"GET"), "invalid_method", 1, "method"),
        (b"\n".join([lines_of("/v1/chat/completions", {})] * 2), "duplicate_custom_id", 2, "custom_id"),
        (lines_of("/v1/chat/completions", {"stream": True}), "invalid_request", 1, "body.stream"),
    ],
)
def test_a_file_of_no_use_fails_its_batch(
    client: OpenAI, content: bytes, code: str, line: int | None, param: str | None
) -> None:
    batch = until(client, begin(client, "/v1/chat/completions", content).id, "failed")
    assert batch.errors is not None
    first = (batch.errors.data or [])[0]
    assert (first.code, first.line, first.param, bool(first.message)) == (code, line, param, True)
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert batch.failed_at is not None


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"endpoint": "/v1/moderations"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"input_file_id": "file-0"}, 404, "input_file_id"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after.seconds"),
        ({"other": 1}, 400, "other"),
    ],
)
def test_what_is_no_batch(
    client: OpenAI, gateway: LiveGateway, fields: dict[str, Any], status: int, param: str
) -> None:
    file = client.files.create(file=lines_of("/v1/completions", {}), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"} | fields
    answer = httpx.post(f"{gateway.url}/v1/batches", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_files_are_for_what_they_were_uploaded_for(client: OpenAI) -> None:
    examples = client.files.create(file=b'{"input": "a", "output": "b"}', purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(input_file_id=examples.id, endpoint="/v1/completions", completion_window="24h")
    assert caught.value.param == "input_file_id"
    requests = client.files.create(file=lines_of("/v1/completions", {}), purpose="batch")
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model="flan", training_file=requests.id)
    assert caught.value.param == "training_file"
    assert [file.id for file in client.files.list(purpose="batch", limit=1).data] == [requests.id]


def slow_lines(model: str, number: int) -> bytes:
    body = BODIES["/v1/completions"] | {"model": model, "max_tokens": 20}
    return lines_of("/v1/completions", *([body] * number))


class TestTenants:
    def test_a_batch_and_its_files_are_its_tenants(self, tenants: Tenants) -> None:
        mine, theirs = tenants.of("mine"), tenants.of("theirs")
        make(mine, "private")
        client = client_of(mine)
        content = lines_of("/v1/completions", BODIES["/v1/completions"] | {"model": "private"})
        batch = until(client, begin(client, "/v1/completions", content).id, "completed")
        (answer,) = read(client, batch.output_file_id)
        assert answer["response"]["body"]["model"].startswith("private@")
        for path in (f"/v1/batches/{batch.id}", f"/v1/files/{batch.output_file_id}/content"):
            assert theirs.get(path).status_code == 404
        assert code_of(theirs.post(f"/v1/batches/{batch.id}/cancel")) == "batch_not_found"
        assert theirs.get("/v1/batches").json()["data"] == []
        body = {"input_file_id": batch.input_file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        assert theirs.post("/v1/batches", json=body).status_code == 404
        assert tenants.of("mine", "use").post("/v1/batches", json=body).status_code == 403
        stolen = until(client_of(theirs), begin(client_of(theirs), "/v1/completions", content).id, "completed")
        (error,) = read(client_of(theirs), stolen.error_file_id)
        assert error["response"]["status_code"] == 404
        events = tenants.admin.get("/admin/audit", params={"tenant": "mine"}).json()["data"]
        assert [event["subject"] for event in events if event["action"] == "batch.created"] == [batch.id]

    def test_what_it_used_is_counted_and_no_other_key_than_the_tenants_is_asked_for(self, tenants: Tenants) -> None:
        http = tenants.of("counted")
        client = client_of(http)
        batch = until(client, begin(client, "/v1/completions", slow_lines("flan/nq", 3)).id, "completed")
        assert batch.request_counts is not None
        (row,) = http.get("/v1/usage", params={"group_by": "model"}).json()["data"]
        assert (row["model"], row["requests"], row["tokens_in"], row["tokens_out"]) == ("flan/nq", 3, 18, 60)

    def test_half_of_the_limits_is_left_to_the_tenant(self, tenants: Tenants) -> None:
        http = tenants.of("limited")
        client = client_of(http)
        file = client.files.create(file=("f", slow_lines("flan", 30)), purpose="batch")
        tenants.admin.put("/admin/tenants/limited", json={"limits": {"requests_per_minute": 20}})
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        time.sleep(1.0)
        answer = ask(http, "flan", max_tokens=1)
        assert answer.status_code == 200
        assert int(answer.headers["x-ratelimit-remaining-requests"]) >= 8
        assert client.batches.retrieve(made.id).status == "in_progress"
        assert client.batches.cancel(made.id).status == "cancelling"
        until(client, made.id, "cancelled")

    def test_a_batch_that_is_cancelled_keeps_what_it_has(self, tenants: Tenants) -> None:
        client = client_of(tenants.of("cancelling"))
        made = begin(client, "/v1/completions", slow_lines("flan", 60))
        while not (client.batches.retrieve(made.id).request_counts or made.request_counts).completed:
            time.sleep(0.05)
        assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
        batch = until(client, made.id, "cancelled")
        counts = batch.request_counts
        assert counts is not None
        assert counts.total == counts.completed + counts.failed == 60
        assert len(read(client, batch.output_file_id)) == counts.completed > 0
        errors = read(client, batch.error_file_id)
        assert {(each["response"], each["error"]["code"]) for each in errors} == {(None, "batch_cancelled")}
        assert client.batches.cancel(made.id).status == "cancelled", "again changes nothing"

    def test_requests_for_another_model_do_not_wait_for_a_batch(self, tenants: Tenants) -> None:
        """A line takes four seconds, and the turn of its model would be drained as long."""
        client = client_of(tenants.of("night"))
        body = BODIES["/v1/completions"] | {"model": "flan/nq", "max_tokens": 200}
        long = begin(client, "/v1/completions", lines_of("/v1/completions", *[body] * 8))
        http = tenants.of("day")
        until(client, long.id, "in_progress")
        time.sleep(0.5)
        started = time.monotonic()
        assert ask(http, "flan/ag-news", max_tokens=1).status_code == 200
        assert time.monotonic() - started < 2.5
        assert client.batches.retrieve(long.id).status == "in_progress"
        client.batches.cancel(long.id)
        until(client, long.id, "cancelled")


def test_it_goes_on_in_the_next_process_with_the_lines_that_have_no_answer(tmp_path: Path) -> None:
    args = {"token-delay-ms": SLOW_MS}
    with live_gateway(tmp_path, engine={"args": args}) as live:
        client = OpenAI(base_url=live.base_url, api_key="none", max_retries=0)
        made = begin(client, "/v1/completions", slow_lines("flan", 40))
        while (client.batches.retrieve(made.id).request_counts or made.request_counts).completed < 3:
            time.sleep(0.05)
    with live_gateway(tmp_path, engine={"args": args}) as live:
        client = OpenAI(base_url=live.base_url, api_key="none", max_retries=0)
        batch = until(client, made.id, "completed")
        assert batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.completed) == (40, 40)
        assert len(read(client, batch.output_file_id)) == 40
        (row,) = httpx.get(f"{live.url}/v1/usage", params={"group_by": "model"}).json()["data"]
        assert 40 <= row["requests"] <= 44, "at most those that were being asked are asked again"
