"""Cocktails that share a batch (engine.mode: unmerged) beside all else that could answer for as many tenants.

A pool of a base with random parameters and eight adapters, asked over HTTP through the gateway, real vLLM behind it;
answers of 48 tokens, 16 clients. Parts, each of a few minutes:

    throughput    cocktails of 5 of 8 experts, of 8 tenants and of 64, over the plain base as vLLM serves it
    base          base requests in a pool with adapters over those in a pool without
    turns         the same cocktails over `engine.mode: merged`, where they take turns
    few           one, two and four hot recipes, answers of 48 tokens, and one under long prompts: over `merged`
    lora          the same over vLLM's own LoRA, one adapter a recipe, slots for all
    fairness      p95 of a tenant with one client beside one with 32, over alone
    first-token   recipe to first token of a cocktail never asked before, over the base's
    examples      five examples to first token of a new cocktail
    learned       five examples to a `gradient` cocktail, alone and beside traffic, and the traffic's p99
    memory        the vLLM worker's resident memory over that of the plain base, with all experts and 10,000 cocktails

    python -m bench.rows
    python -m bench.rows --model smollm2 --parts throughput,lora

What is compared runs in turn, with a pause for the threads that spin after their last answer. Prints JSON: ratios
(medians), every run, the machine and its load.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from bench.fairness import measure as measure_beside_flood
from bench.machine import describe_machine
from bench.row_models import SHAPES, VLLM_RANKS, Shape, make_one_adapter, make_pool
from bench.server import RunningServer, plain_vllm, running_server
from bench.tenants import Ask, Tenant, keyless, tenants, words

NUM_EXPERTS, NUM_MIXED = 8, 5
PLAIN = "base"
ENGINE_ARGS = {"max-num-seqs": 16}
ENGINE_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}
SMALL_KV_CACHE = {"num-gpu-blocks-override": 32}
PAUSE_S = 2.0
"""Between two runs: a vLLM worker spins for a second after its last answer."""

Run = Callable[[], Awaitable[float]]
"""One run of one of those that are compared."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all parts share: the models, and how long things run."""

    folder: Path
    shape: Shape
    models: Mapping[str, Path]
    arguments: argparse.Namespace
    admin_key: str

    @contextlib.contextmanager
    def gateway(self, *pools: str, args: Mapping[str, Any] | None = None) -> Iterator[RunningServer]:
        """A gateway over these pools: `unmerged`, `merged`, or `bare`, which has no experts."""
        experts = {name: str(path) for name, path in self.models.items() if name != "base"}
        sections = []
        for pool in pools:
            engine = {
                "type": "vllm",
                "dtype": self.shape.dtype,
                "max_model_len": self.shape.max_model_len,
                "queue_timeout_s": 600,
                "args": {**ENGINE_ARGS, **(args or {})},
                "env": ENGINE_ENV,
            }
            if pool != "bare":
                engine["mode"] = pool
            section = {"id": pool, "kind": "decoder", "base": str(self.models["base"]), "engine": engine}
            sections.append(section | ({} if pool == "bare" else {"experts": experts}))
        home = Path(tempfile.mkdtemp(prefix="gateway-", dir=self.folder))
        config = {"server": {"auth": "required"}, "store": {"cache_dir": str(home / "cache")}, "pools": sections}
        path = home / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        with running_server(path, log=home / "server.log", env={"COCKTAIL_ADMIN_KEY": self.admin_key}) as server:
            yield server

    @contextlib.contextmanager
    def vllm(self, args: Mapping[str, Any] | None = None) -> Iterator[tuple[str, psutil.Process]]:
        """vLLM without the plugin: its URL and its first process."""
        with plain_vllm(
            self.models["base"],
            name=PLAIN,
            dtype=self.shape.dtype,
            max_model_len=self.shape.max_model_len,
            args={**ENGINE_ARGS, **(args or {})},
            env=ENGINE_ENV,
            log=Path(tempfile.mkdtemp(prefix="vllm-", dir=self.folder)) / "server.log",
        ) as running:
            yield running

    def chat(self, model: str, **options: Any) -> Ask:
        """Answers of the length that is measured."""
        return Ask.chat(model, **{"max_tokens": self.arguments.max_tokens, **options})

    @contextlib.asynccontextmanager
    async def tenants(self, server: RunningServer, count: int) -> AsyncIterator[list[Tenant]]:
        """So many tenants of a gateway."""
        async with tenants(server.url, self.admin_key, [f"tenant-{number}" for number in range(count)]) as made:
            yield made

    def tokens_per_s(
        self, askers: Sequence[tuple[Tenant, Ask]], *, seconds: float | None = None, max_tokens: int | None = None
    ) -> Run:
        """One run of the load, the askers dealt out among the clients."""
        arguments = self.arguments
        seconds = seconds or arguments.seconds
        answer = max_tokens or arguments.max_tokens

        async def client(number: int, until: float) -> int:
            own = askers[number % len(askers) :: arguments.clients]
            for answers, (tenant, ask) in enumerate(itertools.cycle(own)):
                if time.perf_counter() >= until:
                    return answers
                await tenant.ask(ask, number + answers * arguments.clients)
            raise AssertionError("a cycle has no end")

        async def run() -> float:
            started = time.perf_counter()
            until = started + seconds
            answers = sum(await asyncio.gather(*(client(number, until) for number in range(arguments.clients))))
            return answers * answer / (time.perf_counter() - started)

        return run

    async def in_turn(self, runs: Mapping[str, Run], *, rounds: int | None = None) -> dict[str, list[float]]:
        """The values of each, one after the other, again and again. A first round warms up and does not count."""
        found: dict[str, list[float]] = {name: [] for name in runs}
        for number in range((rounds or self.arguments.runs) + 1):
            for name, run in runs.items():
                await asyncio.sleep(PAUSE_S)
                value = await run()
                if number:
                    found[name].append(round(value, 3))
            print(f"{found}", file=sys.stderr, flush=True)
        return found


