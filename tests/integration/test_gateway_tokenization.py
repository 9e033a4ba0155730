"""`/tokenize` and `/detokenize` over real sockets: of every kind of pool, whoever asks, whatever fields are sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.gateways import EXAMPLES, live_gateway
from tests.tenants import MESSAGES, Tenants, code_of, guarded_gateway, make

TEXT = "what is the capital of france"
INLINE = {"examples": EXAMPLES}


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    with guarded_gateway(tmp_path_factory.mktemp("tokens")) as tenants:
        yield tenants


def tokenize(http: httpx.Client, model: str, *, path: str = "/tokenize", **fields: Any) -> httpx.Response:
    return http.post(path, json={"model": model, **({"prompt": TEXT} if "messages" not in fields else {}), **fields})


def detokenize(http: httpx.Client, model: str, tokens: Any, *, path: str = "/detokenize") -> httpx.Response:
    return http.post(path, json={"model": model, "tokens": tokens})


@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize("model", ["flan", "flan/nq", "tokens-of", "inline"])
def test_a_decoders_tokens_are_its_servers(http: httpx.Client, prefix: str, model: str) -> None:
    cocktail = {}
    if model == "tokens-of":
        make(http, model)
    elif model == "inline":
        model, cocktail = "flan", {"cocktail": INLINE}
    answer = tokenize(http, model, path=f"{prefix}/tokenize", **cocktail)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "count": len(TEXT), "max_model_len": 256, "tokens": list(TEXT.encode()), "token_strs": None,
    }  # fmt: skip
    back = detokenize(http, model, answer.json()["tokens"], path=f"{prefix}/detokenize")
    assert back.json() == {"prompt": TEXT}


def test_chats_are_rendered(http: httpx.Client) -> None:
    answer = tokenize(http, "flan", messages=MESSAGES, return_token_strs=True).json()
    assert "".join(answer["token_strs"]) == f"user: {TEXT}"
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])


@pytest.mark.parametrize("reranker", [False, True])
def test_encoders_and_rerankers_tell_what_their_own_tokenizer_makes(
    http: httpx.Client, tmp_path: Path, reranker: bool
) -> None:
    if not reranker:
        check_own_tokenizer(http, "bge")
        return
    with (
        live_gateway(tmp_path, reranker=True) as live,
        httpx.Client(base_url=live.url, timeout=60) as client,
    ):
        check_own_tokenizer(client, "ranker", base=live.settings.pool("ranker").base.path)


def check_own_tokenizer(http: httpx.Client, pool: str, *, base: Any = None) -> None:
    answer = tokenize(http, pool, return_token_strs=True).json()
    bare = tokenize(http, f"{pool}/quora", add_special_tokens=False).json()
    assert len(bare["tokens"]) == bare["count"] == answer["count"] - 2, "a token at each end"
    assert answer["tokens"][1:-1] == bare["tokens"]
    assert bare["token_strs"] is None
    assert len(answer["token_strs"]) == answer["count"]
    assert answer["max_model_len"] > 0
    if base is not None:
        own = AutoTokenizer.from_pretrained(base)
        assert answer["tokens"] == own(TEXT)["input_ids"]
        assert detokenize(http, pool, answer["tokens"]).json() == {"prompt": own.decode(answer["tokens"])}
    else:
        used = http.post("/v1/embeddings", json={"model": pool, "input": TEXT}).json()["usage"]["prompt_tokens"]
        assert answer["count"] == used
    assert TEXT in detokenize(http, pool, bare["tokens"]).json()["prompt"]
    assert detokenize(http, pool, []).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"model": "flan"}, "invalid_request", None),
        ({"model": "flan", "prompt": TEXT, "chat_template": "{{ 1 }}"}, "field_not_accepted", "chat_template"),
        (
            {"model": "flan", "messages": MESSAGES, "chat_template_kwargs": {"chat_template": "x"}},
            "field_not_accepted",
            "chat_template_kwargs.chat_template",
        ),
        ({"model": "flan", "prompt": TEXT, "vllm_xargs": {"a": 1}}, "field_not_accepted", "vllm_xargs"),
        ({"model": "flan", "prompt": TEXT, "request_id": "x"}, "field_not_accepted", "request_id"),
        ({"prompt": TEXT}, "invalid_request", "model"),
        ({"model": "bge", "messages": MESSAGES}, "wrong_model_kind", "messages"),
        ({"model": "bge"}, "invalid_request", "prompt"),
        ({"model": "bge", "prompt": TEXT, "tokenizer": "/etc"}, "invalid_request", "tokenizer"),
        ({"model": "bge", "prompt": "\ud800"}, "invalid_json", None),
    ],
)
def test_what_is_no_request_for_tokens(http: httpx.Client, body: dict[str, Any], code: str, param: str | None) -> None:
    answer = http.post("/tokenize", content=json.dumps(body), headers={"content-type": "application/json"})
    assert (answer.status_code, code_of(answer), answer.json()["error"]["param"]) == (400, code, param), answer.text


def test_tokens_that_a_model_does_not_know(http: httpx.Client) -> None:
    for tokens in ([10**6], [-1], "x", [True], None):
        answer = detokenize(http, "bge", tokens)
        assert (answer.status_code, answer.json()["error"]["param"].partition(".")[0]) == (400, "tokens"), tokens
    assert detokenize(http, "flan", [10**6]).status_code == 400


def test_a_tenants_models_are_its_own(tenants: Tenants) -> None:
    alice, bob = tenants.of("alice"), tenants.of("bob")
    make(alice, "secret")
    assert tokenize(alice, "secret").status_code == 200
    assert (tokenize(bob, "secret").status_code, code_of(tokenize(bob, "secret"))) == (404, "model_not_found")
    assert tokenize(tenants.client(None), "flan").status_code == 401
    user = tenants.of("alice", "use")
    assert tokenize(user, "flan").status_code == 200
    assert tokenize(user, "flan", cocktail=INLINE).status_code == 403


def test_requests_count_against_limits_and_in_the_ledger_without_tokens(tenants: Tenants) -> None:
    http = tenants.of("counted")
    tenants.admin.put("/admin/tenants/counted", json={"limits": {"requests_per_minute": 2, "tokens_per_minute": 100}})
    first = tokenize(http, "flan", prompt="x" * 200)
    assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "1")
    second = detokenize(http, "flan", [120])
    assert int(second.headers["x-ratelimit-remaining-tokens"]) >= 85, "what the first reserved was given back"
    assert tokenize(http, "flan").status_code == 429
    (row,) = http.get("/v1/usage", params={"group_by": "model"}).json()["data"]
    assert (row["model"], row["requests"], row["tokens_in"], row["tokens_out"]) == ("flan", 2, 0, 0)
