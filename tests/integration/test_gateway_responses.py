"""`/v1/responses` over real sockets, by the official client in strict validation: stateless, salted, metered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import orjson
import pytest
from openai import AsyncOpenAI, OpenAI

from cocktail_serve.engines.vllm.fake import fake_text
from tests.gateways import EXAMPLES, LiveGateway, eventually, live_gateway
from tests.tenants import Tenants, code_of, guarded_gateway, make

QUESTION = "what is the capital of france"
SLOW_MS = 100

BEFORE_ITS_END_S = 15.0
"""What ended by then was ended: an answer of 200 slow words lasts 20 s."""


@pytest.fixture(scope="module", params=["merged", "unmerged"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    folder = tmp_path_factory.mktemp(request.param)
    with live_gateway(folder, engine={"mode": request.param}) as live:
        yield live


@pytest.fixture
def http(live: LiveGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client


@pytest.fixture
def client(live: LiveGateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=live.base_url, api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


def digest_of(http: httpx.Client, model: str) -> str:
    digest: str = http.get(f"/v1/cocktails/{model}/recipe").json()["digest"]
    return digest


def test_each_model_answers_by_its_own_recipe(client: OpenAI, http: httpx.Client) -> None:
    made = make(http, "films")
    texts = {}
    for model in ("flan", "flan/nq", "films"):
        answer = client.responses.create(model=model, input=QUESTION, max_output_tokens=6)
        texts[model] = answer.output_text
        assert answer.model == (made["id"] if model == "films" else model)
        assert (answer.object, answer.status) == ("response", "completed")
        assert answer.model_dump()["store"] is False
        assert answer.usage is not None
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (6, 6)
    assert len(set(texts.values())) == 3
    assert texts["films"] == fake_text(made["recipe"]["digest"], QUESTION, num_tokens=6)
    inline = client.responses.create(
        model="flan", input=QUESTION, max_output_tokens=6, extra_body={"cocktail": {"examples": EXAMPLES}}
    )
    assert inline.model.startswith("flan@")
    chat = client.chat.completions.create(model="films", messages=[{"role": "user", "content": QUESTION}], max_tokens=6)
    turns: Any = [{"role": "user", "content": QUESTION}]
    assert client.responses.create(model="films", input=turns, max_output_tokens=6).output_text == (
        chat.choices[0].message.content
    )


def test_streams_are_of_typed_events(client: OpenAI) -> None:
    whole = client.responses.create(model="flan/nq", input=QUESTION, max_output_tokens=6)
    events = list(client.responses.create(model="flan/nq", input=QUESTION, max_output_tokens=6, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == whole.output_text
    assert (last.response.model, last.response.usage) == ("flan/nq", whole.usage)
    with client.responses.stream(model="flan/nq", input=QUESTION, max_output_tokens=6) as stream:
        stream.until_done()
        assert stream.get_final_response().output_text == whole.output_text


async def test_async_client(live: LiveGateway) -> None:
    async with AsyncOpenAI(
        base_url=live.base_url, api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        answer = await client.responses.create(model="flan", input=QUESTION, max_output_tokens=6)
        stream = await client.responses.create(model="flan", input=QUESTION, max_output_tokens=6, stream=True)
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == answer.output_text


def test_a_stream_on_the_wire(http: httpx.Client) -> None:
    body = {"model": "flan", "input": QUESTION, "stream": True, "max_output_tokens": 2}
    text = http.post("/v1/responses", json=body).text
    *events, rest = text.split("\n\n")
    assert rest == ""
    for event in events:
        name, data = event.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert "[DONE]" not in text


STATE = {
    "previous_response_id": "resp_1",
    "conversation": "conv_1",
    "background": True,
    "store": True,
    "prompt": {"id": "pmpt_1"},
    "context_management": [{"type": "compaction"}],
}
TOOLS = ("web_search", "file_search", "code_interpreter", "mcp", "image_generation", "computer_use_preview", "shell")


@pytest.mark.parametrize("field", STATE)
def test_state_is_501_with_what_to_use_instead(http: httpx.Client, field: str) -> None:
    asked = {"model": "flan", "input": QUESTION, "max_output_tokens": 2}
    answer = http.post("/v1/responses", json={**asked, field: STATE[field]})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (501, "not_served", field)
    assert answer.headers["x-should-retry"] == "false"
    assert ": " in error["message"]
    for absent in (None, False):
        assert http.post("/v1/responses", json={**asked, field: absent}).status_code == 200


@pytest.mark.parametrize("kind", TOOLS)
def test_tools_that_run_on_a_server_are_501(http: httpx.Client, kind: str) -> None:
    for fields in ({"tools": [{"type": "function", "name": "f"}, {"type": kind}]}, {"tool_choice": {"type": kind}}):
        answer = http.post("/v1/responses", json={"model": "flan", "input": QUESTION, **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (501, next(iter(fields)))
        assert "'function'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses/resp_1"),
        ("DELETE", "/v1/responses/resp_1"),
        ("GET", "/v1/responses/resp_1/input_items"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("POST", "/v1/responses/input_tokens"),
        ("POST", "/v1/responses/compact"),
    ],
)
def test_routes_of_what_is_kept_are_501(http: httpx.Client, method: str, path: str) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, code_of(answer)) == (501, "not_served")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"vllm_xargs": {"cocktail_recipe": "{}"}}, "vllm_xargs"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"vllm_xargs": {"cocktail_row": ["x", 1.0]}}, "vllm_xargs"),
        ({"priority": -1}, "priority"),
        ({"request_id": "resp_mine"}, "request_id"),
        ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"stream": "true"}, "stream"),
        (
            {"input": [{"role": "assistant", "content": [{"type": "output_text", "text": t} for t in "ab"]}]},
            "input.0.content",
        ),
    ],
)
def test_fields_that_are_the_servers_to_decide(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/responses", json={"model": "flan", "input": QUESTION, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_errors_are_the_clients(client: OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="flan", input="word " * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="flan/none", input=QUESTION)
    with pytest.raises(openai.BadRequestError, match="answers /v1/embeddings"):
        client.responses.create(model="bge", input=QUESTION)


@pytest.mark.parametrize("fault", ["stream_error", "stream_cut"])
def test_a_broken_stream_raises_in_the_client(
    live: LiveGateway, client: OpenAI, http: httpx.Client, fault: str
) -> None:
    (live.faults / fault).touch()
    stream = client.responses.create(model="flan", input=QUESTION, max_output_tokens=6, stream=True)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "engine_error"
    (live.faults / fault).touch()
    body = {"model": "flan", "input": QUESTION, "max_output_tokens": 6, "stream": True}
    last = http.post("/v1/responses", json=body).text.split("\n\n")[-2]
    name, data = last.split("\n")
    event = json.loads(data.removeprefix("data: "))
    assert (name, event["type"], event["code"]) == ("event: error", "error", "engine_error")
    assert event["sequence_number"] > 3


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("metered")
    args = {"faults": str(folder / "faults"), "token-delay-ms": SLOW_MS}
    with guarded_gateway(folder, engine={"args": args}) as tenants:
        yield tenants


class TestMetering:
    def test_tokens_are_the_tenants(self, tenants: Tenants) -> None:
        http = tenants.of("metered")
        body = {"model": "flan/nq", "input": QUESTION, "max_output_tokens": 3}
        for stream in (False, True):
            assert http.post("/v1/responses", json={**body, "stream": stream}).status_code == 200
        (row,) = http.get("/v1/usage", params={"group_by": "model"}).json()["data"]
        assert (row["model"], row["requests"], row["tokens_in"], row["tokens_out"]) == ("flan/nq", 2, 12, 6)
        shown = http.get("/metrics").text
        assert 'route="/v1/responses",status="200"' in shown

    def test_limits_hold_what_a_response_may_take(self, tenants: Tenants) -> None:
        http = tenants.of("held")
        tenants.admin.put("/admin/tenants/held", json={"limits": {"tokens_per_minute": 1000}})
        body = {"model": "flan", "input": QUESTION, "max_output_tokens": 200, "stream": True}
        with http.stream("POST", "/v1/responses", json=body) as answer:
            next(answer.iter_lines())
            assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 800
        assert tenants.client(None).post("/v1/responses", json=body).status_code == 401

    def test_a_client_that_leaves_ends_it_in_the_engine_and_pays_what_it_saw(self, tenants: Tenants) -> None:
        http = tenants.of("leaving")

        def num_in_flight() -> int:
            number: int = http.get("/ready").json()["pools"]["flan"]["detail"].get("in_flight", -1)
            return number

        eventually(lambda: num_in_flight() == 0, "an idle engine")
        body = {"model": "flan", "input": QUESTION, "max_output_tokens": 200, "stream": True}
        with http.stream("POST", "/v1/responses", json=body) as answer:
            lines = answer.iter_lines()  # kept: httpx leaves where the iterator ends
            while "output_text.delta" not in next(lines):
                pass
            eventually(lambda: num_in_flight() == 1, "the request inside the engine")
        eventually(lambda: num_in_flight() == 0, "the end of the request inside the engine", within_s=BEFORE_ITS_END_S)
        eventually(
            lambda: bool(http.get("/v1/usage").json()["data"]), "the count of what it saw", within_s=BEFORE_ITS_END_S
        )
        (row,) = http.get("/v1/usage").json()["data"]
        assert row["requests"] == 1
        assert 1 <= row["tokens_out"] < 50
        assert row["tokens_in"] == len(orjson.dumps({name: body[name] for name in body if name != "model"})) // 4

    def test_a_tenants_models_are_its_own(self, tenants: Tenants) -> None:
        mine, theirs = tenants.of("mine"), tenants.of("theirs")
        make(mine, "private")
        body = {"model": "private", "input": QUESTION, "max_output_tokens": 1}
        assert mine.post("/v1/responses", json=body).status_code == 200
        assert theirs.post("/v1/responses", json=body).status_code == 404
