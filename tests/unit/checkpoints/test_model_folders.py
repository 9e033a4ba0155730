"""Models are found in the layouts that people have: publishers', peft's, a trainer's, the hub's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.checkpoints.model_folders import ModelFolder, find_model_folders
from cocktail_serve.errors import CheckpointError


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path.parent


def model(folder: Path, *architectures: str, **config: Any) -> Path:
    return write(folder / "config.json", {"model_type": "llama", "architectures": list(architectures)} | config)


def llama(folder: Path, **config: Any) -> Path:
    return model(folder, "LlamaForCausalLM", **config)


def adapter(folder: Path, base: str | None = None) -> Path:
    return write(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": base})


def modules(folder: Path, library_class: str | None = None, *, path: str = "") -> Path:
    if library_class is not None:
        write(folder / "config_sentence_transformers.json", {"model_type": library_class})
    part = "sentence_transformers.models.Transformer"
    return write(folder / "modules.json", [{"idx": 0, "name": "0", "path": path, "type": part}])


def found(*folders: Path) -> list[ModelFolder]:
    return find_model_folders(folders)[0]


def names(*folders: Path) -> list[tuple[str, str | None]]:
    return [(each.name, each.kind) for each in found(*folders)]


def test_a_folder_of_models(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    adapter(tmp_path / "billing")
    (tmp_path / "notes").mkdir()
    write(tmp_path / "web" / "config.json", {"theme": "dark"})
    llama(tmp_path / ".cache" / "other")
    assert names(tmp_path) == [("billing", None), ("llama", "decoder")]
    assert names(tmp_path / "llama", tmp_path) == [("llama", "decoder"), ("billing", None)]


@pytest.mark.parametrize(
    ("architecture", "config", "kind"),
    [
        ("LlamaForCausalLM", {}, "decoder"),
        ("GPT2LMHeadModel", {}, "decoder"),
        ("XLMRobertaForSequenceClassification", {}, "reranker"),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "encoder_decoder"),
        ("BertModel", {}, "encoder"),
    ],
)
def test_kinds_by_architecture(architecture: str, config: dict[str, Any], kind: str, tmp_path: Path) -> None:
    assert names(model(tmp_path / "m", architecture, **config)) == [("m", kind)]


@pytest.mark.parametrize(
    ("architecture", "library_class", "kind"),
    [
        ("BertModel", None, "encoder"),
        ("Qwen3ForCausalLM", "SentenceTransformer", "encoder"),
        ("T5EncoderModel", None, "encoder"),
        ("BertForSequenceClassification", "CrossEncoder", "reranker"),
    ],
)
def test_kinds_of_sentence_transformers(
    architecture: str, library_class: str | None, kind: str, tmp_path: Path
) -> None:
    modules(model(tmp_path / "m", architecture), library_class)
    write(tmp_path / "m" / "1_Pooling" / "config.json", {"word_embedding_dimension": 8})
    assert names(tmp_path) == [("m", kind)]


@pytest.mark.parametrize(
    ("library_class", "why"), [("SparseEncoder", "a weight per word"), ("MultiVectorEncoder", "a vector per token")]
)
def test_what_no_pool_takes_is_told(library_class: str, why: str, tmp_path: Path) -> None:
    modules(model(tmp_path / "m", "BertForMaskedLM"), library_class)
    models, left_out = find_model_folders([tmp_path])
    assert (models, [each.folder for each in left_out]) == ([], [tmp_path / "m"])
    assert why in left_out[0].why


def test_what_says_nothing_or_cannot_be_read_is_told(tmp_path: Path) -> None:
    write(tmp_path / "nameless" / "config.json", {"model_type": "llama"})
    (llama(tmp_path / "torn") / "config.json").write_text("{")
    models, left_out = find_model_folders([tmp_path])
    assert models == []
    assert {each.folder.name: each.why.split(":")[0] for each in left_out} == {
        "nameless": "config.json names no architecture ('architectures'), so nothing says what it is",
        "torn": f"cannot read {tmp_path / 'torn' / 'config.json'} as JSON",
    }


def test_adapters_with_names_of_their_own(tmp_path: Path) -> None:
    """peft saves the adapter named default into the folder, and others into folders of it."""
    adapter(tmp_path / "tuned")
    adapter(tmp_path / "tuned" / "billing")
    llama(tmp_path / "base-7b")
    adapter(tmp_path / "base-7b" / "returns")
    llama(tmp_path / "base-7b" / "original")
    assert names(tmp_path) == [("base-7b", "decoder"), ("returns", None), ("tuned", None), ("billing", None)]


def test_of_a_trainers_checkpoints_the_last(tmp_path: Path) -> None:
    for step in (500, 1000, 90):
        adapter(tmp_path / "returns" / f"checkpoint-{step}")
        llama(tmp_path / "whole" / f"checkpoint-{step}")
    llama(tmp_path / "whole")
    models, left_out = find_model_folders([tmp_path])
    assert [(each.name, each.folder.name) for each in models] == [("returns", "checkpoint-1000"), ("whole", "whole")]
    whys = {f"{each.folder.parent.name}/{each.folder.name}": each.why for each in left_out}
    assert whys.keys() == {f"returns/checkpoint-{n}" for n in (500, 90)} | {
        f"whole/checkpoint-{n}" for n in (500, 1000, 90)
    }
    assert whys["returns/checkpoint-90"] == "a checkpoint of a training run: checkpoint-1000 is later"


def test_the_hubs_cache(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--your-org--Llama-3B"
    old, new = "a" * 40, "b" * 40
    for commit in (old, new):
        llama(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(old)
    assert [(each.name, each.folder.name) for each in found(tmp_path)] == [("Llama-3B", old)]


def test_a_folder_that_says_nothing_is_called_by_the_one_around_it(tmp_path: Path) -> None:
    adapter(tmp_path / "refunds" / "final")
    modules(model(tmp_path / "faq" / "0_Transformer", "BertModel").parent, path="0_Transformer")
    assert [each.name for each in found(tmp_path)] == ["faq", "refunds"]


def test_what_a_models_files_say_that_it_was_made_of(tmp_path: Path) -> None:
    base = llama(tmp_path / "Llama-3B")
    card = "---\nlicense: mit\nbase_model:\n- your-org/Llama-3B\n---\n# Tuned\n"
    (llama(tmp_path / "tuned", _name_or_path="/data/llama") / "README.md").write_text(card)
    adapter(tmp_path / "lora", str(base))
    adapter(tmp_path / "other", "your-org/else")
    by_name = {each.name: each for each in found(tmp_path)}
    assert by_name["tuned"].made_of == ("/data/llama", "your-org/Llama-3B")
    assert [by_name["Llama-3B"].is_called(named) for named in by_name["tuned"].made_of] == [False, True]
    assert by_name["Llama-3B"].is_called(by_name["lora"].made_of[0])
    assert not by_name["Llama-3B"].is_called(by_name["other"].made_of[0])


def test_a_card_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    (llama(tmp_path / "m") / "README.md").write_text("---\n: [\n---\n")
    assert found(tmp_path)[0].made_of == ()


def test_links_in_a_ring_end(tmp_path: Path) -> None:
    llama(tmp_path / "m")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert names(tmp_path) == [("m", "decoder")]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        find_model_folders([tmp_path / "none"])
