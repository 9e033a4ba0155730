"""What Open WebUI sends, with its headers and bodies, and what it reads of the answers (docs/how-to/open-webui.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.gateways import LiveGateway, live_gateway

HEADERS = {
    "Authorization": "Bearer none",
    "Content-Type": "application/json",
    "X-OpenWebUI-User-Name": "Ada",
    "X-OpenWebUI-User-Id": "1",
    "X-OpenWebUI-User-Email": "ada@example.com",
    "X-OpenWebUI-User-Role": "user",
}


@pytest.fixture
def http(gateway: LiveGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.base_url, headers=HEADERS, timeout=60) as client:
        yield client


def test_the_list(http: httpx.Client) -> None:
    listed = http.get("/models").json()["data"]
    assert all(model["id"] and model.get("name", "") is not None for model in listed)
    chat = [model["id"] for model in listed if model["type"] == "chat"]
    assert {"flan", "flan/nq"} <= set(chat)
    assert not [name for name in chat if name.startswith("bge")]


def test_a_chat(http: httpx.Client) -> None:
    body = {
        "stream": True,
        "model": "flan/nq",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        "max_tokens": 5,
        "stream_options": {"include_usage": True},
    }
    with http.stream("POST", "/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events.pop() == "[DONE]"
    *chunks, last = map(json.loads, events)
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 5)


def test_a_title(http: httpx.Client) -> None:
    body = {
        "model": "flan",
        "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title as JSON."}],
        "stream": False,
        "max_completion_tokens": 20,
    }
    answer = http.post("/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]


def test_embeddings(http: httpx.Client) -> None:
    answer = http.post("/embeddings", json={"input": ["a dog", "my card was stolen"], "model": "bge/quora"})
    assert [len(row["embedding"]) for row in answer.json()["data"]] == [32, 32]


def test_reranking(tmp_path: Path) -> None:
    with live_gateway(tmp_path, reranker=True) as live:
        documents = ["a cat", "a dog", "a bird"]
        body = {"model": "ranker/quora", "query": "dog", "documents": documents, "top_n": len(documents)}
        results = httpx.post(f"{live.base_url}/rerank", json=body, headers=HEADERS, timeout=60).json()["results"]
    assert sorted(result["index"] for result in results) == [0, 1, 2]
    assert all(isinstance(result["relevance_score"], float) for result in results)
