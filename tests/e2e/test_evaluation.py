"""`eval` against a running server finds what it finds in memory: systems as cocktails made through the API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cocktail_serve.config import load_settings
from cocktail_serve.evaluation.measure import Measuring
from cocktail_serve.evaluation.runs import Run, RunEntry, open_evaluation, run
from cocktail_serve.evaluation.systems import find_systems
from cocktail_serve.evaluation.tasks import load_task, sample_examples
from tests.conftest import Stack

pytestmark = pytest.mark.vllm

DECODER, ENCODER = "capitals", "web"
WORDS = "bank card account money transfer cash pay france paris berlin dog cat bird fish tree red green blue".split()


def make_tasks(folder: Path) -> Path:
    """A task with choices, one of free text, and a retrieval task."""
    tasks = folder / "tasks"
    capitals = [
        {"input": f"the capital of {place} is", "output": WORDS[i % 3], "choices": WORDS[:3]}
        for i, place in enumerate("abcdefghij")
    ]
    free = [{"input": f"what is {word}", "output": "a dog"} for word in WORDS[:4]]
    for name, rows in ((DECODER, capitals), ("free", free)):
        _write(tasks / name / "test.jsonl", rows)
        _write(tasks / name / "train.jsonl", [{"input": row["input"], "output": row["output"]} for row in rows[:4]])
    texts = [f"{a} {b}" for i, a in enumerate(WORDS) for b in WORDS[i + 1 : i + 4]]
    _write(tasks / ENCODER / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    _write(
        tasks / ENCODER / "queries.jsonl",
        [{"_id": f"q{i}", "text": f"{word} {word}"} for i, word in enumerate(WORDS[:9])],
    )
    (tasks / ENCODER / "qrels.tsv").write_text("q\td\tgrade\n" + "".join(f"q{i}\td{3 * i}\t1\n" for i in range(9)))
    _write(tasks / ENCODER / "train.jsonl", [{"query": w, "pos": [f"{w} {w}"], "neg": ["dog"]} for w in WORDS[:3]])
    return tasks


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_config(stack: Stack, folder: Path) -> Path:
    """The served pools, as the server has them."""

    def pool(pool_id: str, kind: str, folders: dict[str, str], engine: dict[str, object]) -> dict[str, object]:
        base = folders.pop("base")
        return {"id": pool_id, "kind": kind, "base": base, "experts": folders, "engine": engine}

    decoders = {name: str(path) for name, path in stack.decoders["tied"].items()}
    encoders = {name: str(path) for name, path in stack.encoders.items()}
    path = folder / "served.yaml"
    pools = [
        pool("tied", "decoder", decoders, {"type": "vllm", "max_model_len": 128, "dtype": "float32"}),
        pool("mini", "encoder", encoders, {"type": "sentence_transformers", "dtype": "float32"}),
    ]
    path.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": pools}))
    return path


def measured(config: Path, pool: str, entries: list[RunEntry], systems: list[str], base_url: str | None) -> Run:
    how = Measuring(max_new_tokens=6)
    with open_evaluation(load_settings(config), pool, how=how, base_url=base_url) as evaluation:
        chosen = find_systems(systems, evaluation.pool.kind)
        return run(evaluation, entries, chosen, temperatures=(0.5,))


def test_a_served_decoder_pool_measures_as_in_memory(stack: Stack, tmp_path: Path) -> None:
    config, tasks = make_config(stack, tmp_path), make_tasks(tmp_path)
    entries = [
        RunEntry(load_task(tasks / name, "decoder"), sample_examples(tasks / name, "decoder"), target="north")
        for name in (DECODER, "free")
    ]
    systems = ["base", "icl", "fine-tuned", "lm-cocktail-2", "lm-cocktail", "best-single", "soup"]
    served = measured(config, "tied", entries, systems, stack.base_url)
    in_memory = measured(config, "tied", entries, systems, None)
    assert [(cell.system, cell.task) for cell in served.cells] == [(c.system, c.task) for c in in_memory.cells]
    for ours, theirs in zip(served.cells, in_memory.cells, strict=True):
        assert list(ours.metrics) == list(theirs.metrics)
        for metric, values in ours.metrics.items():
            assert list(values) == pytest.approx(list(theirs.metrics[metric]), rel=5e-3, abs=1e-6)


def test_a_served_encoder_pool_measures_as_in_memory(stack: Stack, tmp_path: Path) -> None:
    config, tasks = make_config(stack, tmp_path), make_tasks(tmp_path)
    entries = [
        RunEntry(load_task(tasks / ENCODER, "encoder"), sample_examples(tasks / ENCODER, "encoder"), target="faq")
    ]
    systems = ["base", "lm-cocktail-10", "ensemble"]
    served = measured(config, "mini", entries, systems, stack.base_url)
    in_memory = measured(config, "mini", entries, systems, None)
    for ours, theirs in zip(served.cells, in_memory.cells, strict=True):
        assert ours.mean("ndcg@10") == pytest.approx(theirs.mean("ndcg@10"), abs=0.02)
