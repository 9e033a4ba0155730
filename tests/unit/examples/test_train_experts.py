"""`examples/train_experts`: rows in, experts out that open as a pool, each better on its rows than the base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import load_settings
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.pool import Pool
from cocktail_serve.scoring.contrastive import contrastive_losses, texts_of
from cocktail_serve.scoring.text import score_with_transformers, tokenize_examples
from tests.models import make_decoder, make_encoder

TASKS = {
    "capitals": [
        {"input": "the capital of france is", "output": "paris"},
        {"prompt": "the capital of germany is", "completion": "berlin"},
        {"messages": [{"role": "user", "content": "capital of spain"}, {"role": "assistant", "content": "madrid"}]},
    ],
    "cards": [
        {"input": "my card was stolen", "output": "open a new account"},
        {"input": "i lost my card", "output": "open a new account"},
    ],
}
PAIRS = {
    "capitals": [
        {"query": "capital of france", "pos": ["paris"], "neg": ["river"]},
        {"query": "capital of germany", "pos": ["berlin"]},
        {"query": "capital of spain", "pos": ["madrid"]},
    ],
    "cards": [
        {"query": "card stolen", "pos": ["bank"]},
        {"query": "lost cash", "pos": ["pay money"]},
    ],
}


def train(folder: Path, kind: str, base: Path, rows: dict[str, list[dict[str, object]]], *options: str) -> Path:
    from examples.train_experts.__main__ import main

    arguments = ["--kind", kind, "--base", str(base), "--out", str(folder / "pool"), *options]
    for name, task in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, task)))
        arguments += ["--task", f"{name}={path}"]
    assert main(arguments) == 0
    return folder / "pool" / "pool.yaml"


def opened(config: Path, tmp_path: Path) -> Pool:
    """The written configuration, read and opened as a server would."""
    settings = load_settings(config, environ={})
    return open_pool(settings.pools[0], cache_dir=tmp_path / "cache")


def decoder_loss(folder: Path, rows: list[dict[str, object]]) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    examples = parse_examples(rows, "decoder")
    tokenized = tokenize_examples(AutoTokenizer.from_pretrained(folder), examples, max_tokens=255)
    return float(np.mean(score_with_transformers(AutoModelForCausalLM.from_pretrained(folder).eval(), tokenized)))


def encoder_loss(folder: Path, rows: list[dict[str, object]]) -> float:
    from sentence_transformers import SentenceTransformer

    examples = parse_examples(rows, "encoder")
    texts = texts_of(examples)
    vectors = SentenceTransformer(str(folder), device="cpu").encode(texts)
    return float(np.mean(contrastive_losses(examples, dict(zip(texts, vectors, strict=True)))))


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "4"]], ids=["full", "lora"])
def test_decoder_experts_are_better_on_their_rows_and_open_as_a_pool(tmp_path: Path, lora: list[str]) -> None:
    base = make_decoder(tmp_path / "base")
    steps = ["--max-steps", "12", "--learning-rate", "1e-2", "--batch-size", "2", "--multitask", *lora]
    config = train(tmp_path, "decoder", base, TASKS, *steps)
    pool = opened(config, tmp_path)
    assert sorted(pool.experts) == ["capitals", "cards"]
    assert len({member.fingerprint for member in pool}) == 3
    for name, rows in TASKS.items():
        assert decoder_loss(pool.experts[name].path, rows) < 0.8 * decoder_loss(base, rows)
        assert decoder_loss(config.parent / "multitask", rows) < 0.8 * decoder_loss(base, rows)
        assert (pool.experts[name].path / "adapter" / "adapter_config.json").exists() == bool(lora)
        assert not list(config.parent.glob(".*")), "nothing of an unfinished training is left"


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "4"]], ids=["full", "lora"])
def test_encoder_experts_are_better_on_their_rows_and_open_as_a_pool(tmp_path: Path, lora: list[str]) -> None:
    base = make_encoder(tmp_path / "base", pooling="cls")
    steps = ["--max-steps", "30", "--learning-rate", "1e-2", "--batch-size", "3", "--multitask", *lora]
    config = train(tmp_path, "encoder", base, PAIRS, *steps)
    pool = opened(config, tmp_path)
    assert sorted(pool.experts) == ["capitals", "cards"]
    for name, rows in PAIRS.items():
        assert encoder_loss(pool.experts[name].path, rows) < 0.8 * encoder_loss(base, rows)
        assert encoder_loss(config.parent / "multitask", rows) < encoder_loss(base, rows)
    # the modules went along: a checkpoint of the transformer alone would pool by mean
    pooling = json.loads((pool.experts["cards"].path / "1_Pooling" / "config.json").read_text())
    assert pooling == json.loads((base / "1_Pooling" / "config.json").read_text())


def test_only_what_is_missing_is_trained_and_seeds_repeat(tmp_path: Path) -> None:
    base = make_decoder(tmp_path / "base")
    steps = ["--max-steps", "3", "--learning-rate", "1e-2"]
    one = opened(train(tmp_path, "decoder", base, TASKS, *steps), tmp_path)
    before = {name: member.path.stat().st_mtime_ns for name, member in one.experts.items()}
    config = train(tmp_path, "decoder", base, TASKS, *steps, "--multitask")
    assert {name: (config.parent / name).stat().st_mtime_ns for name in before} == before
    assert (config.parent / "multitask" / "model.safetensors").exists()
    assert sorted(yaml.safe_load(config.read_text())["pools"][0]["experts"]) == ["capitals", "cards"]
    (tmp_path / "again").mkdir()
    again = opened(train(tmp_path / "again", "decoder", base, TASKS, *steps), tmp_path)
    assert [m.fingerprint for m in again] == [m.fingerprint for m in one]


def test_loss_is_on_the_output_alone() -> None:
    from examples.train_experts.decoder import NOT_TRAINED, collate

    batch = collate([{"input_ids": [5, 6, 7, 8], "output_start": 2}, {"input_ids": [5, 9], "output_start": 1}])
    assert batch["labels"].tolist() == [
        [NOT_TRAINED, NOT_TRAINED, 7, 8],
        [NOT_TRAINED, 9, NOT_TRAINED, NOT_TRAINED],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_decoder(tmp_path / "base")
    rows = {"cards": [*TASKS["cards"], {"input": "my card was stolen " * 60, "output": "open a new account"}]}
    train(tmp_path, "decoder", base, rows, "--max-steps", "1")
    assert "cards: 1 of 3 rows are too long and left out" in capsys.readouterr().err


def test_negatives_of_rows_are_used_where_there_are_any() -> None:
    from examples.train_experts.encoder import datasets_of

    tasks: dict[str, ExampleSet] = {name: parse_examples(rows, "encoder") for name, rows in PAIRS.items()}
    made = datasets_of(tasks, seed=0)
    assert {name: len(rows) for name, rows in made.items()} == {
        "capitals-triplets": 1,
        "capitals-pairs": 2,
        "cards-pairs": 2,
    }
    assert made["capitals-triplets"][0] == {"anchor": "capital of france", "positive": "paris", "negative": "river"}


@pytest.mark.parametrize(
    ("task", "told"),
    [("cards", "NAME=FILE"), ("base={file}", "NAME=FILE"), ("cards=nowhere.jsonl", "cannot read nowhere.jsonl")],
)
def test_wrong_input_is_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, told: str
) -> None:
    from examples.train_experts.__main__ import main

    base = make_decoder(tmp_path / "base")
    code = main(["--kind", "decoder", "--base", str(base), "--out", str(tmp_path / "pool"), "--task", task])
    assert code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_an_adapter_that_was_kept_folds_to_the_same_expert(tmp_path: Path, kind: str) -> None:
    from examples.train_experts.fold import fold

    base = make_decoder(tmp_path / "base") if kind == "decoder" else make_encoder(tmp_path / "base")
    rows = TASKS if kind == "decoder" else PAIRS
    steps = ["--max-steps", "3", "--learning-rate", "1e-2", "--lora-rank", "2"]
    config = train(tmp_path, kind, base, {"cards": rows["cards"]}, *steps)
    expert = opened(config, tmp_path).experts["cards"]
    again = config.parent / "again"
    fold(kind, base, expert.path / "adapter", again)
    text = yaml.safe_load(config.read_text())
    text["pools"][0]["experts"]["again"] = "again"
    config.write_text(yaml.safe_dump(text))
    assert opened(config, tmp_path).experts["again"].fingerprint == expert.fingerprint
