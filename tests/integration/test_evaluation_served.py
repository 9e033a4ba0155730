"""`eval` against a running gateway: its encoder pool measures as it does in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from cocktail_serve.errors import ConfigError, EngineError, InvalidRequestError
from cocktail_serve.evaluation.runs import Run, RunEntry, open_evaluation, run
from cocktail_serve.evaluation.systems import find_systems
from cocktail_serve.evaluation.tasks import load_task, sample_examples
from tests.gateways import LiveGateway, live_gateway

WORDS = "bank card account money transfer cash pay france paris berlin dog cat bird fish tree red green blue".split()
SYSTEMS = ["base", "fine-tuned", "lm-cocktail-2", "lm-cocktail", "best-single", "search", "ties", "ensemble"]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with live_gateway(tmp_path_factory.mktemp("served")) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> RunEntry:
    folder = tmp_path_factory.mktemp("tasks") / "web"
    folder.mkdir()
    texts = [f"{a} {b}" for i, a in enumerate(WORDS) for b in WORDS[i + 1 : i + 4]]
    rows = {
        "corpus": [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)],
        "queries": [{"_id": f"q{i}", "text": f"my {word}"} for i, word in enumerate(WORDS[:9])],
        "train": [{"query": f"my {word}", "pos": [f"{word} {word}"], "neg": ["dog"]} for word in WORDS[:3]],
    }
    for name, of_file in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    (folder / "qrels.tsv").write_text("".join(f"q{i}\td{3 * i}\t1\n" for i in range(9)))
    return RunEntry(load_task(folder, "encoder"), sample_examples(folder, "encoder"), target="quora")


def measured(gateway: LiveGateway, entry: RunEntry, base_url: str | None) -> Run:
    with open_evaluation(gateway.settings, "bge", base_url=base_url) as evaluation:
        return run(evaluation, [entry], find_systems(SYSTEMS, "encoder"), temperatures=(0.5,))


def test_a_served_pool_measures_as_in_memory(gateway: LiveGateway, entry: RunEntry) -> None:
    served, in_memory = (measured(gateway, entry, base_url) for base_url in (gateway.base_url, None))
    assert [cell.system for cell in served.cells] == SYSTEMS
    for ours, theirs in zip(served.cells, in_memory.cells, strict=True):
        for metric, values in ours.metrics.items():
            assert list(values) == pytest.approx(list(theirs.metrics[metric]), abs=1e-6), ours.system
        assert ours.about["merging_weights"] == pytest.approx(theirs.about["merging_weights"], abs=1e-4)


def test_systems_are_cocktails_that_a_second_run_finds_again(gateway: LiveGateway, entry: RunEntry) -> None:
    measured(gateway, entry, gateway.base_url)
    listed = httpx.get(f"{gateway.base_url}/cocktails").json()["data"]
    measured(gateway, entry, gateway.base_url)
    assert httpx.get(f"{gateway.base_url}/cocktails").json()["data"] == listed
    assert listed
    assert all(cocktail["name"].startswith("eval-") for cocktail in listed)


def test_what_the_server_refuses_is_said(gateway: LiveGateway, entry: RunEntry) -> None:
    with (
        open_evaluation(gateway.settings, "bge", base_url=gateway.base_url) as evaluation,
        pytest.raises(InvalidRequestError, match="answered 400"),
    ):
        evaluation.backend.mix({"target": "quora", "alpha": 2.0})
    with pytest.raises(ConfigError, match="expert of the served pool"):
        open_evaluation(gateway.settings, "bge", base_url=gateway.base_url, multitask="folder").__enter__()


def test_a_server_that_is_not_there_is_said(gateway: LiveGateway, entry: RunEntry) -> None:
    with (
        open_evaluation(gateway.settings, "bge", base_url="http://127.0.0.1:9/v1") as evaluation,
        pytest.raises(EngineError, match="cannot reach"),
    ):
        evaluation.backend.mix({"target": "quora"})