def mixture(seed: int) -> dict[str, float]:
    """Merging weights of a cocktail of five of the eight experts, each seed another."""
    pick = random.Random(seed)
    shares = [pick.uniform(0.5, 1.5) for _ in range(NUM_MIXED)]
    names = pick.sample([f"expert-{number}" for number in range(NUM_EXPERTS)], NUM_MIXED)
    return {name: share / sum(shares) for name, share in zip(names, shares, strict=True)}


async def cocktails(
    bench: Bench, pool: str, owners: Sequence[Tenant], chat: Callable[..., Ask] | None = None
) -> list[tuple[Tenant, Ask]]:
    """One cocktail of each tenant, ready, and what is asked of it."""
    made = [
        await owner.make({"name": f"{pool}-own", "pool": pool, "merging_weights": mixture(seed)})
        for seed, owner in enumerate(owners)
    ]
    return [(owner, (chat or bench.chat)(each["id"])) for owner, each in zip(owners, made, strict=True)]


def ratio(runs: Mapping[str, Sequence[float]], what: str, over: str) -> float:
    """Median of the ratios of runs that followed each other."""
    return statistics.median(one / other for one, other in zip(runs[what], runs[over], strict=True))


async def throughput(bench: Bench) -> dict[str, Any]:
    with bench.vllm() as (plain_url, _), bench.gateway("unmerged") as server:
        async with keyless(plain_url) as plain, bench.tenants(server, 64) as owners:
            own = await cocktails(bench, "unmerged", owners)
            runs = await bench.in_turn(
                {
                    "plain": bench.tokens_per_s([(plain, bench.chat(PLAIN))]),
                    "base": bench.tokens_per_s([(owner, bench.chat("unmerged")) for owner in owners[:8]]),
                    "8 tenants": bench.tokens_per_s(own[:8]),
                    "64 tenants": bench.tokens_per_s(own),
                }
            )
    target = 0.72 if bench.shape.dtype == "float32" else 0.87
    return {
        "tokens_per_s": runs,
        "ratios": {
            "8 tenants' cocktails over the plain base": (ratio(runs, "8 tenants", "plain"), f">= {target}"),
            "64 tenants' over 8 tenants'": (ratio(runs, "64 tenants", "8 tenants"), ">= 0.97"),
            "base requests through the gateway over the plain base": (ratio(runs, "base", "plain"), None),
        },
    }


