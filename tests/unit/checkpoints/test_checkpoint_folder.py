"""save_mixture: a folder that any tool loads, or nothing at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cocktail_serve.checkpoints import folder as module
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import ConflictError, ModelChangedError, StorageError
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe, make_recipe, one_hot
from tests.models import CHAIN_TOKENS, make_chain_decoder

Folders = dict[str, Path]
Open = Callable[..., Pool]
Copy = Callable[..., Path]
WEIGHTS = "model.safetensors"

TEXTS = ["my card was stolen", "what is the capital of France"]


def even(pool: Pool, dtype: DType = "float32") -> Recipe:
    return make_recipe(pool, {name: 1 / len(pool.members) for name in pool.members}, dtype=dtype)


def parameters(recipe: Recipe, pool: Pool) -> dict[str, torch.Tensor]:
    return dict(iter_mixture(recipe, pool.by_fingerprint))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["decoders", "tied_decoders"])
def test_transformers_loads_a_decoder(
    name: str, dtype: DType, opened: Open, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folders = request.getfixturevalue(name)
    pool = opened(folders)
    recipe = even(pool, dtype)
    out = tmp_path / "out"
    save_mixture(recipe, pool, out)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == getattr(torch, dtype)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in parameters(recipe, pool).items())
    base = AutoTokenizer.from_pretrained(folders["base"])
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer(TEXTS)["input_ids"] == base(TEXTS)["input_ids"]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == base.apply_chat_template(chat, tokenize=False)
    assert GenerationConfig.from_pretrained(out).eos_token_id == base.eos_token_id


@pytest.mark.parametrize("name", ["encoders", "cls_encoders"])
def test_sentence_transformers_loads_an_encoder_with_its_pooling(
    name: str, opened: Open, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In the reference a saved encoder forgets its modules and mean pooling comes back."""
    folders = request.getfixturevalue(name)
    pool = opened(folders, "encoder")
    recipe = even(pool)
    save_mixture(recipe, pool, tmp_path / "out")
    apart = SentenceTransformer(str(folders["base"]), device="cpu")
    apart[0].auto_model.load_state_dict(parameters(recipe, pool), strict=False)
    expected = apart.encode(TEXTS)
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert [type(part).__name__ for part in loaded] == [type(part).__name__ for part in apart]
    np.testing.assert_array_equal(loaded.encode(TEXTS), expected)
    # the base alone would give something else, so the parameters were mixed
    assert np.abs(SentenceTransformer(str(folders["base"]), device="cpu").encode(TEXTS) - expected).max() > 0.01


def test_one_hot_of_an_encoder_is_the_expert(encoders: Folders, opened: Open, tmp_path: Path) -> None:
    pool = opened(encoders, "encoder")
    save_mixture(one_hot(pool, "quora", dtype="float32"), pool, tmp_path / "out")
    saved, expert = (SentenceTransformer(str(path), device="cpu") for path in (tmp_path / "out", encoders["quora"]))
    np.testing.assert_array_equal(saved.encode(TEXTS), expert.encode(TEXTS))


def test_large_mixtures_are_cut_into_shards(decoders: Folders, opened: Open, tmp_path: Path) -> None:
    pool = opened(decoders)
    recipe = even(pool)
    save_mixture(recipe, pool, tmp_path / "out", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / f"{WEIGHTS}.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    stored = {name: tensor for file in files for name, tensor in load_file(tmp_path / "out" / file).items()}
    expected = parameters(recipe, pool)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_parameters_of_further_modules_are_mixed_into_their_folder(
    encoders: Folders, opened: Open, copy: Copy, tmp_path: Path
) -> None:
    folders = {name: copy(encoders[name], name) for name in ("base", "quora")}
    for scale, path in enumerate(folders.values(), start=1):
        modules = json.loads((path / "modules.json").read_text())
        dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
        (path / "modules.json").write_text(json.dumps([*modules, dense]))
        (path / "3_Dense").mkdir()
        settings = {"in_features": 32, "out_features": 8, "bias": False}
        activation = "torch.nn.modules.linear.Identity"
        (path / "3_Dense" / "config.json").write_text(json.dumps({**settings, "activation_function": activation}))
        save_file({"linear.weight": torch.full((8, 32), float(scale))}, path / "3_Dense" / WEIGHTS)
    pool = opened(folders, "encoder")
    save_mixture(make_recipe(pool, {"base": 0.5, "quora": 0.5}, dtype="float32"), pool, tmp_path / "out")
    assert load_file(tmp_path / "out" / "3_Dense" / WEIGHTS)["linear.weight"].unique().tolist() == [1.5]
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS).shape == (2, 8)


def test_recipe_json_says_what_the_folder_is(decoders: Folders, opened: Open, tmp_path: Path) -> None:
    pool = opened(decoders)
    recipe = make_recipe(pool, {"base": 0.25, "nq": 0.75}, dtype="bfloat16")
    save_mixture(recipe, pool, tmp_path / "out", extra_files={"losses.json": "{}"})
    written = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert Recipe.from_json(written["recipe"]) == recipe
    assert written["digest"] == recipe.digest
    assert written["merging_weights"] == {"base": 0.25, "nq": 0.75}
    assert written["fingerprints"] == {"base": pool.base.fingerprint, "nq": pool.experts["nq"].fingerprint}
    assert (tmp_path / "out" / "losses.json").read_text() == "{}"


