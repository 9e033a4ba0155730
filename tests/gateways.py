"""A gateway over real sockets, in this process: the fake engine for a decoder pool, a pico encoder for another."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import Settings
from cocktail_serve.engines.base import AnyEngine
from cocktail_serve.gateway.app import create_app
from cocktail_serve.pool import Pool
from tests.fakes import make_fake_pool
from tests.models import make_encoder_pool, make_reranker_pool

DEADLINE_S = 60.0

EXAMPLES = [{"input": f"is {word} a fruit?", "output": "yes"} for word in ("apple", "pear", "fig")]
"""Fit for the decoder pool."""

EMBEDDING_ATOL = 1e-6
"""How far two embeddings of one text by one model may be apart: a pass that is shared with other requests, a report's
in the background too, adds up in another order. At most 1.5e-7 among 400 answers beside six clients; those of other
models differ in the first digit."""

PAIRS = [
    {"query": "what is the capital of france", "pos": ["paris"], "neg": ["berlin"]},
    {"query": "my card was stolen", "pos": ["lost card"], "neg": ["open account"]},
]
"""Fit for the encoder and the reranker pool."""


@dataclass(frozen=True)
class LiveGateway:
    """A gateway that listens.

    Attributes:
        faults: folder in which a file makes the fake engine fail once.
    """

    url: str
    app: FastAPI
    settings: Settings
    faults: Path

    @property
    def base_url(self) -> str:
        """What OpenAI's clients call it."""
        return f"{self.url}/v1"


def make_settings(folder: Path, *, reranker: bool = False, **sections: Any) -> Settings:
    """Settings of the pools `flan` (fake engine) and `bge` (sentence-transformers); `sections` go on top.

    Args:
        reranker: a pool `ranker` too, and the encoder pool is left out.
    """
    engine = {
        "type": "fake",
        "max_model_len": 256,
        "slice_s": 0.05,
        "queue_timeout_s": 20,
        "args": {"faults": str(folder / "faults")},
    }
    encoders, rerankers = folder / "encoders", folder / "rerankers"
    pools = {
        "encoder": {
            "id": "bge",
            "kind": "encoder",
            "base": str(encoders / "base"),
            "experts": {name: str(encoders / name) for name in ("hotpotqa", "quora")},
            "engine": {"type": "sentence_transformers", "dtype": "float32"},
            "prompts": {"query": "find : "},
            "matryoshka_dimensions": [8, 16],
        },
        "reranker": {
            "id": "ranker",
            "kind": "reranker",
            "base": str(rerankers / "base"),
            "experts": {name: str(rerankers / name) for name in ("hotpotqa", "quora")},
            "engine": {"type": "sentence_transformers", "dtype": "float32"},
        },
    }
    in_process = "reranker" if reranker else "encoder"
    return Settings.model_validate(
        {
            "store": {"cache_dir": str(folder / "cache")},
            "pools": [
                {
                    "id": "flan",
                    "kind": "decoder",
                    "base": str(folder / "decoder"),
                    "experts": {name: str(folder / "decoder") for name in ("ag-news", "nq")},
                    "engine": engine | sections.pop("engine", {}),
                },
                pools[in_process] | sections.pop(in_process, {}),
            ],
            **sections,
        }
    )


def make_pools(folder: Path, settings: Settings) -> dict[str, Pool]:
    """The pools of `make_settings`, on disk and opened."""
    (folder / "faults").mkdir(exist_ok=True)
    make = {"bge": make_encoder_pool, "ranker": make_reranker_pool}
    is_real = (folder / "decoder" / "config.json").exists()  # put there by a test that adds experts
    pools = {}
    for config in settings.pools:
        if config.id == "flan" and not is_real:
            mode = getattr(config.engine, "mode", None)
            pools["flan"] = replace(make_fake_pool(folder / "decoder"), mode=mode or "merged")
        if is_real and config.id == "flan":
            pools["flan"] = open_pool(config, cache_dir=folder / "cache")
        if config.id in make:
            members = Path(config.base.path).parent
            if not members.exists():
                make[config.id](members)
            pools[config.id] = open_pool(config, cache_dir=folder / "cache")
    return pools


@contextmanager
def live_gateway(
    folder: Path, *, engines: Mapping[str, AnyEngine] | None = None, **sections: Any
) -> Iterator[LiveGateway]:
    """Runs a gateway on a free port of the loopback until the block ends; its engines are ready."""
    settings = make_settings(folder, **sections)
    app = create_app(settings, pools=make_pools(folder, settings), engines=engines)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # no configuration of its own: to make one, logging closes the handlers of others, and with absl's its stream
        config = uvicorn.Config(
            app, log_level="warning", log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="gateway", daemon=True)
        thread.start()
        try:
            until_ready(url, thread)
            yield LiveGateway(url, app, settings, folder / "faults")
        finally:
            server.should_exit = True
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "the gateway did not stop"


def assert_same_embeddings(answer: Any, other: Any) -> None:
    """Two answers of `/v1/embeddings` are the same, their vectors but for rounding."""
    vectors = [[vector_of(item.pop("embedding")) for item in each["data"]] for each in (answer, other)]
    assert answer == other
    np.testing.assert_allclose(*vectors, rtol=0, atol=EMBEDDING_ATOL)


def vector_of(embedding: Any) -> Any:
    """Numbers, or the base64 of float32."""
    return np.frombuffer(base64.b64decode(embedding), "<f4") if isinstance(embedding, str) else embedding


def eventually(condition: Callable[[], bool], what: str, *, within_s: float = DEADLINE_S) -> None:
    """Waits for what a gateway does behind its answers."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.02)


def until_ready(url: str, thread: threading.Thread) -> None:
    """Waits until all engines are."""
    deadline = time.monotonic() + DEADLINE_S
    with httpx.Client() as client:
        while True:
            assert thread.is_alive(), "the gateway ended while it started"
            assert time.monotonic() < deadline, "the engines were not ready in time"
            try:
                if client.get(f"{url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
