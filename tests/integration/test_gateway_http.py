"""What the gateway says over HTTP beyond what the official client looks at, all of it held against the document."""

from __future__ import annotations

import json
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from cocktail_serve.config import Settings
from cocktail_serve.errors import ConfigError
from cocktail_serve.gateway.app import create_app
from tests.gateways import EXAMPLES, PAIRS, LiveGateway, assert_same_embeddings, live_gateway, make_settings

MESSAGES = [{"role": "user", "content": "what is the capital of france"}]


def check_documented(document: dict[str, Any]) -> Callable[[httpx.Response], None]:
    """Fails on a status that the OpenAPI document does not have for its route, and on an error of another shape."""
    patterns = [
        (re.compile(re.sub(r"\\{model_id\\}", ".+", re.sub(r"\\{(ref|name)\\}", "[^/]+", re.escape(path)))), operations)
        for path, operations in document["paths"].items()
    ]

    def check(response: httpx.Response) -> None:
        response.read()
        if response.status_code >= 400 and response.request.url.path != "/ready":
            assert set(response.json()) == {"error"}
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        for pattern, operations in patterns:
            operation = operations.get(response.request.method.lower())
            if operation is not None and pattern.fullmatch(response.request.url.path):
                assert str(response.status_code) in operation["responses"], (
                    response.request.method,
                    response.request.url.path,
                    response.status_code,
                )
                return
        assert response.status_code in (404, 405), "a route that the document lacks"

    return check


@pytest.fixture(scope="module")
def http(gateway: LiveGateway) -> Iterator[httpx.Client]:
    hooks = {"response": [check_documented(gateway.app.openapi())]}
    with httpx.Client(base_url=gateway.url, timeout=60, event_hooks=hooks) as client:
        yield client


def test_an_engine_is_looked_up_as_what_it_is(gateway: LiveGateway) -> None:
    state = gateway.app.state.gateway
    assert state.decoders["flan"] is state.engine("flan")
    assert state.encoders["bge"] is state.engine("bge")
    for engines, pool_id in ((state.decoders, "bge"), (state.encoders, "flan"), (state.rerankers, "bge")):
        with pytest.raises(KeyError, match=pool_id):
            engines[pool_id]


def until_reported(http: httpx.Client, ref: str) -> dict[str, Any]:
    """The report once what is found out in the background is there."""
    deadline = time.monotonic() + 30
    while True:
        report: dict[str, Any] = http.get(f"/v1/cocktails/{ref}/report").json()
        if report["report_status"] == "ready":
            return report
        assert time.monotonic() < deadline
        time.sleep(0.05)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


def make(http: httpx.Client, name: str | None = None, *, wait: float = 30, **fields: Any) -> httpx.Response:
    body = {"name": name or f"n{uuid.uuid4().hex[:12]}", "pool": "flan", "examples": EXAMPLES} | fields
    body = {key: value for key, value in body.items() if value is not ...}
    return http.post("/v1/cocktails", params={"wait": wait}, json=body)