async def base(bench: Bench) -> dict[str, Any]:
    with bench.gateway("unmerged", "bare") as server:
        async with bench.tenants(server, 8) as owners:
            pools = ("unmerged", "bare")
            runs = await bench.in_turn(
                {pool: bench.tokens_per_s([(owner, bench.chat(pool)) for owner in owners]) for pool in pools}
            )
    return {
        "tokens_per_s": runs,
        "ratios": {"base requests with adapters over without": (ratio(runs, "unmerged", "bare"), ">= 0.98")},
    }


async def turns(bench: Bench) -> dict[str, Any]:
    """Fewer and longer runs: where recipes take turns, each of 8, or of 16 that are waited for, has two seconds."""
    with bench.gateway("unmerged", "merged") as server:
        async with bench.tenants(server, 64) as owners:
            runs = {}
            for pool in ("unmerged", "merged"):
                own = await cocktails(bench, pool, owners)
                seconds = bench.arguments.seconds * (1 if pool == "unmerged" else 4)
                runs |= {f"{pool} {count}": bench.tokens_per_s(own[:count], seconds=seconds) for count in (8, 64)}
            found = await bench.in_turn(runs, rounds=max(1, bench.arguments.runs // 2))
    return {
        "tokens_per_s": found,
        "ratios": {
            "over turns, 8 tenants": (ratio(found, "unmerged 8", "merged 8"), ">= 3"),
            "over turns, 64 tenants": (ratio(found, "unmerged 64", "merged 64"), ">= 8"),
        },
    }


async def few(bench: Bench) -> dict[str, Any]:
    """Where merged parameters, which a recipe has to itself, may be the faster: few recipes, many tokens a step.

    The long questions are too many for the prefix cache to have met them, and answered with four tokens.
    """
    shapes: dict[str, dict[str, Any]] = {
        "": {"max_tokens": bench.arguments.max_tokens},
        ", long prompts": {"max_tokens": 4, "num_words": 55, "num_questions": 2000},
    }
    asked = [(1, ""), (2, ""), (4, ""), (1, ", long prompts")]
    with bench.gateway("unmerged", "merged") as server:
        async with bench.tenants(server, 4) as owners:
            runs = {}
            for pool in ("unmerged", "merged"):
                for count, shape in asked:
                    chat = partial(bench.chat, **shapes[shape])
                    own = await cocktails(bench, pool, owners[:count], chat)
                    runs[f"{pool} {count}{shape}"] = bench.tokens_per_s(own, max_tokens=shapes[shape]["max_tokens"])
            found = await bench.in_turn(runs)
    ratios = {
        f"over merged, {count} recipes{shape}": (
            ratio(found, f"unmerged {count}{shape}", f"merged {count}{shape}"),
            None,
        )
        for count, shape in asked
    }
    return {"tokens_per_s": found, "ratios": ratios}


async def lora(bench: Bench) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="adapters-", dir=bench.folder))
    ranks = {
        f"recipe-{seed}": make_one_adapter(folder / f"recipe-{seed}", bench.models, mixture(seed)) for seed in range(8)
    }
    args = {
        "enable-lora": True,
        "max-loras": len(ranks),
        "max-lora-rank": next(rank for rank in VLLM_RANKS if rank >= max(ranks.values())),
        "lora-modules": [f"{name}={folder / name}" for name in ranks],
    }
    with bench.vllm(args) as (url, _), bench.gateway("unmerged") as server:
        async with keyless(url) as anybody, bench.tenants(server, 8) as owners:
            runs = await bench.in_turn(
                {
                    "unmerged": bench.tokens_per_s(await cocktails(bench, "unmerged", owners)),
                    "lora": bench.tokens_per_s([(anybody, bench.chat(name)) for name in ranks]),
                }
            )
    return {
        "tokens_per_s": runs,
        "max_lora_rank": args["max-lora-rank"],
        "ratios": {"over vLLM's own LoRA": (ratio(runs, "unmerged", "lora"), ">= 8")},
    }


