"""A real server for a benchmark or an end-to-end test: started as a user would, ended with all it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from vllm_cocktail.launch import flags

POLL_S = 3.0
"""Seconds between two looks at `/ready`. It asks each engine's workers, and a vLLM worker spins for a second after each
question: asked more often, the first engine that is ready takes the core from the ones that still start."""


class ServerFailedError(RuntimeError):
    """The server ended or was not ready in time; carries the end of its log."""


class RunningServer:
    """A `cocktail-serve serve` process and a client for its own API.

    Attributes:
        url: `http://127.0.0.1:<port>`.
        process: the gateway.
        log: its output.
        http: a client whose base URL is `url`.
    """

    def __init__(self, url: str, process: subprocess.Popen[bytes], http: httpx.Client, *, log: Path) -> None:
        self.url = url
        self.process = process
        self.log = log
        self.http = http

    def post(self, path: str, body: Any) -> Any:
        """The JSON answer of a POST that succeeds.

        Raises:
            RuntimeError: another status than 2xx.
        """
        answer = self.http.post(path, json=body)
        if not answer.is_success:
            raise RuntimeError(f"POST {path} answered {answer.status_code}: {answer.text}")
        return answer.json()

    def metric_sum(self, name: str) -> float:
        """Sum of a metric over all its labels."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(
    config: Path, *, log: Path, timeout_s: float = 480, env: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """Serves `config` on loopback until the block ends.

    Raises:
        ServerFailedError: it exited, or `/ready` did not turn 200 within `timeout_s`.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cocktail_serve.cli", "serve", str(config), "--port", str(port)],
            stdout=output,
            stderr=output,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=url, timeout=300) as http:
            _until_ready(http, process, log, timeout_s)
            yield RunningServer(url, process, http, log=log)
    finally:
        _end(process)


@contextmanager
def plain_vllm(
    model: Path,
    *,
    name: str,
    dtype: str,
    max_model_len: int,
    args: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
    log: Path,
    timeout_s: float = 240,
) -> Iterator[tuple[str, psutil.Process]]:
    """vLLM's own server without the plugin, until the block ends; its URL and its first process.

    Args:
        name: of the model.
        args: further engine arguments, as `launch.server_args` takes them.

    Raises:
        ServerFailedError: it exited, or was not healthy within `timeout_s`.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--served-model-name", name, "--dtype", dtype, "--max-model-len", str(max_model_len)]
    command += ["--disable-uvicorn-access-log", *flags({"enforce-eager": True, **args})]
    own = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1", "VLLM_PLUGINS": ""}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **own, **(env or {})}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + timeout_s
        while not _is_healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerFailedError(f"vLLM did not start:\n{_tail(log)}")
            time.sleep(1)
        yield url, psutil.Process(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _until_ready(http: httpx.Client, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailedError(f"the server exited with {process.returncode}:\n{_tail(log)}")
        try:
            if http.get("/ready", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(POLL_S)
    raise ServerFailedError(f"the server was not ready within {timeout_s:g} s:\n{_tail(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
