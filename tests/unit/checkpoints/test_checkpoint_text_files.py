"""The digest of what stands between text and parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.checkpoints.text_files import read_pooling, text_digest
from cocktail_serve.checkpoints.tokenizer import FolderTokenizer
from cocktail_serve.errors import CheckpointError

Folders = dict[str, Path]
Copy = Callable[..., Path]
Edit = Callable[..., None]


def digest(folder: Path, **prompts: str) -> str:
    return text_digest(folder, prompts=prompts)


def test_models_that_read_text_the_same_way_have_one_digest(decoders: Folders, encoders: Folders) -> None:
    assert digest(decoders["base"]) == digest(decoders["nq"])
    assert digest(encoders["base"]) == digest(encoders["quora"])
    assert digest(decoders["base"]) != digest(encoders["base"])


def test_pooling_and_normalisation_count(encoders: Folders, cls_encoders: Folders) -> None:
    assert digest(encoders["base"]) != digest(cls_encoders["base"])


def test_prompts_count(encoders: Folders) -> None:
    assert digest(encoders["base"], query="q: ") != digest(encoders["base"])


@pytest.mark.parametrize(
    ("file", "changes", "counts"),
    [
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, True),
        ("tokenizer_config.json", {"model_max_length": 5}, True),
        ("tokenizer_config.json", {"name_or_path": "/home/someone"}, False),
        ("modules.json", None, True),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, True),
        ("config_sentence_transformers.json", {"prompts": {"query": "q: "}}, True),
        ("config_sentence_transformers.json", {"__version__": {"torch": "9"}}, False),
        ("sentence_bert_config.json", {"max_seq_length": 7}, True),
        ("config.json", {"initializer_range": 0.5}, False),
        ("README.md", None, False),
    ],
    ids=str,
)
def test_what_counts(
    encoders: Folders, copy: Copy, edit_json: Edit, *, file: str, changes: dict[str, Any] | None, counts: bool
) -> None:
    folder = copy(encoders["base"])
    if changes is not None:
        edit_json(folder / file, **changes)
    elif file == "modules.json":
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text())[:2]))
    else:
        (folder / file).write_text("text")
    assert (digest(folder) != digest(encoders["base"])) is counts


def test_the_chat_template_counts_and_the_layout_of_json_does_not(decoders: Folders, copy: Copy) -> None:
    folder = copy(decoders["base"])
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=7, sort_keys=True))
    assert digest(folder) == digest(decoders["base"])
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert digest(folder) != digest(decoders["base"])


@pytest.mark.parametrize("value", ["Infinity", '"\\ud800"'])
def test_what_is_no_json_value_counts_by_its_bytes(decoders: Folders, copy: Copy, value: str) -> None:
    folder = copy(decoders["base"])
    before = text_digest(folder, prompts={})
    (folder / "special_tokens_map.json").write_text(f'{{"unk_token": {value}}}')
    digest = text_digest(folder, prompts={})
    (folder / "special_tokens_map.json").write_text(f'{{"pad_token": {value}}}')
    assert len({before, digest, text_digest(folder, prompts={})}) == 3


def test_a_slow_tokenizer_is_read_by_transformers(encoders: Folders, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    found = FolderTokenizer(tmp_path).written
    assert found is not None
    assert found.vocab["a"] == 5


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert FolderTokenizer(tmp_path).written is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["mean", "max"]}, "mean+max"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({}, "mean"),
    ],
    ids=str,
)
def test_pooling_of_every_release(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_pooling(tmp_path) == expected


def test_pooling_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_pooling(tmp_path)