async def fairness(bench: Bench) -> dict[str, Any]:
    with bench.gateway("unmerged") as server:
        async with bench.tenants(server, 2) as (one, flood):
            (_, mine), *_ = await cocktails(bench, "unmerged", [one])
            asks = []
            for seed in range(8):
                body = {"name": f"flood-{seed}", "pool": "unmerged", "merging_weights": mixture(100 + seed)}
                asks.append(bench.chat((await flood.make(body))["id"]))
            seconds = 3 * bench.arguments.seconds
            found = await measure_beside_flood(one, flood, mine, asks, clients=32, seconds=seconds)
    return {**found, "ratios": {"p95 beside a flood over alone": (found["ratio_p95"], "<= 1.5")}}


async def first_token(bench: Bench) -> dict[str, Any]:
    """One client, in turn: the base, and cocktails that nobody asked before: given with the request, or made before it.

    `again` asks the one that was made once more: what a cocktail takes that is no longer new.
    """
    seconds: dict[str, list[float]] = {"base": [], "inline": [], "made": [], "again": [], "making": []}
    with bench.gateway("unmerged") as server:
        async with bench.tenants(server, 1) as (tenant,):
            chat = partial(bench.chat, max_tokens=4, stream=True)
            for number in range(-5, bench.arguments.asked):
                started = time.perf_counter()
                body = {"name": "never-asked", "pool": "unmerged", "merging_weights": mixture(1000 + number)}
                made = await tenant.make(body)
                found = {"making": time.perf_counter() - started}
                other = {"merging_weights": mixture(100_000 + number)}
                asks = {
                    "base": chat("unmerged"),
                    "inline": chat("unmerged", cocktail=other),
                    "made": chat(made["id"]),
                }
                for name, ask in random.Random(number).sample(sorted(asks.items()), len(asks)):
                    found[name], _ = await tenant.ask(ask, number + 5)
                found["again"], _ = await tenant.ask(asks["made"], number + 6)
                for name, value in found.items() if number >= 0 else ():
                    seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "median_s": {name: round(value, 4) for name, value in medians.items()},
        "ratios": {
            "first token of a cocktail never asked, over the base's": (medians["made"] / medians["base"], "<= 1.1"),
            "the same, given with the request": (medians["inline"] / medians["base"], "<= 1.1"),
        },
    }


async def examples(bench: Bench) -> dict[str, Any]:
    """Nine models, five examples that nobody scored before: each of about 50 tokens, the median of the tasks that
    `docs/results.md` is about; the bench's tokenizer makes a token of each letter."""
    found: dict[str, list[float]] = {"seconds": [], "made_s": []}
    with bench.gateway("unmerged") as server:
        async with bench.tenants(server, 1) as (tenant,):
            for number in range(-1, bench.arguments.runs):
                rows = [
                    {"input": words(1000 * number + n, 7), "output": words(1000 * number + 500 + n, 2)}
                    for n in range(5)
                ]
                await asyncio.sleep(PAUSE_S)
                started = time.perf_counter()
                made = await tenant.make({"name": f"cocktail{number}", "pool": "unmerged", "examples": rows})
                made_s = time.perf_counter() - started
                first, _ = await tenant.ask(bench.chat(made["id"], max_tokens=4, stream=True), number + 1)
                if number >= 0:
                    found["made_s"].append(round(made_s, 3))
                    found["seconds"].append(round(made_s + first, 3))
    target = 0.6 if bench.shape.dtype == "float32" else 2.5
    seconds = statistics.median(found["seconds"])
    return {**found, "ratios": {"examples to first token, seconds": (seconds, f"<= {target}")}}