class TestCocktails:
    def test_new_and_ready_is_201(self, http: httpx.Client) -> None:
        response = make(http, "bank-intents", temperature=0.5, metadata={"team": "bank"})
        cocktail = response.json()
        assert response.status_code == 201
        assert response.headers["location"] == f"/v1/cocktails/{cocktail['id']}"
        assert re.fullmatch(r"bank-intents@[0-9a-f]{8}", cocktail["id"])
        assert cocktail["object"] == "cocktail"
        assert (cocktail["pool"], cocktail["kind"], cocktail["current"]) == ("flan", "decoder", True)
        assert (cocktail["status"], cocktail["progress"], cocktail["error"]) == ("ready", 1.0, None)
        assert list(cocktail["losses"]) == list(cocktail["merging_weights"]) == ["base", "ag-news", "nq"]
        assert sum(cocktail["merging_weights"].values()) == pytest.approx(1.0, abs=1e-9)
        assert cocktail["temperature"] == 0.5
        assert cocktail["weighting"] == "softmax"
        assert len(cocktail["recipe"]["digest"]) == 64
        assert cocktail["metadata"] == {"team": "bank"}
        assert isinstance(cocktail["created_at"], int)
        assert http.get(response.headers["location"]).json() == cocktail

    def test_the_same_again_is_200(self, http: httpx.Client) -> None:
        first = make(http, "same-again")
        again = make(http, "same-again")
        assert (first.status_code, again.status_code) == (201, 200)
        assert again.json()["id"] == first.json()["id"]

    def test_without_waiting_it_is_202(self, http: httpx.Client) -> None:
        response = make(http, "unwaited", wait=0)
        assert response.status_code == 202
        assert response.json()["status"] in ("queued", "scoring", "mixing")
        assert response.headers["location"].startswith("/v1/cocktails/unwaited@")

    def test_dry_run_keeps_nothing(self, http: httpx.Client) -> None:
        body = {"name": "dry", "pool": "flan", "examples": EXAMPLES}
        response = http.post("/v1/cocktails", params={"dry_run": "true"}, json=body)
        assert response.status_code == 200
        assert set(response.json()) == {"object", "losses", "merging_weights", "entropy", "candidates"}
        assert list(response.json()["losses"]) == ["base", "ag-news", "nq"]
        assert http.get("/v1/cocktails/dry").status_code == 404

    @pytest.mark.parametrize("pool", ["flan", "bge"])
    def test_search_lists_its_candidates(self, http: httpx.Client, pool: str) -> None:
        examples = EXAMPLES if pool == "flan" else PAIRS
        body = {"name": f"searched-{pool}", "pool": pool, "examples": examples, "weighting": "search"}
        made = http.post("/v1/cocktails", params={"wait": 60}, json=body).json()
        assert made["status"] == "ready"
        (chosen,) = [candidate for candidate in made["candidates"] if candidate["chosen"]]
        assert chosen["loss"] == min(candidate["loss"] for candidate in made["candidates"])
        assert (made["temperature"], made["merging_weights"]) == (chosen["temperature"], chosen["merging_weights"])
        assert made["mixed_loss"] is not None
        dry = http.post("/v1/cocktails", params={"dry_run": "true"}, json=body).json()
        assert dry["candidates"] == made["candidates"]

    def test_versions_and_which_is_current(self, http: httpx.Client) -> None:
        old = make(http, "versions", temperature=1.0).json()["id"]
        new = make(http, "versions", temperature=2.0).json()["id"]
        listed = http.get("/v1/cocktails", params={"name": "versions"}).json()
        assert listed["object"] == "list"
        assert [cocktail["id"] for cocktail in listed["data"]] == [new, old]
        assert http.get("/v1/cocktails/versions").json()["id"] == new
        pinned = http.patch("/v1/cocktails/versions", json={"current": old})
        assert pinned.json()["id"] == old
        assert http.get("/v1/cocktails/versions").json()["id"] == old
        assert http.patch("/v1/cocktails/versions", json={"current": None}).json()["id"] == new
        assert http.patch("/v1/cocktails/versions", json={"current": "versions@00000000"}).status_code == 404
        assert http.patch("/v1/cocktails/versions", json={}).status_code == 400
        assert error_of(http.patch("/v1/cocktails/versions", json={"curent": old}))["param"] == "current"

    def test_parts(self, http: httpx.Client) -> None:
        cocktail = make(http, "parts").json()
        for ref in ("parts", cocktail["id"], quote(cocktail["id"], safe="")):
            recipe = http.get(f"/v1/cocktails/{ref}/recipe").json()
            assert recipe == cocktail["recipe"]
            assert http.get(f"/v1/cocktails/{ref}/examples").json()["data"] == EXAMPLES
            report = http.get(f"/v1/cocktails/{ref}/report").json()
            assert {model["model"]: model["merging_weight"] for model in report["models"]} == cocktail[
                "merging_weights"
            ]
            weights = [model["merging_weight"] for model in report["models"]]
            assert weights == sorted(weights, reverse=True)
            assert 1.0 <= report["effective_models"] <= 3.0 + 1e-9
            report = until_reported(http, ref)
            assert (report["advice"] is None) == (report["held_out_loss"] is None)
            assert report["verdict"]

    @pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
    @pytest.mark.parametrize(
        ("pool", "path", "asked"),
        [
            ("flan", "chat/completions", {"messages": MESSAGES}),
            ("bge", "embeddings", {"input": "my card was stolen"}),
        ],
    )
    def test_other_methods(self, http: httpx.Client, pool: str, path: str, asked: dict[str, Any], method: str) -> None:
        """Made, shown with their parameters, and served: by name and inline."""
        fields = {
            "pool": pool,
            "examples": EXAMPLES if pool == "flan" else PAIRS,
            "method": method,
            "method_params": {"lambda": 0.5},
            "temperature": 1.0,
        }
        cocktail = make(http, f"{pool}-{method.replace('_', '-')}", **fields).json()
        assert cocktail["status"] == "ready", cocktail
        assert (cocktail["method"], cocktail["method_params"]["lambda"]) == (method, 0.5)
        recipe = http.get(f"/v1/cocktails/{cocktail['id']}/recipe").json()
        assert (recipe["method"], recipe["method_params"]) == (method, cocktail["method_params"])
        assert cocktail["merging_weights"]["base"] == 1.0
        answer = http.post(f"/v1/{path}", json={"model": cocktail["id"], **asked})
        assert answer.status_code == 200, answer.text
        inline = {key: value for key, value in fields.items() if key != "pool"}
        same = http.post(f"/v1/{path}", json={"model": pool, "cocktail": inline, **asked})
        assert same.status_code == 200, same.text
        assert same.json()["model"] == f"{pool}@{cocktail['id'].partition('@')[2]}"
        for key in {"choices", "data"} & set(answer.json()):
            assert same.json()[key] == answer.json()[key]

    def test_deletion(self, http: httpx.Client) -> None:
        first = make(http, "deleted", temperature=1.0).json()["id"]
        make(http, "deleted", temperature=2.0)
        assert http.delete(f"/v1/cocktails/{first}").json() == {"id": first, "object": "cocktail", "deleted": True}
        assert http.get(f"/v1/cocktails/{first}").status_code == 404
        assert http.get("/v1/cocktails/deleted").status_code == 200
        assert http.delete("/v1/cocktails/deleted").status_code == 200
        assert http.get("/v1/cocktails/deleted").status_code == 404
        assert http.delete("/v1/cocktails/deleted").status_code == 404
        assert http.delete("/v1/cocktails/flan").status_code == 403
        gone = http.post("/v1/chat/completions", json={"model": first, "messages": MESSAGES})
        assert error_of(gone)["code"] == "model_not_found"

    @pytest.mark.parametrize(
        ("fields", "status", "param"),
        [
            ({"examples": []}, 400, "examples"),
            ({"examples": [{"input": "x"}]}, 400, "examples"),
            ({"examples": [{"input": "word " * 500, "output": "y"}]}, 400, "examples"),
            ({"examples": PAIRS}, 400, "examples"),
            ({"pool": "none"}, 404, "pool"),
            ({"target": "none"}, 404, "target"),
            ({"experts": ["none"]}, 404, "experts.0"),
            ({"name": "flan"}, 409, "name"),
            ({"name": "Not A Name"}, 400, "name"),
            ({"alpha": 1.5, "target": "nq"}, 400, "alpha"),
            ({"temperature": 0}, 400, "temperature"),
            ({"unknown": 1}, 400, "unknown"),
            ({"method": "fisher"}, 400, "method"),
            ({"method": "ties", "method_params": {"density": 1.5}}, 400, "method_params.density"),
            ({"method": "slerp"}, 400, "experts"),
            ({"examples": ..., "method": "ties", "merging_weights": {"base": 0.5}}, 400, "merging_weights.base"),
            ({"examples": ..., "merging_weights": {"base": 0.5}}, 400, "merging_weights"),
            ({"merging_weights": {"base": 1.0}}, 400, "examples"),
            ({"pool": ...}, 400, "pool"),
        ],
        ids=lambda value: json.dumps(value, default=str)[:40] if isinstance(value, dict) else "",
    )
    def test_bad_requests(self, http: httpx.Client, fields: dict[str, Any], status: int, param: str) -> None:
        name = f"bad-{uuid.uuid4().hex[:12]}"
        response = make(http, **{"name": name, **fields})
        assert response.status_code == status, response.text
        assert error_of(response)["param"] == param
        assert http.get(f"/v1/cocktails/{name}").status_code == 404
        if status == 409:
            assert response.headers["x-should-retry"] == "false"

    @pytest.mark.parametrize("query", ["wait=61", "wait=-1", "wait=x", "wait=nan", "dry_run=perhaps"])
    def test_bad_queries_are_400(self, http: httpx.Client, query: str) -> None:
        response = http.post(f"/v1/cocktails?{query}", json={"name": "q", "pool": "flan", "examples": EXAMPLES})
        assert response.status_code == 400
        assert error_of(response)["param"] == query.partition("=")[0]


