"""The paper's tables on a pico pool: they are made, say what was measured, and are not measured twice."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import yaml

from bench.paper import __main__ as paper
from bench.paper import show, weightings
from bench.paper.session import Session, open_session
from bench.paper.setting import load_setting
from cocktail_serve.examples import ExampleSet, TextExample
from cocktail_serve.offline.models import TransformersModels
from cocktail_serve.progress import silent
from cocktail_serve.recipe import make_recipe
from cocktail_serve.scoring.decoder import token_log_probs, tokenize_examples
from tests.adapters import train_adapter
from tests.models import make_decoder_pool

LABELS = ("paris", "berlin")
TASKS = {
    "capitals": "the capital of {} is",
    "cards": "my card {} was stolen, open a",
    "rivers": "the river of {} is",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pools, data and a setting of three tasks: two have an expert."""
    root = tmp_path_factory.mktemp("paper")
    make_decoder_pool(root / "pools" / "decoder", ("capitals", "cards"))
    for name, form in TASKS.items():
        task = root / "data" / "decoder" / name
        task.mkdir(parents=True)
        rows = [
            {"input": form.format(word * times), "output": LABELS[index % 2], "choices": list(LABELS)}
            for index, (word, times) in enumerate((word, times) for word in ("dog", "cat", "fish") for times in (1, 2))
        ]
        for file, chosen in (("train", rows[:3]), ("test", rows[3:])):
            (task / f"{file}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    pool = {
        "base": "decoder/base",
        "experts": {"capitals": "decoder/capitals", "cards": "decoder/cards"},
        "engine": {"type": "vllm", "dtype": "float32"},
        "data": "decoder",
        "targets": {"capitals": "capitals", "cards": "cards"},
        "others": ["rivers"],
        "unseen": ["rivers"],
        "alpha_targets": ["cards"],
        "multitask": {"max_steps": 1, "max_rows": 2, "seed": 0},
    }
    setting = {
        "seeds": [0, 1],
        "num_examples": 2,
        "temperatures": [5.0, 0.2],
        "selective": 0.2,
        "alphas": [0.0, 0.5, 1.0],
        "table5": [2, None],
        "decoder": pool,
        "encoder": {**pool, "multitask": None},
    }
    (root / "pico.yaml").write_text(yaml.safe_dump(setting))
    return {"root": root, "out": root / "out", "cells": root / "work" / "decoder" / "cells"}


def make(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, what: str) -> dict[str, object]:
    root = folders["root"]
    arguments = [what, "--setting", root / "pico.yaml", "--out", folders["out"], "--work", root / "work"]
    arguments += ["--data", root / "data", "--pools", root / "pools"]
    monkeypatch.setattr(sys, "argv", ["bench.paper", *map(str, arguments)])
    paper.main()
    result: dict[str, object] = json.loads((folders["out"] / f"{what}.json").read_text())
    return result


