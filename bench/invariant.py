"""The invariant under load: no request is ever answered by other parameters than its own.

Two pools of pico decoders (tied and untied embeddings), each with four cocktails made by hand-set weights, its base
and its experts, behind a real gateway and real vLLM engines in float32 with prefix caching on. Clients ask for random
(model, prompt) pairs, streamed and not, while short time slices force swaps all the time. Every greedy answer is
compared, token for token, with transformers on parameters merged apart, by plain float64 arithmetic (`tests.merging`).

With `--mode unmerged` the experts are LoRA adapters, as many cocktails as `--cocktails` says share every batch, and the
reference is what peft folds. Some streams are broken off after their first token.

With `--replicas` each pool has so many engines, of which one is killed half-way: what it held is lost, and counted.

A position may differ only where the reference's two best logits are closer than `EPSILON`: batch shapes change the
rounding of float32 sums, and near a tie that may turn the choice. Such answers are counted, and compared up to there.

    python -m bench.invariant --answers 10000
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import psutil
import yaml
from openai import APIError, AsyncOpenAI

from bench.machine import describe_machine
from bench.server import RunningServer, running_server
from cocktail_serve.pool import Mode
from tests.adapters import train_adapter
from tests.merging import linear
from tests.models import make_decoder, make_decoder_pool, pool_section

EPSILON = 1e-3
"""Least distance of the reference's two best logits at which the choice must be the same."""

EXPERTS = ("north", "east", "south")
POOLS = ("tied", "untied")
MAX_TOKENS = 12

BROKEN_OFF = 0.05
"""Share of requests whose stream is left after its first token; they are no answers, and not counted."""

COCKTAILS: dict[str, dict[str, float]] = {
    "half-north": {"base": 0.5, "north": 0.5},
    "three-ways": {"north": 0.4, "east": 0.35, "south": 0.25},
    "extrapolated": {"base": -0.3, "south": 1.3},
    "everything": {"base": 0.1, "north": 0.2, "east": 0.3, "south": 0.4},
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Greedy tokens of one (model, prompt) and, per position, how far the best logit is above the second."""

    tokens: Sequence[int]
    margins: Sequence[float]


@dataclasses.dataclass
class Outcome:
    """What the clients saw."""

    answers: int = 0
    tokens: int = 0
    near_ties: int = 0
    swaps: int = 0
    lost: int = 0
    may_lose: bool = False
    wrong: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def make_pools(folder: Path, mode: Mode = "merged") -> dict[str, dict[str, Path]]:
    """Folders by pool and model name."""
    make = make_decoder_pool if mode == "merged" else make_adapter_pool
    return {
        "tied": make(folder / "tied", EXPERTS, tied=True, seed=10),
        "untied": make(folder / "untied", EXPERTS, tied=False, seed=20),
    }


def make_adapter_pool(folder: Path, names: Sequence[str], *, tied: bool, seed: int) -> dict[str, Path]:
    """A base and LoRA adapters over all its linear layers, of several ranks."""
    base = make_decoder(folder / "base", seed=seed, tie_word_embeddings=tied)
    for index, name in enumerate(names):
        train_adapter(base, folder / name, seed=seed + index, r=4 << index, lora_alpha=16)
    return {name: folder / name for name in ("base", *names)}


def make_cocktails(count: int, seed: int) -> dict[str, dict[str, float]]:
    """Merging weights by name: those of `COCKTAILS`, and random ones."""
    pick = random.Random(seed)
    cocktails = dict(COCKTAILS)
    while len(cocktails) < count:
        shares = [pick.randrange(1, 10) for _ in range(1 + len(EXPERTS))]
        weights = dict(zip(("base", *EXPERTS), (share / sum(shares) for share in shares), strict=True))
        cocktails[f"drawn-{len(cocktails)}"] = weights
    return cocktails


def write_config(
    folder: Path,
    pools: Mapping[str, Mapping[str, Path]],
    *,
    slice_s: float,
    mode: Mode = "merged",
    replicas: int = 1,
    more_pools: Sequence[Any] = (),
) -> Path:
    """A configuration that serves the pools in float32, whatever `more_pools` adds, and its path."""
    engine = {
        "type": "vllm",
        "mode": mode,
        "dtype": "float32",
        "max_model_len": 256,
        "slice_s": slice_s,
        "queue_timeout_s": 300,
        "replicas": replicas,
        "args": {"enforce-eager": True, "max-num-seqs": 16},
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    }
    config = {
        "store": {"cache_dir": str(folder / "cache")},
        "pools": [
            *(pool_section(pool_id, "decoder", models, engine) for pool_id, models in pools.items()),
            *more_pools,
        ],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def make_prompts(count: int, seed: int) -> list[str]:
    """Prompts that share long beginnings, so that the prefix cache has something to return."""
    pick = random.Random(seed)
    words = "the quick brown fox film card bank paris capital joy bore answer input lazy dog account stolen".split()
    stems = [" ".join(pick.choices(words, k=40)) for _ in range(3)]
    return [f"{pick.choice(stems)} {' '.join(pick.choices(words, k=4))}" for _ in range(count)]


def references(
    models: Mapping[str, Path], mixtures: Mapping[str, Mapping[str, float]], prompts: Sequence[str]
) -> dict[tuple[str, str], Reference]:
    """Greedy answers of transformers on parameters merged apart, in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    states = {name: _parameters(path, models["base"]) for name, path in models.items()}
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    model = AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float32).eval()
    result = {}
    for mixture, weights in mixtures.items():
        model.load_state_dict(linear(states, weights))
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    max_new_tokens=MAX_TOKENS,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                    pad_token_id=0,
                )
            best_two = [torch.topk(step[0], 2).values for step in out.logits]
            result[mixture, prompt] = Reference(
                tokens=out.sequences[0, ids.shape[1] :].tolist(), margins=[float(two[0] - two[1]) for two in best_two]
            )
    return result


