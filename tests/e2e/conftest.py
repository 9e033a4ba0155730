"""A plain vLLM server with the plugin on a pico pool, without the gateway. Half a minute each: share them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.dtypes import DType
from cocktail_serve.pool import Mode, Pool
from cocktail_serve.recipe import Recipe, make_recipe
from tests.models import make_decoder_pool, pool_section
from vllm_cocktail.launch import is_cpu_build, server_args, server_env
from vllm_cocktail.manifest import Manifest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On vLLM's CUDA build the same tests run on the GPU, whose scheduler and model runner are other ones."""
    if not is_cpu_build():
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.gpu)


API_KEY = "the-key-of-the-tests"
MODEL = "pico"
MAX_MODEL_LEN = 128
BLOCK_SIZE = 32


@dataclass
class VLLMServer:
    """A running server and what is needed to ask it.

    Attributes:
        pool: what it may mix.
        pid: of the API server, which leads a process group of its own.
        client: sends the key.
        dtype: of the engine; float32, so that answers can be compared token for token, where nothing else is said.
    """

    pool: Pool
    folders: Mapping[str, Path]
    pid: int
    uds: Path
    log: Path
    client: httpx.Client
    resident: str = field(default="")
    dtype: DType = "float32"

    def recipe(self, **merging_weights: float) -> Recipe:
        return make_recipe(self.pool, merging_weights, dtype=self.dtype, mode=self.pool.mode)

    def status(self) -> dict[str, Any]:
        response = self.client.get("/v1/cocktail/status")
        assert response.status_code == 200, response.text
        return response.json()

    def mix(self, recipe: Recipe, **options: Any) -> dict[str, Any]:
        """Makes a recipe resident; `complete` then asks under it."""
        response = self.client.post("/v1/cocktail/mix", json={"recipe": recipe.to_json(), **options})
        assert response.status_code == 200, response.text
        self.resident = recipe.digest
        return response.json()

    def complete(self, prompt: list[int], *, salt: str | None = None, **options: Any) -> dict[str, Any]:
        """A greedy completion with log-probabilities: `token_ids` and `logprobs` among what vLLM answers."""
        response = self.client.post(
            "/v1/completions",
            json=completion_body(prompt, salt=salt or self.resident[:32], **options),
            headers={"x-cocktail-recipe": self.resident},
        )
        assert response.status_code == 200, response.text
        assert response.headers["x-cocktail-recipe"] == self.resident
        return response.json()["choices"][0]


def completion_body(prompt: list[int] | list[list[int]], *, salt: str | None = None, **options: Any) -> dict[str, Any]:
    """A greedy completion that gives token ids and log-probabilities."""
    body = {
        "model": MODEL,
        "prompt": prompt,
        "temperature": 0.0,
        "max_tokens": 16,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
    }
    return body | ({"cache_salt": salt} if salt else {}) | options


@contextlib.contextmanager
def running_vllm(
    folder: Path,
    *,
    tied: bool,
    managed: bool,
    cache_bytes: int = 64 * 1024**2,
    expert_bytes: int = 64 * 1024**2,
    environ: Mapping[str, str] | None = None,
    deadline_s: float = 240.0,
    folders: Mapping[str, Path] | None = None,
    args: Mapping[str, Any] | None = None,
    mode: Mode = "merged",
    dtype: DType = "float32",
) -> Iterator[VLLMServer]:
    """Starts a server on a new pool, or on models that are there, and ends its whole process group afterwards."""
    folders = folders or make_decoder_pool(folder / "pool", ("red", "green"), tied=tied)
    engine = {"type": "vllm", "mode": mode, "dtype": dtype}
    config = PoolConfig.model_validate(pool_section(MODEL, "decoder", folders, engine))
    pool = open_pool(config, cache_dir=folder / "cache")
    manifest = Manifest.of_pool(pool, dtype=dtype, cache_bytes=cache_bytes, managed=managed, expert_bytes=expert_bytes)
    sockets = Path(tempfile.mkdtemp(prefix="vllm-"))  # mode 0700, and short: a socket's path is limited to 107 bytes
    uds = sockets / "engine.sock"
    args = {"block-size": BLOCK_SIZE, "max-num-seqs": 8, **(args or {})}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            server_args(
                model=folders["base"],
                uds=uds,
                served_model_name=MODEL,
                dtype=dtype,
                max_model_len=MAX_MODEL_LEN,
                extra=args,
                mode=pool.mode,
            ),
            env=server_env(
                manifest=manifest.write(folder / "pool.json"),
                api_key=API_KEY,
                owner_pid=os.getpid(),
                args=args,
                mode=pool.mode,
                environ={**os.environ, **(environ or {})},
            ),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    client = httpx.Client(
        transport=httpx.HTTPTransport(uds=str(uds)),
        base_url="http://engine",
        headers={"authorization": f"Bearer {API_KEY}"},
        timeout=60.0,
    )
    try:
        _wait_until_up(uds, process, log, deadline_s)
        yield VLLMServer(pool, folders, process.pid, uds, log, client, manifest.resident, dtype)
    finally:
        client.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(sockets)


def _wait_until_up(uds: Path, process: subprocess.Popen[bytes], log: Path, deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while not accepts(uds):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"vLLM did not start, exit code {process.poll()}:\n{log.read_text()[-5000:]}")
        time.sleep(0.2)


def accepts(uds: Path) -> bool:
    """Whether somebody listens. (A refused connection over a Unix socket is one that httpx never closes.)"""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(uds)) == 0


@pytest.fixture(scope="module")
def untied_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """Untied embeddings; managed, as under a gateway: every request names its recipe."""
    with running_vllm(tmp_path_factory.mktemp("untied"), tied=False, managed=True) as server:
        yield server


@pytest.fixture(scope="module")
def tied_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """Tied embeddings; plain, as without a gateway."""
    with running_vllm(tmp_path_factory.mktemp("tied"), tied=True, managed=False) as server:
        yield server
