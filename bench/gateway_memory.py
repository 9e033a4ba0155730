"""What a gateway of decoders takes of memory, and how soon it listens.

    python -m bench.gateway_memory                                 # this tree
    python -m bench.gateway_memory --beside ../an-older-checkout   # and another, in turn

Starts the server of a tree with a pool of pico decoders on the fake engine, twice in each run: with an empty cache, as
the very first time, and again. Memory is the resident set of the gateway's process alone; what it starts for a moment
to read tokenizers is told apart.

Prints JSON: medians over the runs, every run, and the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from bench.machine import describe_machine
from bench.server import free_port
from tests.models import make_decoder_pool, pool_section

HERE = Path(__file__).parents[1]

START_TIMEOUT_S = 120
SAMPLE_S = 0.05

SETTLED_S = 4.0
"""How long memory stays as it is once all that was begun in the background is done; a busy machine takes long."""

EXAMPLES = [
    {"messages": [{"role": "user", "content": f"what is {word}"}, {"role": "assistant", "content": "paris"}]}
    for word in ("the capital", "of france", "the answer")
]


@dataclass
class Helper:
    """The largest resident set, in bytes, of a process beside the gateway that reads models."""

    peak: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--beside", type=Path, help="Folder of another checkout.")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    trees = {"here": HERE, **({} if args.beside is None else {"beside": args.beside.resolve()})}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as folder:
        models = make_decoder_pool(Path(folder) / "models")
        section = pool_section("bench", "decoder", models, {"type": "fake", "max_model_len": 256})
        for number in range(args.runs):
            for name, tree in trees.items():
                place = Path(folder) / f"{name}-{number}"
                place.mkdir()
                config = place / "config.yaml"
                config.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": [section]}))
                runs[name].append(measure(tree, config))
    result = {
        "machine": describe_machine(),
        **{name: {"medians": medians(of), "runs": of} for name, of in runs.items()},
    }
    print(json.dumps(result, indent=2))


def measure(tree: Path, config: Path) -> dict[str, float]:
    """One first start and one later."""
    figures: dict[str, float] = {}
    for start in ("first", "later"):
        with served(tree, config) as (http, gateway, helper, listening_s):
            until(lambda http=http: http.get("/ready").status_code == 200)
            ready = settled(gateway)
            made = http.post("/v1/cocktails?wait=60", json={"name": start, "pool": "bench", "examples": EXAMPLES})
            assert made.json()["status"] == "ready", made.text
            figures |= {
                f"{start}_listening_s": round(listening_s, 2),
                f"{start}_ready_mib": round(ready / 2**20, 1),
                f"{start}_after_a_cocktail_mib": round(gateway.memory_info().rss / 2**20, 1),
                f"{start}_helper_peak_mib": round(helper.peak / 2**20, 1),
            }
    return figures


@contextmanager
def served(tree: Path, config: Path) -> Iterator[tuple[httpx.Client, psutil.Process, Helper, float]]:
    port = free_port()
    started = time.monotonic()
    with (config.parent / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cocktail_serve.cli", "serve", str(config), "--port", str(port)],
            stdout=log,
            stderr=log,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": f"{tree}:{tree / 'plugins'}"},
        )
    gateway, helper, is_over = psutil.Process(process.pid), Helper(), threading.Event()
    watching = threading.Thread(target=watch, args=(gateway, helper, is_over))
    watching.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            until(lambda: http.get("/health").status_code == 200)
            yield http, gateway, helper, time.monotonic() - started
    finally:
        is_over.set()
        watching.join()
        process.terminate()
        process.wait(60)


def watch(gateway: psutil.Process, helper: Helper, is_over: threading.Event) -> None:
    while not is_over.wait(SAMPLE_S):
        for child in gateway.children():
            try:
                if any("library_process" in word for word in child.cmdline()):
                    helper.peak = max(helper.peak, child.memory_info().rss)
            except psutil.NoSuchProcess:
                continue


def settled(process: psutil.Process) -> int:
    """Its resident set, in bytes, once that has not grown by a MiB for a while."""
    seen, since = process.memory_info().rss, time.monotonic()
    while time.monotonic() - since < SETTLED_S:
        time.sleep(SAMPLE_S)
        now = process.memory_info().rss
        if abs(now - seen) >= 2**20:
            seen, since = now, time.monotonic()
    return process.memory_info().rss


def until(condition: Any) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise RuntimeError("the server was not there in time")
        time.sleep(0.02)


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}


if __name__ == "__main__":
    main()
