"""Decisions: how right their probabilities are, and how many questions a second are answered.

    python -m bench.decisions accuracy --pools POOLS --data DATA --out decisions.jsonl
    python -m bench.decisions speed --model MODEL

`accuracy`, over HTTP, real vLLM behind: base, best expert (by its loss on the examples) and a cocktail of five rows of
each task answer its test rows, read verbatim and by labels. Accuracy, mean log-loss (nats), Brier score and expected
calibration error (15 bins of the winner's probability). Each measurement is a line of the file; run again, it goes on
where it was, and prints the table of what is there. Without labels of its own, a task has those of its rows: its
outputs.

`speed`: twenty questions of four options over one input of about 500 tokens as one request for decisions, and as a chat
request each (eight tokens at most), one after the other and all at once. Every run has an input that was not seen
before; chats share what they begin with through vLLM's prefix cache as decisions do. Prints JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

from bench.machine import describe_machine
from bench.server import RunningServer, running_server
from cocktail_serve.errors import ServerError
from cocktail_serve.evaluation.calibration import brier_score, expected_calibration_error
from cocktail_serve.examples import read_jsonl
from tests.models import pool_section

POOL = "pool"
TASKS = ("ag_news", "sst2", "mrpc", "sick_nli", "rte", "tweet_irony", "cola", "csqa", "clinc150", "banking77")
EXPERTS = ("ag_news", "clinc150", "commongen", "mrpc", "nl2bash", "nq_open", "sick_nli", "sst2")
READINGS = ("verbatim", "labels")
NUM_EXAMPLES = 5
MAX_LABELS = 26
SEED = 13
NUM_QUESTIONS = 20


def load_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of a file with their choices."""
    rows = read_jsonl(folder.read_text())
    outputs = sorted({row["output"] for row in rows})
    return [{"choices": outputs, **row} for row in rows]