class TestModels:
    @pytest.mark.parametrize("path", ["flan/nq", "flan%2Fnq", "flan%2fnq"])
    def test_ids_raw_and_encoded(self, http: httpx.Client, path: str) -> None:
        assert http.get(f"/v1/models/{path}").json()["id"] == "flan/nq"

    def test_versions_raw_and_encoded(self, http: httpx.Client) -> None:
        version = make(http, "encoded").json()["id"]
        for path in (version, quote(version, safe="")):
            model = http.get(f"/v1/models/{path}").json()
            assert (model["id"], model["owned_by"], model["pool"]) == (version, "default", "flan")
        assert http.delete(f"/v1/models/{quote(version, safe='')}").json()["deleted"] is True
        assert http.get(f"/v1/models/{version}").status_code == 404

    def test_what_the_operator_owns_stays(self, http: httpx.Client) -> None:
        for model in ("flan", "flan%2Fnq", "bge/quora"):
            response = http.delete(f"/v1/models/{model}")
            assert response.status_code == 403
        assert error_of(http.delete("/v1/models/none"))["code"] == "model_not_found"


class TestGeneration:
    def test_answers_are_in_one_shape(self, http: httpx.Client) -> None:
        response = http.post("/v1/chat/completions", json={"model": "flan", "messages": []})
        assert response.status_code == 400
        assert error_of(response)["type"] == "invalid_request_error"

    @pytest.mark.parametrize("model", [None, "", 7, ["flan"]])
    def test_model_is_required(self, http: httpx.Client, model: Any) -> None:
        response = http.post("/v1/chat/completions", json={"model": model, "messages": MESSAGES})
        assert response.status_code == 400
        assert error_of(response)["param"] == "model"

    def test_inline_on_what_is_no_pool(self, http: httpx.Client) -> None:
        inline = {"examples": EXAMPLES}
        for model in ("flan/nq", "none"):
            body = {"model": model, "messages": MESSAGES, "cocktail": inline}
            response = http.post("/v1/chat/completions", json=body)
            assert (response.status_code, error_of(response)["param"]) == (404, "model")
        body = {"model": "bge", "messages": MESSAGES, "cocktail": inline}
        assert error_of(http.post("/v1/chat/completions", json=body))["code"] == "wrong_model_kind"

    @pytest.mark.parametrize(
        ("inline", "param"),
        [
            ({}, "cocktail.examples"),
            ("x", "cocktail"),
            ({"examples": []}, "cocktail.examples"),
            ({"name": "x", "examples": EXAMPLES}, "cocktail.name"),
            ({"examples": EXAMPLES, "experts": ["none"]}, "cocktail.experts.0"),
            ({"examples": EXAMPLES, "method": "ties", "method_params": {"k": 20}}, "cocktail.method_params.k"),
        ],
    )
    def test_bad_inline_cocktails(self, http: httpx.Client, inline: Any, param: str) -> None:
        body = {"model": "flan", "messages": MESSAGES, "cocktail": inline}
        assert error_of(http.post("/v1/chat/completions", json=body))["param"] == param

    def test_a_cocktail_in_the_making_is_503(self, http: httpx.Client) -> None:
        version = make(http, "in-the-making", wait=0, temperature=3.3).json()["id"]
        response = http.post("/v1/chat/completions", json={"model": version, "messages": MESSAGES})
        # it may have become ready in between, on a fast machine
        assert response.status_code in (200, 503)
        if response.status_code == 503:
            assert error_of(response)["code"] == "model_not_ready"
            assert 1 <= int(response.headers["retry-after"]) <= 120

    def test_client_salts_do_not_change_answers(self, http: httpx.Client) -> None:
        body = {"model": "flan", "messages": MESSAGES, "max_tokens": 4}
        plain = http.post("/v1/chat/completions", json=body)
        salted = http.post("/v1/chat/completions", json=body | {"cache_salt": "team@a/b"})
        assert plain.json()["choices"] == salted.json()["choices"]

    @pytest.mark.parametrize(
        ("content", "content_type"),
        [
            (b'{"model": "flan"', "application/json"),
            (b'{"model": NaN}', "application/json"),
            (b"[]", "application/json"),
            (b"", "application/json"),
            (b'{"a":' * 5000 + b"1" + b"}" * 5000, "application/json"),
            (b'{"model": "flan"}', "text/plain"),
        ],
        ids=["cut", "nan", "array", "empty", "deep", "text"],
    )
    def test_malformed_bodies_are_400(self, http: httpx.Client, content: bytes, content_type: str) -> None:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/cocktails"):
            response = http.post(path, content=content, headers={"content-type": content_type})
            assert response.status_code == 400, response.text