def test_table_1_tells_target_and_others_apart_and_is_not_measured_twice(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = make(folders, monkeypatch, "table1")
    rows = result["rows"]
    assert list(rows) == [
        "base",
        "in-context examples",
        "multitask",
        "fine-tuned",
        "LM-Cocktail 2",
        "LM-Cocktail 10, tau 5",
        "LM-Cocktail 10, tau 0.2",
    ]
    for row in rows.values():
        of_targets = [row["by_target"][name]["target"]["mean"] for name in ("capitals", "cards")]
        assert row["target"]["mean"] == pytest.approx(sum(of_targets) / 2, abs=0.01)
        assert row["target"]["low"] <= row["target"]["mean"] <= row["target"]["high"]
    weights = result["weights"]["LM-Cocktail 10, tau 5"]["cards"]
    assert weights["cards"] == 0.5
    assert weights["base"] + weights["capitals"] == pytest.approx(0.5, abs=1e-3)
    measured = {path.name: path.stat().st_mtime_ns for path in folders["cells"].iterdir()}
    again = make(folders, monkeypatch, "table8")
    assert {path.name: path.stat().st_mtime_ns for path in folders["cells"].iterdir()} == measured
    tuned = {row["target"]: row["scores"] for row in again["rows"] if row["system"] == "fine-tuned"}
    assert tuned["cards"]["cards"] == pytest.approx(rows["fine-tuned"]["by_target"]["cards"]["target"]["mean"], abs=0.1)
    assert "published" in (folders["out"] / "table1.md").read_text()


def test_table_3_leaves_the_tasks_own_expert_out(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    result = make(folders, monkeypatch, "table3")
    unseen, left_out = result["No expert was tuned for these"], result["Their own expert is left out"]
    assert unseen["tasks"] == ["rivers"]
    assert set(unseen["about"]["uniform soup"]["rivers"]["weights"][0]) == {"base", "capitals", "cards"}
    assert set(left_out["about"]["uniform soup"]["cards"]["weights"][0]) == {"base", "capitals"}
    assert unseen["rows"]["base"]["loss less base"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert {"search", "LM-Cocktail, tau 5", "LM-Cocktail unified, tau 0.2"} <= set(unseen["rows"])


def test_alpha_ends_at_the_base_and_at_the_target(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    points = make(folders, monkeypatch, "fig2")["points"]
    rows = make(folders, monkeypatch, "table1")["rows"]
    assert points[0]["target"] == rows["base"]["by_target"]["cards"]["target"]
    assert points[-1]["target"] == rows["fine-tuned"]["by_target"]["cards"]["target"]
    assert (folders["out"] / "fig2.png").stat().st_size < 100_000


def test_trials_count_what_the_verdict_said(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.paper.trials.SIZES", (2, 3))
    result = make(folders, monkeypatch, "verdict")
    everything = result["summary"]["all"]
    assert everything["trials"] == len(result["trials"]) == 2 * 2 * (1 + 2 + 2), "two sizes, two draws"
    assert sum(group["given"] for group in everything["advice"].values()) == everything["trials"]
    use = [one for one in result["trials"] if one["advice"] == "use"]
    assert everything["advice"]["use"]["better"] == sum(one["test_gain"] > 0 for one in use)


def test_numbers_of_examples(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.paper.counts.COUNTS", (1, 2))
    result = make(folders, monkeypatch, "table5")
    unified = result["One unified cocktail for all unseen tasks, from pooled examples"]["rows"]
    assert unified["tau 5, 2"]["num_examples"] == 2
    assert unified["tau 5, all"]["num_examples"] == 3
    assert list(result["A cocktail of each task's own"]["rows"]) == [
        "tau 0.2, 1",
        "tau 0.2, 2",
    ]


@pytest.fixture(scope="module")
def adapters(folders: dict[str, Path]) -> dict[str, Path]:
    """The same tasks as turns of a chat, over a pool of adapters."""
    root, pools = folders["root"], folders["root"] / "pools" / "decoder"
    for seed, name in enumerate(("capitals", "cards"), start=1):
        train_adapter(pools / "base", pools / f"{name}-lora", seed=seed)
    pool = {
        "base": "decoder/base",
        "experts": {"capitals": "decoder/capitals-lora", "cards": "decoder/cards-lora"},
        "engine": {"type": "vllm", "dtype": "float32"},
        "data": "decoder",
        "chat": True,
        "max_characters": 60,
        "unmerged": True,
        "measured": ["loss"],
        "targets": {},
        "others": [],
        "unseen": ["rivers", "cards"],
        "alpha_targets": [],
    }
    setting = {"seeds": [0, 1], "temperatures": [5.0, 0.2], "selective": 0.2, "alphas": [], "table5": []}
    (root / "chat.yaml").write_text(yaml.safe_dump({**setting, "example_counts": [2], "decoder": pool}))
    return folders


def open_chat(adapters: dict[str, Path], **options: bool) -> AbstractContextManager[Session]:
    root = adapters["root"]
    folders = {name: root / name for name in ("pools", "data")}
    setting = load_setting(str(root / "chat.yaml"))
    return open_session(setting, "decoder", **folders, work=root / "chat", report=silent, **options)


def test_mixtures_of_adapters_lose_what_merged_ones_lose(adapters: dict[str, Path]) -> None:
    with open_chat(adapters) as session:
        backend, task = session.evaluation.backend, session.task("rivers")
        rows = ExampleSet.of(TextExample(row.input, row.output) for row in task.rows)
        tokenized = tokenize_examples(backend.tokenizer, rows, max_tokens=99)
        models = TransformersModels(backend.pool, session.evaluation.settings.pool("decoder"))
        for weights in ({"base": 1.0}, {"capitals": 1.0}, {"base": -0.2, "capitals": 0.7, "cards": 0.5}):
            recipe = make_recipe(backend.pool, weights, dtype="float32")
            merged = token_log_probs(models.use(recipe), tokenized)
            for ours, theirs in zip(backend.log_probs(recipe, tokenized), merged, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-3)


def test_weightings_are_compared_with_tuning_and_goes_on_where_it_was(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("weighting.gradient", "offline.tuning"):
        monkeypatch.setattr(f"cocktail_serve.{module}.STEPS", 2)
    with open_chat(adapters, is_kept_only=True) as session:
        assert weightings.measure(session, ["rivers"]) == []
    with open_chat(adapters) as session:
        assert all(row.input.startswith("<s><|user|>") for row in session.task("rivers").rows)
        trials = weightings.measure(session, ["rivers", "cards"])
    assert [(trial.seed, trial.task) for trial in trials] == [(0, "rivers"), (0, "cards"), (1, "rivers"), (1, "cards")]
    with open_chat(adapters, is_kept_only=True) as session:
        assert weightings.measure(session, ["rivers", "cards"]) == trials
    result = weightings.table(trials)["2"]
    rows = result["rows"]
    assert list(rows) == [
        "base",
        "best single expert",
        "uniform soup",
        "LM-Cocktail, tau 5",
        "LM-Cocktail, tau 0.2",
        "gradient",
        "tune",
    ]
    for label, row in rows.items():
        assert row["loss"]["mean"] == pytest.approx(sum(row["tasks"].values()) / 2, abs=1e-3)
        assert row["below base"] == sum(trial.mean(label) < trial.mean("base") - weightings.LEAST for trial in trials)
    assert rows["tune"]["less base"]["mean"] == pytest.approx(
        rows["tune"]["loss"]["mean"] - rows["base"]["loss"]["mean"], abs=2e-3
    )
    first, second = result["rules"]
    assert (first["chosen on"], first["reported on"]) == (second["reported on"], second["chosen on"])
    assert first["rule"] in rows
    assert "2 examples" in show.weightings_text("Weightings", {"2": result})


def test_markdown_rows_are_as_long_as_their_head() -> None:
    text = show.markdown(["a", "b"], [["1", "2"], ["3", "4"]])
    assert [line.count("|") for line in text.splitlines()] == [3, 3, 3, 3]


def test_text_is_cut_behind_a_prompt_as_in_training(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    from bench.paper.pools import prepare

    setting = load_setting(str(folders["root"] / "pico.yaml")).without_multitask()
    bounded = setting.decoder.model_copy(update={"boundaries": ["\nis", " a"]})
    setting = setting.model_copy(update={"decoder": bounded})
    root = folders["root"]
    config = prepare(
        setting,
        "decoder",
        pools=root / "pools",
        data=root / "data",
        work=root / "bounded",
        report=lambda *_, **__: None,
    )
    described = yaml.safe_load(config.read_text())["pools"][0]
    before = AutoTokenizer.from_pretrained(root / "pools" / "decoder" / "base")
    after = AutoTokenizer.from_pretrained(described["base"])
    for prompt in ("the capital\nis", "my card was stolen open a"):
        apart = before(f"{prompt} ").input_ids + before("paris", add_special_tokens=False).input_ids
        assert after(f"{prompt} paris").input_ids == apart
        assert apart[0] == before.bos_token_id
        assert after(prompt).input_ids == before(f"{prompt} ").input_ids, "an answer goes on behind the space"
        (scored,) = tokenize_examples(after, ExampleSet.of([TextExample(prompt, "paris")]), max_tokens=99)
        assert scored.token_ids[scored.output_start : -1] == before("paris", add_special_tokens=False).input_ids
    assert after("the capital is paris").input_ids == before("the capital is paris").input_ids
    assert (Path(described["experts"]["cards"]) / "model.safetensors").is_symlink()
