"""What to ask a server that has just become ready."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cocktail_serve.api_client import DEFAULT_SERVER
from cocktail_serve.pool import Kind, Pool


def first_steps(pools: Mapping[str, Pool], *, url: str, requires_key: bool) -> list[str]:
    """Lines to be shown: a request to one pool of each kind, a cocktail, and where the rest is found.

    Args:
        pools: those that are served, by id.
        url: of the server, without a path.
        requires_key: whether each request needs a key.
    """
    server = "" if url == DEFAULT_SERVER else f" --server {url}"
    first_of_kind: dict[Kind, Pool] = {}
    for pool in pools.values():
        first_of_kind.setdefault(pool.kind, pool)
    steps = [_request(pool, url=url, server=server, requires_key=requires_key) for pool in first_of_kind.values()]
    some = next(iter(pools))
    steps.append(f"cocktail-serve create NAME --pool {some} --examples EXAMPLES.jsonl{server}")
    lines = [f"all pools are ready: {url}/v1 for clients of OpenAI's API, {url}/docs for people; first steps:"]
    if requires_key:
        steps.insert(0, "export COCKTAIL_API_KEY=...   # of `cocktail-serve keys create`")
    return lines + [f"  {step}" for step in steps]


def _request(pool: Pool, *, url: str, server: str, requires_key: bool) -> str:
    if pool.kind == "decoder" and _chats(pool):
        return f'cocktail-serve chat {pool.id} "Hello"{server}'
    path, body = _BODIES[pool.kind]
    key = ' -H "Authorization: Bearer $COCKTAIL_API_KEY"' if requires_key else ""
    content = json.dumps({"model": pool.id, **body})
    return f"curl {url}{path}{key} -H 'Content-Type: application/json' -d '{content}'"


_BODIES: Mapping[Kind, tuple[str, Mapping[str, Any]]] = {
    "decoder": ("/v1/completions", {"prompt": "Hello", "max_tokens": 16}),
    "encoder": ("/v1/embeddings", {"input": "Hello"}),
    "reranker": ("/v1/rerank", {"query": "a greeting", "documents": ["Hello", "Goodbye"]}),
}
"""Path and body of a request to a pool, but for its model."""


def _chats(pool: Pool) -> bool:
    return pool.chat_template is not None or pool.base.generation.chat_template is not None