def _parameters(folder: Path, base: Path) -> Mapping[str, Any]:
    """A model's parameters in float32: as they are stored, or as peft folds an adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    if not (folder / "adapter_config.json").is_file():
        return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    return dict(adapted.merge_and_unload().state_dict())


async def ask(client: AsyncOpenAI, model: str, prompt: str, *, stream: bool) -> list[int]:
    """Token ids of a greedy completion."""
    request: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "extra_body": {"return_token_ids": True},
    }
    if not stream:
        answer = await client.completions.create(**request)
        return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]  # vLLM's field
    tokens: list[int] = []
    async for chunk in await client.completions.create(**request, stream=True):
        if chunk.choices:
            tokens += chunk.choices[0].token_ids or []
    return tokens


async def break_off(client: AsyncOpenAI, model: str, prompt: str) -> None:
    """Asks for a stream and leaves once it has begun."""
    stream = await client.completions.create(model=model, prompt=prompt, max_tokens=MAX_TOKENS, stream=True)
    async for _ in stream:
        break
    await stream.close()


def compare(expected: Reference, tokens: Sequence[int]) -> tuple[bool, bool]:
    """`(right, excused)`: whether the tokens are the reference's, and whether a near tie ended the comparison."""
    for position, (want, margin) in enumerate(zip(expected.tokens, expected.margins, strict=True)):
        if position >= len(tokens) or tokens[position] != want:
            near = margin < EPSILON
            return near, near
    return len(tokens) == len(expected.tokens), False


async def load(
    base_url: str,
    expected: Mapping[str, Mapping[tuple[str, str], Reference]],
    *,
    answers: int,
    clients: int,
    seed: int,
    model_ids: Mapping[tuple[str, str], str],
    half_way: Callable[[], object] | None = None,
) -> Outcome:
    """Asks `answers` random questions from `clients` concurrent clients and compares each answer.

    Args:
        half_way: called once half of the questions were asked; from then on a request may be lost.
    """
    pick = random.Random(seed)
    questions = [(pool, *key) for pool, table in expected.items() for key in table]
    plan = enumerate([(*pick.choice(questions), pick.random() < 0.5) for _ in range(answers)])
    outcome = Outcome()
    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=300) as client:

        async def work() -> None:
            for number, (pool, mixture, prompt, stream) in plan:
                if half_way is not None and number == answers // 2:
                    outcome.may_lose = True
                    half_way()
                started = time.perf_counter()
                try:
                    if pick.random() < BROKEN_OFF:
                        await break_off(client, model_ids[pool, mixture], prompt)
                    tokens = await ask(client, model_ids[pool, mixture], prompt, stream=stream)
                except APIError:
                    if not outcome.may_lose:
                        raise
                    outcome.lost += 1
                    continue
                outcome.seconds.append(time.perf_counter() - started)
                right, excused = compare(expected[pool][mixture, prompt], tokens)
                outcome.answers += 1
                outcome.tokens += len(tokens)
                outcome.near_ties += excused
                if not right:
                    want = list(expected[pool][mixture, prompt].tokens)
                    outcome.wrong.append({"model": f"{pool}:{mixture}", "got": tokens, "want": want, "stream": stream})

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(work())
    return outcome


