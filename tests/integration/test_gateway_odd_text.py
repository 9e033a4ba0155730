"""NUL characters and lone surrogates, which JSON and URLs can carry and stores refuse: said, on each kind of store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateways import EXAMPLES, live_gateway

NUL = "a\0b"
SURROGATE = "a\ud800b"

KNOWN = {"pool_id": "flan", "name": "films"}
"""Path parameters that name something there is, where another parameter of the path is the odd one."""


@pytest.fixture
def http(tmp_path: Path, database_url: str) -> Iterator[httpx.Client]:
    store = {"url": database_url, "cache_dir": str(tmp_path / "cache")}
    server = {"expert_roots": [str(tmp_path)]}
    with (
        live_gateway(tmp_path, admin_key="root", store=store, server=server) as gateway,
        httpx.Client(base_url=gateway.url, headers={"authorization": "Bearer root"}, timeout=60) as client,
    ):
        yield client


def send(http: httpx.Client, method: str, path: str, body: Any) -> httpx.Response:
    content = json.dumps(body)  # escapes what httpx would refuse to send
    return http.request(method, path, content=content, headers={"content-type": "application/json"})


def urls(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Method and URL of every route, once for each parameter that can hold a NUL."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            in_path = re.findall(r"{(\w+)", path)
            for odd in in_path:
                filled = {name: KNOWN.get(name, "x") for name in in_path} | {odd: "a%00b"}
                yield method, re.sub(r"{(\w+)(:path)?}", lambda match, filled=filled: filled[match[1]], path)
            plain = re.sub(r"{(\w+)(:path)?}", lambda match: KNOWN.get(match[1], "x"), path)
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "query":
                    yield method, f"{plain}?{parameter['name']}=a%00b"


def bodies(odd: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and a body with an odd text in a place that is kept or looked up."""
    cocktail = {"name": "films", "pool": "flan", "examples": EXAMPLES}
    for changes in (
        {"name": odd},
        {"pool": odd},
        {"target": odd},
        {"experts": [odd]},
        {"metadata": {"k": odd}},
        {"metadata": {odd: "v"}},
        {"method": odd},
        {"method_params": {odd: 1}},
        {"merging_weights": {odd: 1.0}, "examples": None},
        {odd: 1},
    ):
        yield "POST", "/v1/cocktails", cocktail | changes
    yield "PATCH", "/v1/cocktails/films", {"current": odd}
    job = {"model": "flan", "training_file": "file-1"}
    for changes in (
        {"model": odd},
        {"training_file": odd},
        {"validation_file": odd},
        {"suffix": odd},
        {"metadata": {"k": odd}},
        {"metadata": {odd: "v"}},
    ):
        yield "POST", "/v1/fine_tuning/jobs", job | changes
    yield "POST", "/admin/keys", {"tenant": odd}
    yield "PUT", "/admin/tenants/acme", {"pools": [odd]}
    yield "POST", "/admin/pools/flan/experts", {"name": odd, "path": "x"}
    yield "POST", "/admin/pools/flan/experts", {"name": "new", "path": odd}
    yield "POST", "/admin/engines/flan", {"pin": odd}
    yield "POST", "/v1/completions", {"model": odd, "prompt": "x"}
    yield "POST", "/v1/embeddings", {"model": odd, "input": "x"}
    yield "POST", "/v1/completions", {"model": "flan", "prompt": "x", "cocktail": cocktail | {"metadata": {"k": odd}}}


def test_each_is_told(http: httpx.Client) -> None:
    asked = [(*url, http.request(*url)) for url in urls(http.get("/openapi.json").json())]
    assert len(asked) > 40
    for odd in (NUL, SURROGATE):
        asked += [(method, path, send(http, method, path, body)) for method, path, body in bodies(odd)]
    wrong = [(method, path, answer.text) for method, path, answer in asked if answer.status_code not in (400, 404)]
    assert not wrong
    assert all(answer.json()["error"]["message"] for _, _, answer in asked)


@pytest.mark.parametrize("query", ["metadata[k]=a%00b", "metadata[a%00b]=v", "%00"])
def test_parameters_without_a_name_of_ours(http: httpx.Client, query: str) -> None:
    answer = http.get(f"/v1/fine_tuning/jobs?{query}")
    assert (answer.status_code, "NUL" in answer.json()["error"]["message"]) == (400, True)


def test_the_name_of_a_file(http: httpx.Client) -> None:
    content = (
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a\0b"\r\n\r\n'
        + json.dumps(EXAMPLES[0]).encode()
        + b"\r\n--B--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=B"}
    answer = http.post("/v1/files", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
    assert http.get("/v1/files").json()["data"] == []


def test_what_models_read_may_hold_a_nul(http: httpx.Client) -> None:
    """It is a character like another to a tokenizer, so examples keep it, and prompts."""
    examples = [*EXAMPLES, {"input": NUL, "output": NUL}]
    made = send(http, "POST", "/v1/cocktails?wait=30", {"name": "films", "pool": "flan", "examples": examples})
    assert made.json()["status"] == "ready"
    assert http.get("/v1/cocktails/films/examples").json()["data"] == examples
    assert send(http, "POST", "/v1/completions", {"model": "films", "prompt": NUL}).status_code == 200