def sample(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return random.Random(SEED).sample(list(rows), min(count, len(rows)))


def measured_of(server: RunningServer, model: str, rows: Sequence[dict[str, Any]], reading: str) -> dict[str, Any]:
    """What a model answers to rows, beside what is right."""
    probabilities, answers = [], []
    started = time.perf_counter()
    for row in rows:
        choices = row["choices"]
        question = {"type": "choice", "instructions": "", "choices": [{"value": choice} for choice in choices]}
        body = {"model": model, "input": row["input"], "questions": [question], "reading": reading}
        (answer,) = server.post("/v1/decisions", body)["answers"]
        probabilities.append([each["probability"] for each in answer["probabilities"]])
        answers.append(choices.index(row["output"]))
    right = [int(np.argmax(each)) == answer for each, answer in zip(probabilities, answers, strict=True)]
    of_answers = [each[answer] for each, answer in zip(probabilities, answers, strict=True)]
    return {
        "rows": len(rows),
        "accuracy": float(np.mean(right)),
        "log_loss": float(-np.mean(np.log(np.maximum(of_answers, 1e-300)))),
        "brier": float(np.mean([brier_score(*each) for each in zip(probabilities, answers, strict=True)])),
        "ece": expected_calibration_error(probabilities, answers),
        "seconds": time.perf_counter() - started,
    }


def systems_of(server: RunningServer, task: str, examples: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Model ids by system; the best expert and the cocktail are by the same examples."""
    rows = [{"input": row["input"], "choices": row["choices"], "answer": row["output"]} for row in examples]
    body = {"name": f"decided-{task.replace('_', '-')}", "pool": POOL, "examples": rows}
    made = server.post("/v1/cocktails?wait=60", body)
    while made["status"] not in ("ready", "failed"):
        time.sleep(1)
        made = server.http.get(f"/v1/cocktails/{made['id']}").json()
    if made["status"] == "failed":
        raise ServerError(f"the cocktail of {task} failed: {made['error']}")
    losses = {name: loss for name, loss in made["losses"].items() if name != "base"}
    best = min(losses, key=losses.__getitem__)
    return {"base": POOL, "best expert": f"{POOL}/{best}", "cocktail": made["id"]}


@contextmanager
def served(pools: Path, folder: Path, engine: Mapping[str, Any]) -> Iterator[RunningServer]:
    """A server of the pool in a folder."""
    folders = {name: pools / name for name in ("base", *EXPERTS) if (pools / name / "config.json").exists()}
    config = folder / "config.yaml"
    section = pool_section(POOL, "decoder", folders, {"type": "vllm", **engine})
    config.write_text(yaml.safe_dump({"store": {"cache_dir": str(folder / "cache")}, "pools": [section]}))
    with running_server(config, log=folder / "server.log") as server:
        server.http.timeout = httpx.Timeout(600)
        yield server


def run_accuracy(arguments: argparse.Namespace) -> None:
    done = {key_of(row): row for row in read_jsonl(arguments.out.read_text())} if arguments.out.exists() else {}
    engine = {"dtype": "float32", "args": {"block-size": 32}}
    with tempfile.TemporaryDirectory(prefix="bench-") as name, served(arguments.pools, Path(name), engine) as server:
        for task in arguments.tasks:
            wanted = {(task, system, reading) for system in ("base", "best expert", "cocktail") for reading in READINGS}
            if wanted <= done.keys():
                continue
            test = sample(load_rows(arguments.data / task / "test.jsonl"), arguments.rows)
            systems = systems_of(server, task, sample(load_rows(arguments.data / task / "train.jsonl"), NUM_EXAMPLES))
            for system, model in systems.items():
                for reading in READINGS:
                    key = (task, system, reading)
                    if key in done or (reading == "labels" and len(test[0]["choices"]) > MAX_LABELS):
                        continue
                    figures = measured_of(server, model, test, reading)
                    row = {"task": task, "system": system, "reading": reading, "model": model, **figures}
                    done[key] = row
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)
    print(table(done.values()))
    print(json.dumps(describe_machine()))


def key_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["task"], row["system"], row["reading"]


def table(rows: Iterator[dict[str, Any]] | Any) -> str:
    """Accuracy and calibration error by task, system and reading, as Markdown."""
    by_key = {key_of(row): row for row in rows}
    systems = ("base", "best expert", "cocktail")
    heads = [f"{system}, {reading}" for reading in READINGS for system in systems]
    lines = [f"| task | options | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for task in dict.fromkeys(key[0] for key in by_key):
        cells = []
        for reading in READINGS:
            for system in systems:
                row = by_key.get((task, system, reading))
                cells.append("" if row is None else f"{row['accuracy']:.2f} / {row['ece']:.2f}")
        lines.append(f"| {task} | | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_speed(arguments: argparse.Namespace) -> None:
    words = arguments.words.read_text().split() if arguments.words else [f"word{number % 97}" for number in range(5000)]
    draw = random.Random(SEED)
    results = {}
    for block_size in arguments.block_sizes:
        engine = {
            "dtype": arguments.dtype,
            "max_model_len": 1024,
            "args": {"max-num-seqs": 64, "block-size": block_size},
            "env": {"VLLM_CPU_KVCACHE_SPACE": "2"},
        }
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as name,
            served_alone(arguments.model, Path(name), engine) as server,
        ):
            ways = {
                "verbatim": lambda text, server=server: decide(server, text, "verbatim"),
                "labels": lambda text, server=server: decide(server, text, "labels"),
                "chats in turn": lambda text, server=server: chat(server, text, at_once=1),
                "chats at once": lambda text, server=server: chat(server, text, at_once=NUM_QUESTIONS),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for run in range(arguments.runs + 1):  # the first warms up
                for way, ask in ways.items():
                    text = " ".join(draw.choices(words, k=arguments.num_words))
                    started = time.perf_counter()
                    usage = ask(text)
                    if run:
                        seconds[way].append(time.perf_counter() - started)
            results[f"block size {block_size}"] = {
                "input_tokens_of_a_chat": usage,
                **{way: {"median_s": statistics.median(each), "s": each} for way, each in seconds.items()},
            }
    print(json.dumps({"results": results, "machine": describe_machine()}, indent=2))


OPTIONS = ("yes", "no", "rather", "hardly")


def instructions(number: int) -> str:
    return f"Question {number}: does the text above speak of the matter {number}?"


def decide(server: RunningServer, text: str, reading: str) -> int:
    """Seconds of one request, which asks all questions."""
    questions = [
        {"type": "choice", "instructions": instructions(number), "choices": [{"value": value} for value in OPTIONS]}
        for number in range(NUM_QUESTIONS)
    ]
    body = {"model": POOL, "input": text, "questions": questions, "reading": reading}
    tokens: int = server.post("/v1/decisions", body)["usage"]["input_tokens"]
    return tokens // NUM_QUESTIONS


def chat(server: RunningServer, text: str, *, at_once: int) -> int:
    """The same questions, each a chat."""

    def ask(number: int) -> int:
        content = f"{text}\n\n{instructions(number)}\nAnswer with one of: {', '.join(OPTIONS)}."
        body = {"model": POOL, "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
        tokens: int = server.post("/v1/chat/completions", body)["usage"]["prompt_tokens"]
        return tokens

    with concurrent.futures.ThreadPoolExecutor(at_once) as executor:
        return max(executor.map(ask, range(NUM_QUESTIONS)))


@contextmanager
def served_alone(model: Path, folder: Path, engine: Mapping[str, Any]) -> Iterator[RunningServer]:
    config = folder / "config.yaml"
    section = {"id": POOL, "kind": "decoder", "base": str(model), "engine": {"type": "vllm", **engine}}
    config.write_text(yaml.safe_dump({"store": {"cache_dir": str(folder / "cache")}, "pools": [section]}))
    with running_server(config, log=folder / "server.log") as server:
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True)
    accuracy = what.add_parser("accuracy")
    accuracy.add_argument("--pools", type=Path, required=True, help="folder of base and experts")
    accuracy.add_argument("--data", type=Path, required=True, help="folder of tasks")
    accuracy.add_argument("--out", type=Path, required=True, help="JSON lines, added to")
    accuracy.add_argument("--tasks", nargs="+", default=TASKS)
    accuracy.add_argument("--rows", type=int, default=200)
    accuracy.set_defaults(run=run_accuracy)
    speed = what.add_parser("speed")
    speed.add_argument("--model", type=Path, required=True)
    speed.add_argument("--dtype", default="bfloat16")
    speed.add_argument("--words", type=Path, help="a text whose words inputs are drawn from")
    speed.add_argument("--num-words", type=int, default=400)
    speed.add_argument("--block-sizes", type=int, nargs="+", default=[128, 32])
    speed.add_argument("--runs", type=int, default=5)
    speed.set_defaults(run=run_speed)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
