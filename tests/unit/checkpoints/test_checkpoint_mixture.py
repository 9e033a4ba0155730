"""iter_mixture: parameters of a recipe straight from the models' files, checked before the first one comes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError, InvalidMixError
from cocktail_serve.pool import FileState, Member, Pool
from cocktail_serve.recipe import Recipe, make_recipe, one_hot
from tests.models import make_decoder

Folders = dict[str, Path]
WEIGHTS = "model.safetensors"


def members_of(folders: Mapping[str, Path]) -> dict[str, Member]:
    """Models by a short name in place of their fingerprint, taken as they are now."""

    def files_of(folder: Path) -> tuple[FileState, ...]:
        with contextlib.suppress(CheckpointError), CheckpointReader(folder) as reader:
            return reader.files
        return ()

    return {name: Member(name, folder, name, "float32", 0, files_of(folder)) for name, folder in folders.items()}


def write(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_file(dict(tensors), folder / WEIGHTS)
    return folder


def half_and_half(dtype: DType = "float32") -> Recipe:
    return Recipe("b", (("b", 0.5), ("e", 0.5)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["decoders", "tied_decoders", "encoders"])
def test_is_the_weighted_sum_of_the_stored_parameters(
    name: str, dtype: DType, opened: Callable[..., Pool], request: pytest.FixtureRequest
) -> None:
    folders = request.getfixturevalue(name)
    pool = opened(folders, "encoder" if name == "encoders" else "decoder")
    weights = dict(zip(pool.members, (0.2, 0.5, 0.3), strict=True))
    mixture = dict(iter_mixture(make_recipe(pool, weights, dtype=dtype), pool.by_fingerprint))
    stored = {model: load_file(folder / WEIGHTS) for model, folder in folders.items()}
    assert mixture.keys() == stored["base"].keys()
    for key, tensor in mixture.items():
        exact = sum(weight * stored[model][key].double() for model, weight in weights.items())
        assert tensor.dtype == getattr(torch, dtype)
        torch.testing.assert_close(tensor.double(), exact, rtol=torch.finfo(tensor.dtype).eps, atol=1e-6)


def test_one_hot_is_the_model_itself(decoders: Folders, opened: Callable[..., Pool]) -> None:
    pool = opened(decoders)
    stored = load_file(decoders["nq"] / WEIGHTS)
    mixture = dict(iter_mixture(one_hot(pool, "nq", dtype="float32"), pool.by_fingerprint))
    assert all(torch.equal(mixture[name], stored[name]) for name in stored)


def test_order_is_that_of_the_bases_files(tmp_path: Path) -> None:
    base = make_decoder(tmp_path / "base", max_shard_size="100KB")
    expert = make_decoder(tmp_path / "expert", perturbation_seed=1)
    index = json.loads((base / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    names = [name for name, _ in iter_mixture(half_and_half(), members_of({"b": base, "e": expert}))]
    assert [index[name] for name in names] == sorted(index[name] for name in names)
    assert len(names) == len(index)


def test_two_runs_give_the_same_bits(decoders: Folders, opened: Callable[..., Pool]) -> None:
    pool = opened(decoders)
    recipe = make_recipe(pool, {"base": 0.1, "ag-news": 0.2, "nq": 0.7}, dtype="bfloat16")
    first, second = (dict(iter_mixture(recipe, pool.by_fingerprint)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_models_stored_in_different_dtypes(tmp_path: Path) -> None:
    folders = {
        "b": write(tmp_path / "b", {"w": torch.tensor([1.0, 3.0], dtype=torch.bfloat16)}),
        "e": write(tmp_path / "e", {"w": torch.tensor([2.0, 4.5])}),
    }
    ((_, mixed),) = iter_mixture(half_and_half(), members_of(folders))
    assert mixed.tolist() == [1.5, 3.75]


def test_integers_are_the_bases(tmp_path: Path) -> None:
    """In the reference they come from whichever model is last."""
    ids = torch.arange(4)
    folders = {
        "b": write(tmp_path / "b", {"ids": ids, "w": torch.zeros(1), "mask": torch.tensor([True, False])}),
        "e": write(tmp_path / "e", {"ids": ids.to(torch.int32), "w": torch.ones(1)}),
    }
    mixed = dict(iter_mixture(half_and_half("bfloat16"), members_of(folders)))
    assert mixed["ids"].dtype == torch.int64
    assert mixed["ids"].tolist() == [0, 1, 2, 3]
    assert mixed["mask"].tolist() == [True, False]


def test_integers_come_from_a_base_that_takes_no_part(tmp_path: Path) -> None:
    folders = {
        "b": write(tmp_path / "b", {"ids": torch.arange(2), "w": torch.zeros(1)}),
        "e": write(tmp_path / "e", {"w": torch.ones(1)}),
    }
    mixed = dict(iter_mixture(Recipe("b", (("e", 1.0),), "float32"), members_of(folders)))
    assert mixed["ids"].tolist() == [0, 1]
    assert mixed["w"].tolist() == [1.0]


def test_integers_that_differ_are_reported_before_anything_is_mixed(tmp_path: Path) -> None:
    folders = {
        "b": write(tmp_path / "b", {"a": torch.zeros(1), "ids": torch.arange(2)}),
        "e": write(tmp_path / "e", {"a": torch.zeros(1), "ids": torch.ones(2, dtype=torch.int64)}),
    }
    with pytest.raises(IncompatibleModelsError, match="tensor ids is int64"):
        iter_mixture(half_and_half(), members_of(folders))


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"a": torch.zeros(1), "w": torch.zeros(3)}, r"tensor w: the base has float32\[2\], the expert float32\[3\]"),
        ({"a": torch.zeros(1)}, "tensor w"),
        ({"a": torch.zeros(1), "w": torch.zeros(2), "x": torch.zeros(1)}, "tensor x"),
    ],
    ids=["shape", "missing", "further"],
)
def test_models_that_do_not_fit_are_reported_before_the_first_tensor(
    tmp_path: Path, expert: dict[str, Tensor], message: str
) -> None:
    """An iterator that fails half-way leaves an engine with half a model."""
    folders = {
        "b": write(tmp_path / "b", {"a": torch.zeros(1), "w": torch.zeros(2)}),
        "e": write(tmp_path / "e", expert),
    }
    with pytest.raises(IncompatibleModelsError, match=message):
        iter_mixture(half_and_half(), members_of(folders))


def test_a_corrupt_model_is_reported_before_the_first_tensor(tmp_path: Path) -> None:
    folders = {name: write(tmp_path / name, {"a": torch.zeros(64)}) for name in ("b", "e")}
    whole = (tmp_path / "e" / WEIGHTS).read_bytes()
    (tmp_path / "e" / WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        iter_mixture(half_and_half(), members_of(folders))


def test_a_model_without_a_folder(tmp_path: Path) -> None:
    for folders in ({"b": tmp_path}, {"e": tmp_path}):
        with pytest.raises(InvalidMixError, match="is not among the pool's files"):
            iter_mixture(half_and_half(), members_of(folders))


def test_an_unknown_method(tmp_path: Path) -> None:
    with pytest.raises(InvalidMixError, match="'fisher' is not known"):
        iter_mixture(Recipe("b", (("b", 1.0),), "float32", method="fisher"), members_of({"b": tmp_path}))


def test_tensors_share_no_memory_with_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "b", {"ids": torch.arange(4), "w": torch.ones(4)})
    recipe = Recipe("b", (("b", 1.0),), "float32")
    for _, tensor in iter_mixture(recipe, members_of({"b": folder})):
        tensor.zero_()
    again = dict(iter_mixture(recipe, members_of({"b": folder})))
    assert again["w"].tolist() == [1.0] * 4
    assert again["ids"].tolist() == [0, 1, 2, 3]


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {"logit_scale": torch.tensor(2.0), "none": torch.zeros(0, 3)}
    folders = {"b": write(tmp_path / "b", tensors), "e": write(tmp_path / "e", {n: t + 1 for n, t in tensors.items()})}
    mixed = dict(iter_mixture(half_and_half(), members_of(folders)))
    assert mixed["logit_scale"].item() == 2.5
    assert mixed["none"].shape == (0, 3)