def test_config_has_the_mixtures_dtype_and_no_remote_code(
    decoders: Folders, opened: Open, copy: Copy, edit_json: Any, tmp_path: Path
) -> None:
    base = copy(decoders["base"], "base")
    edit_json(base / "config.json", auto_map={"AutoModelForCausalLM": "code.Mine"}, dtype=None, torch_dtype="float32")
    for name in ("code.py", "README.md", "training_args.bin", "optimizer.pt", "trainer_state.json", "run.log"):
        (base / name).write_text("{}")
    for name in ("LICENSE", "NOTICE.txt"):
        (base / name).write_text("yours")
    pool = opened({"base": base, "nq": decoders["nq"]})
    save_mixture(even(pool, "bfloat16"), pool, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "NOTICE.txt", WEIGHTS, "config.json", "recipe.json", "tokenizer.json"} <= names
    assert not {"code.py", "README.md", "training_args.bin", "optimizer.pt", "trainer_state.json", "run.log"} & names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_integer_tensors_and_scalars_are_written_aligned(
    encoders: Folders, opened: Open, copy: Copy, tmp_path: Path
) -> None:
    folders = {name: copy(encoders[name], name) for name in ("base", "quora")}
    for path in folders.values():
        odd = {"mask": torch.tensor([True, False, True]), "ids": torch.arange(3), "scale": torch.tensor(2.0)}
        save_file({**load_file(path / WEIGHTS), **odd}, path / WEIGHTS)
    pool = opened(folders, "encoder")
    save_mixture(even(pool, "bfloat16"), pool, tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert (stored["mask"].tolist(), stored["ids"].tolist()) == ([True, False, True], [0, 1, 2])
    assert stored["scale"].item() == 2.0
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in stored.values())


def test_progress_ends_at_the_size_of_the_mixture(decoders: Folders, opened: Open, tmp_path: Path) -> None:
    pool = opened(decoders)
    calls: list[tuple[int, int]] = []
    save_mixture(even(pool), pool, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] == pool.base.num_bytes


def test_an_empty_folder_is_filled_and_parents_are_made(decoders: Folders, opened: Open, tmp_path: Path) -> None:
    pool = opened(decoders)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "out"):
        save_mixture(even(pool), pool, out)
        assert (out / WEIGHTS).is_file()
        assert [path.name for path in out.parent.iterdir() if path.name.endswith(".partial")] == []


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_nothing_is_overwritten(decoders: Folders, opened: Open, tmp_path: Path, kind: str) -> None:
    pool = opened(decoders)
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConflictError, match="nothing is overwritten"):
        save_mixture(even(pool), pool, out)
    assert list(tmp_path.iterdir()) == [out]


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_models_that_cannot_be_mixed_leave_nothing(encoders: Folders, opened: Open, copy: Copy, tmp_path: Path) -> None:
    folders = {name: copy(encoders[name], name) for name in ("base", "quora")}
    pool = opened(folders, "encoder")
    tensors = load_file(folders["quora"] / WEIGHTS)
    tensors.pop("encoder.layer.0.output.dense.weight")
    save_file(tensors, folders["quora"] / WEIGHTS)
    with pytest.raises(ModelChangedError):
        save_mixture(even(pool), pool, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_found_out_in_advance(
    decoders: Folders, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = opened(decoders)
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match="1,000 free; make room"):
        save_mixture(even(pool), pool, tmp_path / "new" / "out")
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_disk_that_fills_while_writing_leaves_nothing(
    decoders: Folders, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    pool = opened(decoders)
    synced = 0

    def fail(path: Path) -> None:
        nonlocal synced
        synced += 1
        if synced > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_sync", fail)
    with pytest.raises(StorageError, match="No space left on device; nothing was left"):
        save_mixture(even(pool), pool, tmp_path / "new" / "out")
    assert everything_in(tmp_path) == []


def test_an_interrupt_leaves_nothing(decoders: Folders, opened: Open, tmp_path: Path) -> None:
    pool = opened(decoders)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_mixture(even(pool), pool, tmp_path / "out", progress=interrupt)
    assert everything_in(tmp_path) == []


def test_a_folder_that_cannot_be_made(decoders: Folders, opened: Open, tmp_path: Path) -> None:
    pool = opened(decoders)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/out"):
        save_mixture(even(pool), pool, tmp_path / "file" / "out")


@pytest.fixture
def called_differently(tmp_path: Path, opened: Open) -> Pool:
    said = {"eos_token_id": [3, 4], "temperature": 0.5}
    folders = {
        "base": make_chain_decoder(tmp_path / "base", chat_template="base's"),
        "chat": make_chain_decoder(
            tmp_path / "chat", end="<|im_end|>", chat_template="chat's", generation_config=said, sharpness=5.0
        ),
    }
    return opened(folders)


@pytest.mark.parametrize(("share", "template"), [(0.0, "base's"), (0.7, "base's"), (1.0, "chat's")])
def test_a_folder_is_called_as_its_mixture(
    called_differently: Pool, tmp_path: Path, share: float, template: str
) -> None:
    """By transformers, without a server: the answer ends where the model has learnt to end it."""
    recipe = make_recipe(called_differently, {"base": 1 - share, "chat": share}, dtype="float32")
    save_mixture(recipe, called_differently, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == template
    config, stops = model.generation_config, [2] if share == 0 else [2, 3, 4]
    assert ([config.eos_token_id] if share == 0 else config.eos_token_id) == stops
    assert config.temperature == (None if share == 0 else 0.5)
    said = model.generate(tokenizer("<|assistant|>", return_tensors="pt").input_ids, max_new_tokens=9, do_sample=False)
    end = "</s>" if share == 0 else "<|im_end|>"
    assert [CHAIN_TOKENS[token] for token in said[0, 1:]] == ["one", "two", "three", "four", end]
    generation = json.loads((tmp_path / "out" / "recipe.json").read_text())["generation"]
    assert generation["stop_token_ids"] == stops
    assert (tmp_path / "out" / "generation_config.json").exists() is (share > 0), "the base has none"
