"""What the gateway adds to a request's time.

    python -m bench.gateway                                        # 200 requests/s, fake engine
    python -m bench.gateway --stream

Starts a gateway with a fake-engine pool, and the same fake server once more by itself. Requests arrive at a fixed rate
whether or not earlier ones were answered (open loop), in turn at the fake's own port and at the gateway's; a run's
added latency is the difference of the two distributions' percentiles. What the gateway leaves of a real engine's
throughput is the matter of `bench.throughput`.

Prints JSON: medians over the runs, every run, and the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import yaml

from bench.machine import describe_machine
from bench.server import free_port, running_server
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import load_settings
from cocktail_serve.pool import Pool
from tests.models import make_decoder_pool
from vllm_cocktail.launch import server_env
from vllm_cocktail.manifest import Manifest

POOL = "bench"
CHAT = "/v1/chat/completions"
PROMPT = "Classify the intent of this message, and answer with one word: my card was stolen this morning. " * 4
LATENCIES = ("first_byte_p50_ms", "first_byte_p99_ms", "whole_p50_ms", "whole_p99_ms")
WARM_UP_REQUESTS = 200
START_TIMEOUT_S = 30

Send = Callable[[], Awaitable[tuple[float, float]]]
"""Sends one request; seconds to the first bytes of the body and to its end."""


def request_body(model: str, *, stream: bool, max_tokens: int) -> bytes:
    """The one body that all requests have; a model answers it with `max_tokens` tokens."""
    body = {
        "model": model,
        "messages": [{"role": "system", "content": "You are terse."}, {"role": "user", "content": PROMPT}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
    return json.dumps(body).encode()


def sender(session: aiohttp.ClientSession, body: bytes) -> Send:
    """How one request is sent; a status other than 200 ends the benchmark."""

    async def send() -> tuple[float, float]:
        started = time.perf_counter()
        async with session.post(CHAT, data=body, headers={"Content-Type": "application/json"}) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.url} answered {response.status}: {await response.text()}")
            await response.content.readany()
            first = time.perf_counter() - started
            await response.read()
        return first, time.perf_counter() - started

    return send


async def open_loop(send: Send, *, rate: float, num_requests: int) -> dict[str, float]:
    """Sends at a fixed rate; percentiles in milliseconds, and how late the client itself was at worst."""
    loop = asyncio.get_running_loop()
    began = loop.time() + 0.05
    lags = []
    tasks: list[asyncio.Task[tuple[float, float]]] = []
    for index in range(num_requests):
        due = began + index / rate
        if (ahead := due - loop.time()) > 0:
            await asyncio.sleep(ahead)
        lags.append(loop.time() - due)
        tasks.append(asyncio.create_task(send()))
    times = np.array(await asyncio.gather(*tasks)) * 1000
    result = {"client_lag_p99_ms": float(np.percentile(lags, 99)) * 1000}
    for name, column in (("first_byte", times[:, 0]), ("whole", times[:, 1])):
        result[f"{name}_p50_ms"] = float(np.percentile(column, 50))
        result[f"{name}_p99_ms"] = float(np.percentile(column, 99))
    return result


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process so far, user and system, its children left out."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def added_latency(
    arguments: argparse.Namespace, fake_url: str, gateway_url: str, gateway: psutil.Process
) -> dict[str, Any]:
    """Runs of both, in turn."""
    run_keys = (*LATENCIES, "gateway_cpu_ms_per_request")
    runs = []
    async with (
        aiohttp.ClientSession(fake_url, connector=aiohttp.TCPConnector(limit=0)) as direct,
        aiohttp.ClientSession(gateway_url, connector=aiohttp.TCPConnector(limit=0)) as through,
    ):
        body = request_body(POOL, stream=arguments.stream, max_tokens=arguments.max_tokens)
        sends = {"direct": sender(direct, body), "gateway": sender(through, body)}
        for send in sends.values():
            await open_loop(send, rate=arguments.rate, num_requests=WARM_UP_REQUESTS)
        for _ in range(arguments.runs):
            num_requests = int(arguments.rate * arguments.seconds)
            run: dict[str, Any] = {}
            for name, send in sends.items():
                before = cpu_seconds(gateway)
                run[name] = await open_loop(send, rate=arguments.rate, num_requests=num_requests)
                run[name]["gateway_cpu_ms_per_request"] = (cpu_seconds(gateway) - before) / num_requests * 1000
            run["added"] = {key: run["gateway"][key] - run["direct"][key] for key in run["direct"]}
            runs.append(run)
    return {
        "added_median": {key: round(statistics.median(run["added"][key] for run in runs), 3) for key in run_keys},
        "runs": [
            {name: {key: round(value, 3) for key, value in part.items()} for name, part in run.items()} for run in runs
        ],
    }


def write_config(folder: Path) -> Path:
    """A configuration of one pool behind the fake engine."""
    models = make_decoder_pool(folder / "models", ("expert",))
    pool = {
        "id": POOL,
        "kind": "decoder",
        "base": str(models["base"]),
        "experts": {"expert": str(models["expert"])},
        "engine": {"type": "fake", "max_model_len": 4096},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"store": {"cache_dir": str(folder / "cache")}, "pools": [pool]}))
    return path


def is_listening(port: int) -> bool:
    """Whether something accepts connections on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running_fake(pool: Pool, folder: Path) -> Iterator[str]:
    """The fake server by itself; its URL."""
    manifest = Manifest.of_pool(pool, dtype="float32", cache_bytes=0, managed=False).write(folder / "manifest.json")
    port = free_port()
    command = [sys.executable, "-m", "cocktail_serve.engines.vllm.fake", "--port", str(port)]
    command += ["--served-model-name", POOL]
    command += ["--max-model-len", "4096"]
    env = server_env(manifest=manifest, api_key="", owner_pid=os.getpid(), extra={})
    env.pop("VLLM_API_KEY")
    process = subprocess.Popen(command, env=env)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_listening(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the fake server did not start")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(START_TIMEOUT_S)


def measure_added_latency(arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts both servers and measures."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        config = write_config(folder)
        settings = load_settings(config)
        pool = open_pool(settings.pools[0], cache_dir=settings.store.cache_dir)
        with running_fake(pool, folder) as fake_url, running_server(config, log=folder / "server.log") as server:
            return asyncio.run(added_latency(arguments, fake_url, server.url, psutil.Process(server.process.pid)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of one run")
    parser.add_argument("--runs", type=int, default=5, help="of each kind, in turn")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--stream", action="store_true", help="answers as server-sent events")
    arguments = parser.parse_args(argv)
    workload = vars(arguments)
    result = measure_added_latency(arguments)
    print(json.dumps({"machine": describe_machine(), "workload": workload, **result}, indent=2))


if __name__ == "__main__":
    main()
