"""LiteLLM's proxy in front of a gateway, with the configuration of docs/how-to/litellm.md.

It brings a hundred packages: `COCKTAIL_LITELLM_PYTHON` names the Python of an environment with `litellm[proxy]`.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from tests.gateways import LiveGateway, live_gateway
from tests.tenants import MESSAGES, make

PYTHON = os.environ.get("COCKTAIL_LITELLM_PYTHON")
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "litellm.md"
KEY = "sk-4cd21f9c8be94b6f9f0a1d2c7e5b3a68"
START_S = 240.0

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(PYTHON is None, reason="COCKTAIL_LITELLM_PYTHON names no environment with litellm"),
]


@contextmanager
def proxy(live: LiveGateway, folder: Path) -> Iterator[OpenAI]:
    """A client of a proxy in front of a gateway."""
    assert PYTHON is not None
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    config = folder / "litellm.yaml"
    config.write_text(text.replace("http://127.0.0.1:8000/v1", live.base_url))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environ = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "COCKTAIL_API_KEY": "none",
        "LITELLM_MASTER_KEY": KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it reads prices from the internet otherwise
    }
    command = [Path(PYTHON).parent / "litellm", "--config", config, "--port", str(port), "--host", "127.0.0.1"]
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
    try:
        deadline = time.monotonic() + START_S
        while not _is_alive(f"http://127.0.0.1:{port}/health/liveliness"):
            assert process.poll() is None, (folder / "proxy.log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _is_alive(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def test_chat_and_embeddings(tmp_path: Path) -> None:
    with live_gateway(tmp_path) as live, httpx.Client(base_url=live.url, timeout=60) as http:
        version = make(http, "travel")["id"]
        with proxy(live, tmp_path) as client:
            listed = {model.id for model in client.models.list()}
            assert {"cocktail/flan/nq", "cocktail/travel", f"cocktail/{version}", "cocktail/bge"} <= listed

            def ask(model: str) -> str:
                answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=5)  # type: ignore[arg-type]
                assert answer.usage is not None
                assert answer.usage.completion_tokens == 5
                return answer.choices[0].message.content or ""

            def ask_here(model: str) -> str:
                body = {"model": model, "messages": MESSAGES, "max_tokens": 5}
                content: str = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
                return content

            assert ask("cocktail/travel") == ask(f"cocktail/{version}") == ask_here("travel")
            assert ask("cocktail/flan/nq") == ask_here("flan/nq") != ask_here("travel")
            stream = client.chat.completions.create(
                model="cocktail/travel",
                messages=MESSAGES,  # type: ignore[arg-type]
                max_tokens=5,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
            told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert told == ask_here("travel")
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 5
            embedded = client.embeddings.create(model="cocktail/bge/quora", input=["a dog", "my card"])
            assert [len(row.embedding) for row in embedded.data] == [32, 32]
            with pytest.raises(openai.NotFoundError, match="GET /v1/models lists those that do"):
                ask("cocktail/none")


def test_reranking(tmp_path: Path) -> None:
    with live_gateway(tmp_path, reranker=True) as live, proxy(live, tmp_path) as client:
        body = {"query": "dog", "documents": ["a cat", "a dog", "a bird"], "top_n": 2}
        path, key = f"{client.base_url}rerank", {"authorization": f"Bearer {KEY}"}
        answer = httpx.post(path, json={"model": "cocktail-rerank/ranker/quora", **body}, headers=key, timeout=60)
        here = httpx.post(f"{live.base_url}/rerank", json={"model": "ranker/quora", **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    rows = [[(row["index"], row["relevance_score"]) for row in each.json()["results"]] for each in (answer, here)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
