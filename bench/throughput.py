"""What the gateway leaves of a real engine's throughput.

    python -m bench.throughput --engine-cores 0 --other-cores 1
    python -m bench.throughput --engine-cores 0 --other-cores 1 --hidden 1024 --layers 12

Starts a plain vLLM server, and a gateway over another vLLM server of the same model, and asks them in turn from a fixed
number of clients (closed loop). All processes of both vLLM servers are pinned to the engine's cores, the gateway and
the clients to the others, so that each engine has the same cores whether it is asked directly or through the gateway.
The one that is not asked is idle.

Prints JSON: the median ratio of tokens per second, every run, and the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from bench.gateway import CHAT, POOL, request_body
from bench.machine import describe_machine
from bench.server import plain_vllm, running_server
from tests.models import make_decoder

MAX_MODEL_LEN = 1024
PAUSE_S = 2.0
"""Between two runs: a vLLM worker spins for a second after its last answer."""


async def closed_loop(url: str, body: bytes, *, clients: int, seconds: float) -> dict[str, float]:
    """Each client sends one request after the other; requests and generated tokens per second."""
    num_tokens = 0
    num_requests = 0
    deadline = time.perf_counter() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal num_tokens, num_requests
        while time.perf_counter() < deadline:
            async with session.post(CHAT, data=body, headers={"Content-Type": "application/json"}) as response:
                if response.status != 200:
                    raise RuntimeError(f"{url} answered {response.status}: {await response.text()}")
                answer = await response.json()
            num_tokens += answer["usage"]["completion_tokens"]
            num_requests += 1

    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        elapsed = time.perf_counter() - started
    return {"requests_per_s": num_requests / elapsed, "tokens_per_s": num_tokens / elapsed}


def engine_args(arguments: argparse.Namespace) -> dict[str, Any]:
    """What both vLLM servers are started with, beside model, dtype and context."""
    return {"max-num-seqs": arguments.clients, "hf-overrides": {"max_position_embeddings": MAX_MODEL_LEN}}


def engine_env(arguments: argparse.Namespace) -> dict[str, str]:
    """As many threads as the engine has cores; vLLM takes all of the machine's otherwise."""
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(arguments.engine_cores)))}


def pin(processes: Sequence[psutil.Process], cores: set[int]) -> None:
    """Confines all threads of these processes, and what they start later, to cores."""
    for process in processes:
        for thread in process.threads():
            os.sched_setaffinity(thread.id, cores)


async def throughput_ratio(plain_url: str, gateway_url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs against the plain server and the gateway, in turn."""
    urls = {"plain": plain_url, "gateway": gateway_url}
    body = request_body(POOL, stream=False, max_tokens=arguments.max_tokens)
    for url in urls.values():
        await closed_loop(url, body, clients=arguments.clients, seconds=3)
    runs = []
    for _ in range(arguments.runs):
        run = {}
        for name, url in urls.items():
            await asyncio.sleep(PAUSE_S)
            run[name] = await closed_loop(url, body, clients=arguments.clients, seconds=arguments.seconds)
        runs.append(run)
    ratios = [run["gateway"]["tokens_per_s"] / run["plain"]["tokens_per_s"] for run in runs]
    return {"ratio_median": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios], "runs": runs}


def write_config(folder: Path, model: Path, arguments: argparse.Namespace) -> Path:
    """A configuration of one pool behind vLLM."""
    engine = {
        "type": "vllm",
        "max_model_len": MAX_MODEL_LEN,
        "dtype": arguments.dtype,
        "args": engine_args(arguments),
        "env": engine_env(arguments),
    }
    pool = {"id": POOL, "kind": "decoder", "base": str(model), "engine": engine}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"store": {"cache_dir": str(folder / "cache")}, "pools": [pool]}))
    return path


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts both, pins them, and measures."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        model = make_decoder(
            folder / "model",
            hidden_size=arguments.hidden,
            num_layers=arguments.layers,
            num_heads=arguments.hidden // 32,
        )
        config = write_config(folder, model, arguments)
        with (
            plain_vllm(
                model,
                name=POOL,
                dtype=arguments.dtype,
                max_model_len=MAX_MODEL_LEN,
                args=engine_args(arguments),
                env=engine_env(arguments),
                log=folder / "vllm.log",
            ) as (plain_url, plain),
            running_server(config, log=folder / "server.log") as server,
        ):
            gateway = psutil.Process(server.process.pid)
            pin([plain, *plain.children(recursive=True), *gateway.children(recursive=True)], arguments.engine_cores)
            pin([gateway, psutil.Process()], arguments.other_cores)
            return asyncio.run(throughput_ratio(plain_url, server.url, arguments))


def cores(text: str) -> set[int]:
    """`0,2,3` as a set."""
    return {int(core) for core in text.split(",")}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-cores", type=cores, required=True, help="as 0,1")
    parser.add_argument("--other-cores", type=cores, required=True)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of one run")
    parser.add_argument("--runs", type=int, default=3, help="of each, in turn")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--hidden", type=int, default=64, help="size of the model")
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args(argv)
    result = measure(arguments)
    workload = {key: sorted(value) if isinstance(value, set) else value for key, value in vars(arguments).items()}
    print(json.dumps({"machine": describe_machine(), "workload": workload, **result}, indent=2))


if __name__ == "__main__":
    main()
