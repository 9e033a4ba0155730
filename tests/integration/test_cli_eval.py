"""`eval` from the command line: files in, a table out, and plain words where something is wrong."""

import json

import pytest
import yaml

from tests.command_line import refusal, run
from tests.models import make_decoder_pool, pool_section


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    folders = make_decoder_pool(folder / "flan")
    pool = pool_section("flan", "decoder", folders, {"type": "vllm", "max_model_len": 64})
    (folder / "config.yaml").write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": [pool]}))
    (folder / "nq").mkdir()
    rows = [
        {"input": f"the capital of {place} is", "output": "paris", "choices": ["paris", "rome"]} for place in "abcd"
    ]
    for name in ("train", "test"):
        (folder / "nq" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_table_and_files(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["eval", folder / "config.yaml", "--pool", "flan", "--task", folder / "nq", "--limit", 3, "--out", out]
    code, shown, _ = run(capsys, *words, "--systems", "base,fine-tuned,lm-cocktail-10")
    assert code == 0
    assert "nq (accuracy)" in shown
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["base", "fine-tuned", "lm-cocktail-10"]
    assert {path.name for path in out.iterdir()} == {
        "cells",
        "results.json",
        "results.csv",
        "results.md",
        "results.png",
    }
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((out / "results.json").read_text())
    # an expert of the task's name is its target
    assert told["settings"]["tasks"]["nq"] == {"num_rows": 3, "num_given": 4, "num_examples": 4, "target": "nq"}


def test_json_is_one_object(folder, capsys):
    words = ["eval", folder / "config.yaml", "--pool", "flan", "--task", folder / "nq", "--systems", "base"]
    code, shown, _ = run(capsys, *words, "--metric", "loss", "--json")
    assert code == 0
    assert list(json.loads(shown)["cells"][0]["means"]) == ["loss"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--systems", "best"], "there is no system 'best'"),
        (["--metric", "bleu"], "there is no metric 'bleu'"),
        (["--target", "other=nq"], "'other' is none of the tasks"),
        (["--target", "nq"], "is not TASK=VALUE"),
        (["--multitask", "nowhere"], "neither an expert"),
        (["--choice-norm", "words"], "sum, token or byte"),
        (["--metric", "f1", "--systems", "base"], "has none of the metrics"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(folder, capsys, words, said):
    command = ("eval", folder / "config.yaml", "--pool", "flan", "--task", folder / "nq")
    assert said in refusal(capsys, *command, *words)