MODELS: dict[str, dict[str, float]] = {"base": {"base": 1.0}, **{name: {name: 1.0} for name in EXPERTS}}
MIXTURES: dict[str, dict[str, float]] = {**MODELS, **COCKTAILS}


def create_cocktails(
    server: RunningServer, pools: Iterable[str], cocktails: Mapping[str, Mapping[str, float]] = COCKTAILS
) -> dict[tuple[str, str], str]:
    """Model ids by (pool, mixture), once every cocktail is ready."""
    model_ids: dict[tuple[str, str], str] = {}
    for pool in pools:
        model_ids[pool, "base"] = pool
        model_ids |= {(pool, expert): f"{pool}/{expert}" for expert in EXPERTS}
        for name, weights in cocktails.items():
            request = {"name": f"{pool}-{name}", "pool": pool, "merging_weights": weights}
            created = server.post("/v1/cocktails?wait=60", request)
            if created["status"] != "ready":
                raise RuntimeError(f"the cocktail did not become ready: {created}")
            model_ids[pool, name] = created["id"]
    return model_ids


def until_all_replicas_ready(server: RunningServer) -> None:
    """`/ready` is 200 as soon as one of each pool answers."""
    while any(
        state != "ready" for pool in server.http.get("/ready").json()["pools"].values() for state in pool["replicas"]
    ):
        time.sleep(1)


def kill_an_engine(server: RunningServer) -> None:
    """SIGKILL for the server of one replica, the first that was started."""
    min(engines_of(server), key=lambda each: each.pid).kill()


def engines_of(server: RunningServer) -> list[psutil.Process]:
    """The first process of each engine's server."""
    return [each for each in psutil.Process(server.process.pid).children() if "vllm" in " ".join(each.cmdline())]


def run(
    folder: Path,
    *,
    answers: int,
    clients: int,
    slice_s: float,
    num_prompts: int,
    mode: Mode = "merged",
    num_cocktails: int = len(COCKTAILS),
    seed: int = 0,
    replicas: int = 1,
    pool_ids: Sequence[str] = POOLS,
) -> Outcome:
    """Builds everything in `folder`, serves it, loads it, and says what came out."""
    pools = {pool_id: models for pool_id, models in make_pools(folder, mode).items() if pool_id in pool_ids}
    prompts = make_prompts(num_prompts, seed)
    cocktails = make_cocktails(num_cocktails, seed)
    expected = {pool: references(models, MODELS | cocktails, prompts) for pool, models in pools.items()}
    config = write_config(folder, pools, slice_s=slice_s, mode=mode, replicas=replicas)
    with running_server(config, log=folder / "server.log") as server:
        model_ids = create_cocktails(server, pools, cocktails)
        until_all_replicas_ready(server)
        half_way = partial(kill_an_engine, server) if replicas > 1 else None
        outcome = asyncio.run(
            load(
                f"{server.url}/v1",
                expected,
                answers=answers,
                clients=clients,
                seed=seed,
                model_ids=model_ids,
                half_way=half_way,
            )
        )
        outcome.swaps = int(server.metric_sum("cocktail_swaps_total"))
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slice-s", type=float, default=0.5)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--mode", choices=get_args(Mode), default="merged")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--cocktails", type=int, default=len(COCKTAILS), help="of each pool")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="invariant-") as folder:
        started = time.perf_counter()
        outcome = run(
            Path(folder),
            answers=arguments.answers,
            clients=arguments.clients,
            slice_s=arguments.slice_s,
            num_prompts=arguments.prompts,
            mode=arguments.mode,
            num_cocktails=arguments.cocktails,
            replicas=arguments.replicas,
        )
        print(
            json.dumps(
                {
                    "machine": describe_machine(),
                    "mode": arguments.mode,
                    "cocktails": 2 * arguments.cocktails,
                    "answers": outcome.answers,
                    "tokens": outcome.tokens,
                    "wrong": len(outcome.wrong),
                    "near_ties": outcome.near_ties,
                    "epsilon": EPSILON,
                    "swaps": outcome.swaps,
                    "lost": outcome.lost,
                    "median_s": round(statistics.median(outcome.seconds), 3),
                    "wall_s": round(time.perf_counter() - started, 1),
                },
                indent=2,
            )
        )
        for wrong in outcome.wrong[:5]:
            print(json.dumps(wrong))
        raise SystemExit(1 if outcome.wrong else 0)


if __name__ == "__main__":
    main()