async def learned(bench: Bench) -> dict[str, Any]:
    """Examples as of `examples`, coefficients learned from them; the traffic is four clients of the base."""
    seconds: dict[str, list[float]] = {"alone": [], "beside traffic": []}
    latencies: dict[str, list[float]] = {"without": [], "beside": []}
    with bench.gateway("unmerged") as server:
        async with bench.tenants(server, 2) as (maker, busy):
            ask = bench.chat("unmerged", max_tokens=16)

            async def learn(number: int) -> float:
                rows = [{"input": words(10 * number + n, 7), "output": words(10 * number + n, 2)} for n in range(5)]
                body = {"name": f"learned{number}", "pool": "unmerged", "examples": rows, "weighting": "gradient"}
                started = time.perf_counter()
                await maker.make(body)
                return time.perf_counter() - started

            async def client(goes_on: Callable[[], bool], into: list[float]) -> None:
                for number in itertools.count():
                    if not goes_on():
                        return
                    into.append((await busy.ask(ask, number))[1])

            await learn(0)
            for number in range(1, bench.arguments.runs + 1):
                seconds["alone"].append(await learn(2 * number))
                making = asyncio.create_task(learn(2 * number + 1))
                goes_on = lambda making=making: not making.done()  # noqa: E731
                await asyncio.gather(*(client(goes_on, latencies["beside"]) for _ in range(4)))
                seconds["beside traffic"].append(await making)
                until = time.perf_counter() + seconds["beside traffic"][-1]
                goes_on = lambda until=until: time.perf_counter() < until  # noqa: E731
                await asyncio.gather(*(client(goes_on, latencies["without"]) for _ in range(4)))
    p99 = {name: statistics.quantiles(values, n=100, method="inclusive")[98] for name, values in latencies.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "p99_s": {name: round(value, 3) for name, value in p99.items()},
        "answers": {name: len(values) for name, values in latencies.items()},
        "ratios": {
            "learned from five examples, seconds": (medians["alone"], "<= 10"),
            "the same beside traffic, seconds": (medians["beside traffic"], "<= 30"),
            "p99 of traffic beside learning, over without": (p99["beside"] / p99["without"], "<= 1.2"),
        },
    }


async def memory(bench: Bench) -> dict[str, Any]:
    """As many requests of one token on both sides, each with KV blocks of its own: what serving takes is on both.

    The KV cache is small: its pages are taken as blocks are first written, and every recipe writes others.
    """
    count = bench.arguments.cocktails
    memory_mib: dict[str, dict[str, float]] = {}

    async def ask_all(tenant: Tenant, asks: Iterator[Callable[[], Awaitable[Ask]]]) -> int:
        async def client() -> int:
            answers = 0
            for ask in asks:
                await tenant.ask(await ask(), answers)
                answers += 1
            return answers

        return sum(await asyncio.gather(*(client() for _ in range(bench.arguments.clients))))

    async def of_base(seed: int) -> Ask:
        return bench.chat(PLAIN, max_tokens=1, cache_salt=f"salt-{seed}")

    with bench.gateway("unmerged", args=SMALL_KV_CACHE) as server:
        async with bench.tenants(server, 1) as (tenant,):

            async def of_cocktail(seed: int) -> Ask:
                name = f"cocktail-{seed}"
                made = await tenant.make({"name": name, "pool": "unmerged", "merging_weights": mixture(seed)})
                return bench.chat(made["id"], max_tokens=1)

            gateway = psutil.Process(server.process.pid)
            until = time.perf_counter() + bench.arguments.memory_s
            seeds = itertools.takewhile(lambda _: time.perf_counter() < until, range(1000, count))
            made = await ask_all(tenant, (partial(of_cocktail, seed) for seed in range(min(count, 1000))))
            memory_mib["1000 cocktails"] = worker_memory(gateway)
            made += await ask_all(tenant, (partial(of_cocktail, seed) for seed in seeds))
            memory_mib["all cocktails"] = worker_memory(gateway)
    with bench.vllm(SMALL_KV_CACHE) as (url, process):
        async with keyless(url) as anybody:
            await ask_all(anybody, (partial(of_base, seed) for seed in range(min(made, 1000))))
            memory_mib["plain, 1000 requests"] = worker_memory(process)
            await ask_all(anybody, (partial(of_base, seed) for seed in range(1000, made)))
            memory_mib["plain"] = worker_memory(process)
    over = memory_mib["all cocktails"]["resident_mib"] - memory_mib["plain"]["resident_mib"]
    factors_mib = factor_bytes(bench) / 2**20
    return {
        "cocktails": made,
        "worker": memory_mib,
        "factors_mib": factors_mib,
        "ratios": {"resident memory over the plain base, MiB": (over, f"<= {2.2 * factors_mib + 50:.0f}")},
    }