class TestEmbeddings:
    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"unknown": 1}, "unknown"),
            ({"encoding_format": "hex"}, "encoding_format"),
            ({"dimensions": 0}, "dimensions"),
            ({"dimensions": 12}, "dimensions"),
            ({"dimensions": True}, "dimensions"),
            ({"prompt_name": "none"}, "prompt_name"),
            ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
            ({"truncate_prompt_tokens": 4096}, "truncate_prompt_tokens"),
            ({"input": None}, "input"),
            ({"input": ["a", None]}, "input.1"),
        ],
    )
    def test_bad_fields(self, http: httpx.Client, fields: dict[str, Any], param: str) -> None:
        response = http.post("/v1/embeddings", json={"model": "bge", "input": "paris"} | fields)
        assert response.status_code == 400
        assert error_of(response)["param"] == param

    @pytest.mark.parametrize(
        ("fields", "same_as"),
        [
            ({"embedding_type": "float", "late_chunking": False, "truncate": True, "normalized": None}, {}),
            ({"task": "query"}, {"prompt_name": "query"}),
            (
                {"input_type": "query", "output_dimension": 16, "truncation": True},
                {"prompt_name": "query", "dimensions": 16},
            ),
            ({"input_type": None, "output_dimension": None, "output_dtype": None, "truncation": True}, {}),
            ({"output_dtype": "float", "encoding_format": "float", "embedding_type": "float"}, {}),
            ({"embedding_type": "base64"}, {"encoding_format": "base64"}),
            (
                {
                    "user": "u",
                    "truncation_side": "right",
                    "padding": "do_not_pad",
                    "request_id": None,
                    "priority": 0,
                    "mm_processor_kwargs": None,
                    "cache_salt": "salt",
                    "add_special_tokens": True,
                    "embed_dtype": "float32",
                    "endianness": "native",
                    "use_activation": True,
                },
                {},
            ),
        ],
        ids=["jina", "jina task", "voyage", "voyage nulls", "both names", "jina base64", "vllm"],
    )
    def test_fields_of_other_clients(self, http: httpx.Client, fields: dict[str, Any], same_as: dict[str, Any]) -> None:
        response = http.post("/v1/embeddings", json={"model": "bge", "input": "paris"} | fields)
        assert response.status_code == 200, response.text
        other = http.post("/v1/embeddings", json={"model": "bge", "input": "paris"} | same_as)
        assert_same_embeddings(response.json(), other.json())

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"priority": 3}, "priority"),
            ({"request_id": "mine"}, "request_id"),
            ({"input_type": "document"}, "input_type"),
            ({"task": "text-matching"}, "task"),
            ({"prompt_name": "query", "task": "document"}, "task"),
            ({"dimensions": 16, "output_dimension": 8}, "output_dimension"),
            ({"output_dimension": 12}, "output_dimension"),
            ({"output_dtype": "int8"}, "output_dtype"),
            ({"normalized": True}, "normalized"),
            ({"add_special_tokens": False}, "add_special_tokens"),
            ({"late_chunking": True}, "late_chunking"),
            ({"return_multivector": True}, "return_multivector"),
            ({"endianness": "big"}, "endianness"),
            ({"use_activation": False}, "use_activation"),
        ],
    )
    def test_what_would_change_the_answer_is_refused_by_name(
        self, http: httpx.Client, fields: dict[str, Any], param: str
    ) -> None:
        response = http.post("/v1/embeddings", json={"model": "bge", "input": "paris"} | fields)
        assert (response.status_code, error_of(response)["param"]) == (400, param)

    def test_nulls_are_as_good_as_absent(self, http: httpx.Client) -> None:
        nulls = dict.fromkeys(["encoding_format", "dimensions", "user", "truncate_prompt_tokens", "prompt_name"])
        response = http.post("/v1/embeddings", json={"model": "bge", "input": "paris", "cocktail": None} | nulls)
        assert len(response.json()["data"][0]["embedding"]) == 32


