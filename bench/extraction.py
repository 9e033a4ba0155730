"""Adapters cut out of a full expert by us and by mergekit, layer by layer, beside the exact decomposition.

    python -m bench.extraction --environment build/mergekit --rank 16 > extraction.json
    python -m bench.extraction --environment build/mergekit --base models/base --expert models/expert --rank 16

Makes mergekit an environment of its own, where there is none yet. Each layer's figure is the Frobenius norm of what the
stored factors lack of the difference, over that of the difference; `exact` is the least that any factors of the rank
can lack. Without folders, an expert of the demo's decoder pool is taken. Tied embeddings are left out: mergekit gives
input and output factors of their own, which make two parameters of one. Times are of whole processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bench.environment import make_environment
from bench.machine import describe_machine
from bench.parity import MERGEKIT
from cocktail_serve.checkpoints.adapters.reader import AdapterReader, read_expert
from cocktail_serve.checkpoints.reader import CheckpointReader, ties_embeddings
from tests.models import pool_section

DEMO = Path(__file__).parent.parent / "examples" / "demo_pool" / "decoder"


def differences(base: Path, expert: Path) -> dict[str, Tensor]:
    """Expert minus base of every matrix that differs, float64; without embeddings where they are tied."""
    with CheckpointReader(base) as mine, read_expert(expert, mine) as theirs:
        found = {
            name: theirs.get(name).double() - mine.get(name).double()
            for name, info in mine.tensors.items()
            if info.is_floating and len(info.shape) == 2
        }
    is_tied = ties_embeddings(base)
    return {name: delta for name, delta in found.items() if delta.any() and not (is_tied and "embed" in name)}


def errors(adapter: Path, base: Path, wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Of an adapter, by layer."""
    with CheckpointReader(base) as mine, AdapterReader(adapter, mine) as reader:
        made = {name: reader.get(name).double() - mine.get(name).double() for name in wanted}
    return {name: float((made[name] - delta).norm() / delta.norm()) for name, delta in wanted.items()}


def least_errors(wanted: Mapping[str, Tensor], rank: int) -> dict[str, float]:
    """By layer, of the exact decomposition in float64."""
    squares = {name: torch.linalg.svdvals(delta).square() for name, delta in wanted.items()}
    return {name: float((values[rank:].sum() / values.sum()).sqrt()) for name, values in squares.items()}


def extract(base: Path, expert: Path, rank: int, folder: Path) -> tuple[Path, float]:
    """By `cocktail-serve extract`; the adapter and the seconds."""
    config = folder / "config.yaml"
    pool = pool_section("bench", "decoder", {"base": base, "expert": expert}, {"type": "fake"})
    config.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": [pool]}))
    out = folder / "ours"
    words = ["extract", str(config), "--pool", "bench", "--rank", str(rank), "--out", str(out), "--json"]
    seconds = _timed([sys.executable, "-m", "cocktail_serve.cli", *words])
    return out / "expert", seconds


def extract_by_mergekit(base: Path, expert: Path, rank: int, folder: Path, *, environment: Path) -> tuple[Path, float]:
    """By `mergekit-extract-lora`, embeddings as factors too; the adapter and the seconds."""
    python = make_environment(environment, [MERGEKIT])
    out = folder / "mergekit"
    words = ["--model", expert, "--base-model", base, "--out-path", out, "--max-rank", rank, "--embed-lora", "--quiet"]
    words += ["--skip-undecomposable"]  # norms: whole ones would make no difference to layers
    words += ["--exclude-regex", "embed|lm_head"] if ties_embeddings(base) else []
    seconds = _timed([str(python.with_name("mergekit-extract-lora")), *map(str, words)])
    return out, seconds


def _timed(command: list[str]) -> float:
    started_at = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return round(time.monotonic() - started_at, 2)


def compare(base: Path, expert: Path, rank: int, *, environment: Path) -> dict[str, Any]:
    """Errors by layer of both tools and the exact decomposition."""
    wanted = differences(base, expert)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter, seconds = extract(base, expert, rank, folder)
        other, other_seconds = extract_by_mergekit(base, expert, rank, folder, environment=environment)
        found = {
            "exact": least_errors(wanted, rank),
            "ours": errors(adapter, base, wanted),
            "mergekit": errors(other, base, wanted),
        }
    over = {
        tool: [found[tool][layer] / least for layer, least in found["exact"].items()] for tool in ("ours", "mergekit")
    }
    return {
        "rank": rank,
        "num_layers": len(wanted),
        "seconds": {"ours": seconds, "mergekit": other_seconds},
        "over_exact": {
            tool: {"median": statistics.median(ratios), "largest": max(ratios)} for tool, ratios in over.items()
        },
        "layers": {layer: {tool: found[tool][layer] for tool in found} for layer in wanted},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="Folder of mergekit's environment.")
    parser.add_argument("--base", type=Path, default=DEMO / "base")
    parser.add_argument("--expert", type=Path, default=DEMO / "capitals")
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    result = compare(options.base.resolve(), options.expert.resolve(), options.rank, environment=options.environment)
    json.dump({"machine": describe_machine(), "mergekit": MERGEKIT, **result}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
