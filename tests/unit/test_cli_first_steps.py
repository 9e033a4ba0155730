"""What a server that has become ready tells its operator to try."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from cocktail_serve.cli.first_steps import first_steps
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.pool import Kind, Member, Pool

URL = "http://127.0.0.1:4000"


def pool(pool_id: str, kind: Kind, template: str | None = None) -> Pool:
    base = Member(name="base", path=Path("base"), fingerprint="0" * 64, dtype="float32", num_bytes=0)
    chat_template = None if template is None else ChatTemplate(template)
    return Pool(id=pool_id, kind=kind, base=base, experts={}, text_digest="", chat_template=chat_template)


def served(*pools: Pool) -> dict[str, Pool]:
    return {each.id: each for each in pools}


def test_one_request_to_each_kind_and_a_cocktail() -> None:
    pools = served(pool("flan", "decoder", "{{ messages }}"), pool("bge", "encoder"), pool("e5", "encoder"))
    first, *steps = first_steps(pools, url=URL, requires_key=False)
    assert f"{URL}/v1" in first
    assert f"{URL}/docs" in first
    chat, embed, create = (shlex.split(step) for step in steps)
    assert chat == ["cocktail-serve", "chat", "flan", "Hello", "--server", URL]
    assert embed[:2] == ["curl", f"{URL}/v1/embeddings"]
    assert json.loads(embed[-1]) == {"model": "bge", "input": "Hello"}
    assert create[:5] == ["cocktail-serve", "create", "NAME", "--pool", "flan"]


@pytest.mark.parametrize(("kind", "path"), [("decoder", "/v1/completions"), ("reranker", "/v1/rerank")])
def test_a_pool_that_does_not_chat_is_asked_with_its_key(kind: Kind, path: str) -> None:
    _, key, request, _ = first_steps(served(pool("p", kind)), url=URL, requires_key=True)
    assert "COCKTAIL_API_KEY" in key
    words = shlex.split(request)
    assert words[1] == f"{URL}{path}"
    assert "Authorization: Bearer $COCKTAIL_API_KEY" in words
    assert json.loads(words[-1])["model"] == "p"


def test_the_default_server_needs_no_option() -> None:
    pools = served(pool("flan", "decoder", "{{ messages }}"))
    assert not any("--server" in line for line in first_steps(pools, url="http://127.0.0.1:8000", requires_key=False))