class TestOperations:
    @pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/flan/nq", "/v1/none"])
    def test_head_is_get_without_the_body(self, http: httpx.Client, gateway: LiveGateway, path: str) -> None:
        got = http.get(path)
        asked = httpx.head(f"{gateway.url}{path}")
        assert (asked.status_code, asked.content) == (got.status_code, b"")
        assert asked.headers["content-type"] == got.headers["content-type"]
        assert int(asked.headers["content-length"]) > 0
        if path not in ("/metrics", "/ready"):  # what those say changes from moment to moment
            assert asked.headers["content-length"] == got.headers["content-length"]
        assert asked.headers["x-request-id"] != got.headers["x-request-id"]

    def test_head_is_not_post(self, gateway: LiveGateway) -> None:
        refused = httpx.head(f"{gateway.url}/v1/embeddings")
        assert (refused.status_code, refused.headers["allow"], refused.content) == (405, "POST", b"")

    def test_head_is_counted_by_its_route(self, http: httpx.Client, gateway: LiveGateway) -> None:
        httpx.head(f"{gateway.url}/v1/models/flan")
        assert 'route="/v1/models/{model_id:path}",status="200"' in http.get("/metrics").text

    def test_health(self, http: httpx.Client) -> None:
        assert http.get("/health").json()["status"] == "ok"

    def test_ready(self, http: httpx.Client) -> None:
        ready = http.get("/ready").json()
        assert ready["status"] == "ready"
        assert set(ready["pools"]) == {"flan", "bge"}
        assert ready["pools"]["flan"]["state"] == "ready"
        assert "resident" in ready["pools"]["flan"]

    def test_pools(self, http: httpx.Client, gateway: LiveGateway) -> None:
        response = http.get("/v1/pools")
        pools = {pool["id"]: pool for pool in response.json()["data"]}
        assert list(pools) == ["bge", "flan"]
        assert pools["flan"]["experts"]["nq"]["id"] == "flan/nq"
        assert pools["bge"]["dtype"] == "float32"
        assert gateway.settings.pool("bge").base.path not in response.text

    def test_metrics(self, http: httpx.Client) -> None:
        http.post("/v1/chat/completions", json={"model": "flan/nq", "messages": MESSAGES, "max_tokens": 3})
        http.post("/v1/embeddings", json={"model": "bge", "input": "paris"})
        http.get("/v1/models/some/thing")
        text = http.get("/metrics").text
        for line in (
            r'cocktail_requests_total\{pool="flan",route="/v1/chat/completions",status="200"\} \d',
            r'cocktail_requests_total\{pool="",route="/v1/models/\{model_id:path\}",status="404"\} \d',
            r'cocktail_tokens_total\{direction="out",pool="flan"\} [1-9]',
            r'cocktail_tokens_total\{direction="in",pool="bge"\} [1-9]',
            r'cocktail_time_to_first_token_seconds_count\{pool="flan"\} [1-9]',
            r'cocktail_queue_wait_seconds_count\{pool="flan",replica="0"\} [1-9]',
            r'cocktail_swap_seconds_count\{pool="flan",replica="0"\} [1-9]',
            r'cocktail_swaps_total\{pool="flan",replica="0",source="\w+"\} [1-9]',
            r'cocktail_engine_ready\{pool="bge",replica="0"\} 1',
            r'cocktail_cache_bytes\{pool="bge",replica="0"\} \d',
            r'cocktail_mixing_path\{kernel="none",path="fake",pool="flan",replica="0"\} 1',
            r'cocktail_captured_experts\{pool="flan",replica="0"\} 0',
            r'cocktail_jobs\{status="ready"\} \d',
        ):
            assert re.search(line, text), line

    def test_docs(self, gateway: LiveGateway) -> None:
        assert "openapi.json" in httpx.get(f"{gateway.url}/docs").text
        assert httpx.get(f"{gateway.url}/openapi.json").json() == gateway.app.openapi()

    def test_request_ids(self, http: httpx.Client) -> None:
        assert http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        first, second = (http.get("/v1/none").headers["x-request-id"] for _ in range(2))
        assert first.startswith("req_")
        assert first != second

    def test_unknown_routes_and_methods(self, http: httpx.Client) -> None:
        missing = http.get("/v1/none")
        assert (missing.status_code, error_of(missing)["code"]) == (404, "route_not_found")
        wrong = http.get("/v1/chat/completions")
        assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"

    @pytest.mark.parametrize("path", ["/v1/cocktails/", "/v1/files/", "/v1/cocktails/x/", "/admin/keys/", "/health/"])
    def test_nobody_is_sent_elsewhere(self, http: httpx.Client, path: str) -> None:
        missing = http.get(path)
        assert (missing.status_code, error_of(missing)["code"]) == (404, "route_not_found")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway that asks for a key and takes small bodies only."""
    server = {"auth": "required", "max_request_bytes": 4096}
    with live_gateway(tmp_path_factory.mktemp("guarded"), server=server, admin_key="clé-secrète") as live:
        yield live


class TestLimitsAndKeys:
    def test_keys(self, guarded: LiveGateway) -> None:
        with httpx.Client(base_url=guarded.url) as http:
            for headers in (
                {},
                {"authorization": "Bearer"},
                {"authorization": "Bearer wrong"},
                {"authorization": "Basic clé-secrète".encode()},
                {"authorization": b"Bearer \xff\xfe"},
            ):
                response = http.get("/v1/models", headers=headers)
                assert response.status_code == 401
                assert error_of(response)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
            right = {"authorization": "Bearer clé-secrète".encode()}
            assert http.get("/v1/models", headers=right).status_code == 200
            assert http.get("/health").status_code == 200
            assert http.get("/metrics").status_code == 200

    def test_the_document_says_what_needs_a_key(self, guarded: LiveGateway) -> None:
        needs, asks = {}, {}
        with httpx.Client(base_url=guarded.url) as http:
            for path, operations in http.get("/openapi.json").json()["paths"].items():
                for method, operation in operations.items():
                    needs[method, path] = bool(operation.get("security"))
                    answer = http.request(method, re.sub(r"\{[^}]*\}", "some", path), json={})
                    asks[method, path] = answer.status_code == 401
        assert needs == asks
        assert needs["post", "/tokenize"]
        assert not needs["get", "/health"]

    def test_a_key_is_checked_before_the_body_is_read(self, guarded: LiveGateway) -> None:
        assert httpx.post(f"{guarded.url}/v1/chat/completions", content=b"{").status_code == 401
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", int(guarded.url.rpartition(":")[2])), timeout=30) as client:
            # a body is promised, and none of it ever sent
            client.sendall(f"{head}content-length: 1000\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 401")

    @pytest.mark.parametrize("chunked", [True, False])
    def test_bodies_over_the_limit(self, guarded: LiveGateway, chunked: bool) -> None:
        body = json.dumps({"model": "flan", "messages": MESSAGES, "user": "x" * 5000}).encode()

        def pieces() -> Iterator[bytes]:
            for start in range(0, len(body), 512):
                yield body[start : start + 512]

        headers = {"authorization": "Bearer clé-secrète".encode(), "content-type": "application/json"}
        with httpx.Client(base_url=guarded.url) as http:
            content = pieces() if chunked else body
            response = http.post("/v1/chat/completions", content=content, headers=headers)
            assert response.status_code == 413
            assert error_of(response)["code"] == "payload_too_large"
            assert http.get("/health").status_code == 200

    def test_no_key_no_server(self, tmp_path: Path) -> None:
        settings = make_settings(tmp_path, server={"auth": "required"})
        with pytest.raises(ConfigError, match="COCKTAIL_ADMIN_KEY"):
            create_app(settings)
        exposed = settings.server.model_copy(update={"auth": "auto", "host": "0.0.0.0"})
        with pytest.raises(ConfigError, match="COCKTAIL_ADMIN_KEY"):
            create_app(Settings.model_validate(settings.model_dump() | {"server": exposed}))
