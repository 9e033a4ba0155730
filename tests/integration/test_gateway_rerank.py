"""`/v1/rerank` over a real socket, on a pico cross-encoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sentence_transformers import CrossEncoder

from tests.gateways import PAIRS, LiveGateway, live_gateway

QUERY = "what is the capital of france"
DOCUMENTS = ["a dog", "paris", "my card was stolen", "the capital of france is paris"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with live_gateway(tmp_path_factory.mktemp("gateway"), reranker=True) as live:
        yield live


@pytest.fixture
def http(live: LiveGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client


def rerank(http: httpx.Client, *, path: str = "/v1/rerank", **fields: Any) -> httpx.Response:
    return http.post(path, json={"model": "ranker", "query": QUERY, "documents": DOCUMENTS, **fields})


def expected(live: LiveGateway, expert: str) -> np.ndarray:
    folder = Path(live.settings.pool("ranker").base.path).parent / expert
    scores: np.ndarray = CrossEncoder(str(folder), device="cpu").predict([(QUERY, text) for text in DOCUMENTS])
    return scores


def scores_of(answer: dict[str, Any]) -> list[float]:
    return [result["relevance_score"] for result in sorted(answer["results"], key=lambda result: result["index"])]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_the_answer_is_vllms(http: httpx.Client, live: LiveGateway, path: str) -> None:
    response = rerank(http, path=path, model="ranker/quora")
    assert response.status_code == 200
    answer = response.json()
    want = expected(live, "quora")
    assert answer.keys() == {"id", "model", "usage", "results"}
    assert answer["model"] == "ranker/quora"
    assert [result["index"] for result in answer["results"]] == np.argsort(-want).tolist()
    assert all(result["document"] == {"text": DOCUMENTS[result["index"]]} for result in answer["results"])
    np.testing.assert_allclose(scores_of(answer), want, rtol=1e-4)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > len(DOCUMENTS) * len(QUERY.split())


def test_ids_are_unique(http: httpx.Client) -> None:
    assert rerank(http).json()["id"] != rerank(http).json()["id"]


def test_top_n_keeps_the_best(http: httpx.Client) -> None:
    everything = rerank(http).json()["results"]
    assert rerank(http, top_n=2).json()["results"] == everything[:2]
    assert rerank(http, top_n=0).json()["results"] == rerank(http, top_n=99).json()["results"] == everything


def test_forms_of_documents(http: httpx.Client) -> None:
    texts = rerank(http).json()["results"]
    assert rerank(http, documents=[{"text": text} for text in DOCUMENTS]).json()["results"] == texts
    assert rerank(http, documents="paris").json()["results"][0]["document"] == {"text": "paris"}
    bare = rerank(http, return_documents=False).json()["results"]
    assert [result.keys() for result in bare] == [{"index", "relevance_score"}] * len(DOCUMENTS)


CLIENTS: dict[str, dict[str, Any]] = {
    "Cohere's v1 Client": {"max_chunks_per_doc": 10, "return_documents": True, "rank_fields": ["text"], "top_n": 4},
    "Cohere's ClientV2": {"top_n": 4, "max_tokens_per_doc": 4096, "priority": 0},
    "Cohere's ClientV2, nulls": {"top_n": None, "max_tokens_per_doc": None, "priority": None},
    "LangChain's CohereRerank": {"top_n": 4, "max_tokens_per_doc": None},
    "Jina": {"top_n": 4, "return_documents": True, "truncation": True},
    "SiliconFlow": {"instruction": "", "top_n": 4, "max_chunks_per_doc": 1024, "overlap_tokens": 80},
    "SiliconFlow, nulls": {"instruction": None, "top_n": None, "max_chunks_per_doc": None, "overlap_tokens": None},
    "Voyage's Client": {"top_k": None, "truncation": True},
    "vLLM": {
        "user": "u",
        "truncate_prompt_tokens": None,
        "padding": "do_not_pad",
        "truncation_side": "right",
        "request_id": None,
        "priority": 0,
        "mm_processor_kwargs": None,
        "cache_salt": "salt",
        "use_activation": None,
        "max_tokens_per_query": 0,
        "max_tokens_per_doc": 0,
        "instruction": None,
        "chat_template_kwargs": None,
        "top_n": 0,
    },
}
"""What clients send beside model, query and documents, as recorded (cohere 5.21, voyageai 0.5, langchain-cohere 0.6) or
documented: none of it changes an answer."""


@pytest.mark.parametrize("fields", CLIENTS.values(), ids=CLIENTS)
def test_the_bodies_of_other_clients(http: httpx.Client, live: LiveGateway, fields: dict[str, Any]) -> None:
    response = rerank(http, **fields)
    assert response.status_code == 200, response.text
    np.testing.assert_allclose(scores_of(response.json()), expected(live, "base"), rtol=1e-4)


def test_where_voyages_client_looks(http: httpx.Client) -> None:
    answer = rerank(http, top_k=2, return_documents=True).json()
    plain = rerank(http, top_n=2).json()
    assert answer["object"] == "list"
    assert answer["results"] == plain["results"]
    assert answer["data"] == [result | {"document": result["document"]["text"]} for result in plain["results"]]
    assert answer["usage"]["total_tokens"] == plain["usage"]["total_tokens"]
    assert not plain.keys() & {"object", "data"}
    assert rerank(http, top_k=None, truncation=True, return_documents=False).json()["data"][0].keys() == {
        "index",
        "relevance_score",
    }


def test_fields_of_documents(http: httpx.Client) -> None:
    """Without rank_fields the text is read; with them, what they name, in their order."""
    documents = [{"text": text, "id": index, "tags": ["a"]} for index, text in enumerate(DOCUMENTS)]
    results = rerank(http, documents=documents).json()["results"]
    plain = rerank(http).json()["results"]
    assert [result["relevance_score"] for result in results] == [result["relevance_score"] for result in plain]
    assert all(result["document"] == documents[result["index"]] for result in results)
    titled = [{"title": "paris", "author": None, "text": "a dog"}, {"title": "a cat"}, "my card"]
    by_hand = ["a dog\nparis", "a cat", "my card"]
    ranked = rerank(http, documents=titled, rank_fields=["text", "author", "title"]).json()["results"]
    wanted = rerank(http, documents=by_hand).json()["results"]
    assert [result["relevance_score"] for result in ranked] == [result["relevance_score"] for result in wanted]
    assert {result["index"]: result["document"] for result in ranked} == {
        0: {"title": "paris", "author": None, "text": "a dog\nparis"},
        1: {"title": "a cat", "text": "a cat"},
        2: {"text": "my card"},
    }


def test_documents_and_query_are_cut_each_for_itself(http: httpx.Client) -> None:
    """One word is one token of the pico tokenizer."""
    cut = rerank(http, max_tokens_per_doc=2).json()
    by_hand = rerank(http, documents=["a dog", "paris", "my card", "the capital"]).json()
    assert scores_of(cut) == scores_of(by_hand) != scores_of(rerank(http).json())
    assert cut["usage"] == by_hand["usage"]
    assert cut["results"][0]["document"]["text"] in DOCUMENTS
    cut = rerank(http, max_tokens_per_query=3).json()
    assert scores_of(cut) == scores_of(rerank(http, query="what is the").json())
    assert rerank(http, documents=["dog " * 200], max_tokens_per_doc=50).json()["usage"]["prompt_tokens"] == 59


def test_logits_on_request(http: httpx.Client) -> None:
    logits = np.array(scores_of(rerank(http, use_activation=False).json()))
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), scores_of(rerank(http).json()), rtol=1e-5)


def test_a_cocktail_by_examples_answers_by_its_mixture(http: httpx.Client) -> None:
    body = {"name": "faq", "pool": "ranker", "examples": PAIRS, "temperature": 0.5}
    made = http.post("/v1/cocktails?wait=30", json=body).json()
    assert made["status"] == "ready"
    assert made["kind"] == "reranker"
    assert made["losses"].keys() == made["merging_weights"].keys() == {"base", "hotpotqa", "quora"}
    assert len(set(made["losses"].values())) == 3
    answer = rerank(http, model="faq").json()
    assert answer["model"] == made["id"]
    by_hand = {"name": "by-hand", "pool": "ranker", "merging_weights": made["merging_weights"]}
    assert http.post("/v1/cocktails?wait=30", json=by_hand).status_code == 201
    assert scores_of(rerank(http, model="by-hand").json()) == scores_of(answer)
    assert scores_of(rerank(http).json()) != scores_of(answer)


def test_an_inline_cocktail(http: httpx.Client, live: LiveGateway) -> None:
    answer = rerank(http, cocktail={"merging_weights": {"quora": 1.0}}).json()
    np.testing.assert_allclose(scores_of(answer), expected(live, "quora"), rtol=1e-4)
    assert answer["model"].startswith("ranker@")
    assert scores_of(rerank(http, model=answer["model"]).json()) == scores_of(answer)


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"documents": []}, 400, "invalid_request", "documents"),
        ({"documents": ["a", ""]}, 400, "invalid_request", "documents.1"),
        ({"documents": ["a", 1]}, 400, "invalid_request", "documents.1"),
        ({"documents": [{"text": "a", "image": "b"}]}, 400, "invalid_request", "documents.0"),
        ({"documents": None}, 400, "invalid_request", "documents.0"),
        ({"documents": ["a"] * 2049}, 400, "invalid_request", "documents"),
        ({"query": ""}, 400, "invalid_request", "query"),
        ({"query": ["a"]}, 400, "invalid_request", "query"),
        ({"top_n": -1}, 400, "invalid_request", "top_n"),
        ({"priority": 1}, 400, "invalid_request", "priority"),
        ({"priority": False}, 400, "invalid_request", "priority"),
        ({"request_id": "mine"}, 400, "invalid_request", "request_id"),
        ({"instruction": "find"}, 400, "invalid_request", "instruction"),
        ({"truncation_side": "left"}, 400, "invalid_request", "truncation_side"),
        ({"chat_template_kwargs": {"a": 1}}, 400, "invalid_request", "chat_template_kwargs"),
        ({"top_n": 2, "top_k": 3}, 400, "invalid_request", "top_k"),
        ({"max_tokens_per_doc": -1}, 400, "invalid_request", "max_tokens_per_doc"),
        ({"max_chunks_per_doc": 0}, 400, "invalid_request", "max_chunks_per_doc"),
        ({"rank_fields": []}, 400, "invalid_request", "rank_fields"),
        ({"rank_fields": ["title"], "documents": [{"text": "a"}]}, 400, "invalid_request", "documents.0"),
        ({"documents": [{"title": "a"}]}, 400, "invalid_request", "documents.0"),
        ({"documents": [{"text": 1}]}, 400, "invalid_request", "documents.0.text"),
        ({"documents": [{"content": [{"type": "text", "text": "a"}]}]}, 400, "invalid_request", "documents.0"),
        ({"not_documented": 1}, 400, "invalid_request", "not_documented"),
        ({"documents": ["a", "dog " * 200]}, 400, "context_length_exceeded", "documents.1"),
        ({"truncate_prompt_tokens": 1000}, 400, "invalid_request", "truncate_prompt_tokens"),
        ({"model": "flan"}, 400, "wrong_model_kind", "model"),
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"cocktail": {"examples": [{"query": "q", "pos": ["p"]}]}}, 400, "invalid_examples", "cocktail.examples"),
    ],
)
def test_errors(http: httpx.Client, fields: dict[str, Any], status: int, code: str, param: str) -> None:
    response = rerank(http, **fields)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]


def test_too_long_is_cut_on_request(http: httpx.Client) -> None:
    answer = rerank(http, documents=["dog " * 200], truncate_prompt_tokens=-1).json()
    assert answer["usage"]["prompt_tokens"] == 128
    assert rerank(http, documents=["dog " * 200], truncate_prompt_tokens=20).json()["usage"]["prompt_tokens"] == 20
    assert rerank(http, documents=["dog " * 200], truncation=True).json() | {"id": ""} == answer | {"id": ""}
    assert rerank(http, documents=["dog " * 200], truncation=False).status_code == 400


def test_other_routes_say_where_a_reranker_answers(http: httpx.Client) -> None:
    response = http.post("/v1/embeddings", json={"model": "ranker", "input": "a"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "wrong_model_kind"
    assert "/v1/rerank" in response.json()["error"]["message"]


def test_metrics_and_document(http: httpx.Client) -> None:
    before = rerank(http).json()["usage"]["prompt_tokens"]
    lines = http.get("/metrics").text.splitlines()
    tokens = next(line for line in lines if line.startswith('cocktail_tokens_total{direction="in",pool="ranker"}'))
    assert float(tokens.split()[-1]) >= before
    assert any('route="/v1/rerank",status="200"' in line for line in lines)
    document = http.get("/openapi.json").json()
    body = document["paths"]["/v1/rerank"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/RerankRequest"}
    assert "documents" in document["components"]["schemas"]["RerankRequest"]["required"]