def factor_bytes(bench: Bench) -> int:
    """Of all experts, in the engine's dtype."""
    from safetensors.torch import load_file

    experts = (folder for name, folder in bench.models.items() if name != "base")
    factors = (factor for folder in experts for factor in load_file(folder / "adapter_model.safetensors").values())
    return sum(factor.numel() for factor in factors) * (4 if bench.shape.dtype == "float32" else 2)


def worker_memory(first: psutil.Process) -> dict[str, float]:
    """Of the largest of a server's processes, which is vLLM's worker."""
    found = max(
        (process.memory_full_info() for process in first.children(recursive=True)), key=lambda memory: memory.rss
    )
    return {"resident_mib": round(found.rss / 2**20, 1), "unshared_mib": round(found.uss / 2**20, 1)}


PARTS: Mapping[str, Callable[[Bench], Awaitable[dict[str, Any]]]] = {
    "throughput": throughput,
    "base": base,
    "turns": turns,
    "few": few,
    "lora": lora,
    "fairness": fairness,
    "first-token": first_token,
    "examples": examples,
    "learned": learned,
    "memory": memory,
}


async def measure(bench: Bench, part: str) -> dict[str, Any]:
    """One part, and what the machine did besides."""
    started, load = time.perf_counter(), os.getloadavg()[0]
    found = await PARTS[part](bench)
    loads = [round(load, 1), round(os.getloadavg()[0], 1)]
    return {**found, "load_average": loads, "took_s": round(time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="small")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help="as turns,lora")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of one run")
    parser.add_argument("--runs", type=int, default=5, help="of each, in turn")
    parser.add_argument("--asked", type=int, default=60, help="requests of each kind whose first token is timed")
    parser.add_argument("--cocktails", type=int, default=10_000, help="of the part memory")
    parser.add_argument("--memory-s", type=float, default=150.0, help="how long it makes them at most")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no parts {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers end with it
    shape = SHAPES[arguments.model]
    with tempfile.TemporaryDirectory(prefix="rows-") as name:
        models = make_pool(Path(name) / "models", shape, NUM_EXPERTS)
        bench = Bench(Path(name), shape, models, arguments, admin_key=secrets.token_hex(16))
        parts = {}
        for part in arguments.parts:
            parts[part] = asyncio.run(measure(bench, part))
            print(f"{part}: {parts[part]}", file=sys.stderr, flush=True)
    ratios = {
        what: {"measured": round(value, 3), "target": target}
        for found in parts.values()
        for what, (value, target) in found.pop("ratios").items()
    }
    settings = {**vars(arguments), "shape": dataclasses.asdict(shape)}
    print(json.dumps({"machine": describe_machine(), "settings": settings, "ratios": ratios, "parts": parts}, indent=2))


if __name__ == "__main__":
    main()
