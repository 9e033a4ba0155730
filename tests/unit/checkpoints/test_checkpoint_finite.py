"""NaN and infinity: found where a model is fingerprinted, and in a mixture before anybody gets it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cocktail_serve.checkpoints import fingerprint
from cocktail_serve.checkpoints.finite import LARGEST, OVERFLOWS_FROM, largest_and_not_finite
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.mixture import Mixture, iter_mixture
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.checkpoints.tensor_files import tensor_bytes
from cocktail_serve.config import PoolConfig
from cocktail_serve.errors import CheckpointError, NotFiniteError
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import make_recipe
from tests.models import pool_section

Folders = dict[str, Path]
Copy = Callable[..., Path]
WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def edit(folder: Path, name: str, change: Callable[[Tensor], object], dtype: torch.dtype | None = None) -> Path:
    tensors = {n: t.clone().to(dtype or t.dtype) for n, t in load_file(folder / WEIGHTS).items()}
    change(tensors[name])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def open_with(folders: Mapping[str, Path], tmp_path: Path, **engine: Any) -> Pool:
    config = PoolConfig.model_validate(pool_section("flan", "decoder", folders, {"type": "fake", **engine}))
    return open_pool(config, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_largest_and_not_finite_are_those_of_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2**16, (3_000_000 // dtype.itemsize, dtype.itemsize // 2), generator=generator)
    values = bits.to(torch.uint16).view(dtype).reshape(-1)
    is_finite = values.isfinite()
    assert not is_finite.all()
    name = str(dtype).removeprefix("torch.")
    largest, not_finite = largest_and_not_finite(tensor_bytes(values), name)
    assert not_finite == int((~is_finite).sum())
    assert largest == float(values[is_finite].double().abs().max())
    tame = values[is_finite]
    assert largest_and_not_finite(tensor_bytes(tame), name) == (largest, 0)


def test_what_is_not_floating_is_finite() -> None:
    assert largest_and_not_finite(tensor_bytes(torch.full((8,), -1)), "int64") == (0.0, 0)
    assert largest_and_not_finite(memoryview(b""), "float32") == (0.0, 0)


@pytest.mark.parametrize("dtype", LARGEST)
def test_where_a_dtype_ends(dtype: Any) -> None:
    kind = getattr(torch, dtype)
    assert LARGEST[dtype] == torch.finfo(kind).max
    below = torch.tensor(math.nextafter(OVERFLOWS_FROM[dtype], 0.0), dtype=torch.float64)
    if dtype == "float32":  # the others round twice in torch
        assert below.to(kind).isfinite()
    assert torch.tensor(OVERFLOWS_FROM[dtype], dtype=torch.float64).to(kind).isinf()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["base", "nq"])
def test_a_model_that_is_not_finite_is_named_with_tensor_and_count(
    decoders: Folders, copy: Copy, tmp_path: Path, *, name: str, dtype: torch.dtype, value: float
) -> None:
    def break_three(tensor: Tensor) -> None:
        tensor[1, :3] = value

    folders = {n: copy(folder, n) for n, folder in decoders.items()}
    numel = load_file(folders[name] / WEIGHTS)[Q_PROJ].numel()
    edit(folders[name], Q_PROJ, break_three, dtype)
    model = "base" if name == "base" else "expert 'nq'"
    with pytest.raises(
        CheckpointError, match=rf"pool 'flan', {model}: .*'{Q_PROJ}', 3 of {numel:,} elements are infinite or NaN"
    ):
        open_with(folders, tmp_path)


def test_a_factor_that_is_not_finite(decoders: Folders, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shape = load_file(decoders["base"] / WEIGHTS)[Q_PROJ].shape
    module = f"base_model.model.{Q_PROJ.removesuffix('.weight')}"
    factors = {f"{module}.lora_A.weight": torch.ones(2, shape[1]), f"{module}.lora_B.weight": torch.ones(shape[0], 2)}
    factors[f"{module}.lora_B.weight"][0, 0] = math.nan
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    with pytest.raises(CheckpointError, match=r"expert 'lora': .*lora_B\.weight', 1 of"):
        open_with({"base": decoders["base"], "lora": adapter}, tmp_path)


def test_a_fingerprint_that_an_older_release_kept_is_no_proof(
    decoders: Folders, copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has looked at the bytes, not at the numbers."""
    folder = edit(copy(decoders["nq"]), Q_PROJ, lambda tensor: tensor.fill_(math.nan))
    with monkeypatch.context() as older:
        older.setattr(fingerprint, "_ENTRY_VERSION", fingerprint._ENTRY_VERSION - 1)
        older.setattr(fingerprint, "largest_and_not_finite", lambda content, dtype: (0.0, 0))
        fingerprint.identify_folder(folder, cache_dir=tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="infinite or NaN"):
            fingerprint.identify_folder(folder, cache_dir=tmp_path / "cache")


def test_an_adapters_bound_holds_for_what_it_makes(decoders: Folders, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shape = load_file(decoders["base"] / WEIGHTS)[Q_PROJ].shape
    module = f"base_model.model.{Q_PROJ.removesuffix('.weight')}"
    factors = {
        f"{module}.lora_A.weight": torch.full((4, shape[1]), 30.0),
        f"{module}.lora_B.weight": torch.full((shape[0], 4), -20.0),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    pool = open_with({"base": decoders["base"], "lora": adapter}, tmp_path)
    recipe = make_recipe(pool, {"lora": 1.0}, dtype="float32")
    made = dict(iter_mixture(recipe, pool.by_fingerprint))[Q_PROJ].abs().max()
    assert 2 * 4 * 30 * 20 - pool.base.largest <= made <= pool.experts["lora"].largest
    assert pool.experts["lora"].largest == pytest.approx(2 * 4 * 30 * 20 + pool.base.largest)


METHODS = [
    ("linear", {"base": 0.01, "nq": 0.99}, {}),
    ("linear", {"nq": 1.0}, {}),
    ("slerp", {"base": 0.01, "nq": 0.99}, {}),
    ("task_arithmetic", {"nq": 0.5}, {"lambda": 2.5}),
    ("ties", {"nq": 1.0}, {}),
    ("dare_linear", {"nq": 1.0}, {"density": 1.0}),
    ("dare_ties", {"nq": 1.0}, {"density": 1.0}),
]


class TestBeyondTheDtype:
    """A bfloat16 expert with an element of 70,000, over a base in float16."""

    @pytest.fixture
    def pool(self, decoders: Folders, copy: Copy, tmp_path: Path) -> Pool:
        folders = {name: copy(folder, name) for name, folder in decoders.items()}
        for folder in (folders["base"], folders["ag-news"]):
            edit(folder, Q_PROJ, lambda tensor: None, torch.float16)

        def enlarge(tensor: Tensor) -> None:
            tensor[0, 0] = 70_000.0

        edit(folders["nq"], Q_PROJ, enlarge, torch.bfloat16)
        return open_with(folders, tmp_path, dtype="float16")

    @pytest.mark.parametrize(("method", "weights", "params"), METHODS, ids=[m[0] + str(len(m[1])) for m in METHODS])
    def test_names_tensor_models_and_remedy(
        self, pool: Pool, tmp_path: Path, method: str, weights: dict[str, float], params: dict[str, Any]
    ) -> None:
        recipe = make_recipe(pool, weights, dtype="float16", method=method, method_params=params)
        expected = rf"tensor '{Q_PROJ}' of the mixture \({method}: .*nq\) has 1 elements or more that float16 cannot"
        with pytest.raises(NotFiniteError, match=expected) as caught:
            dict(iter_mixture(recipe, pool.by_fingerprint))
        assert "engine.dtype to bfloat16 or float32" in caught.value.message
        with pytest.raises(NotFiniteError, match=expected):
            save_mixture(recipe, pool, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        # both remedies
        wide = make_recipe(pool, weights, dtype="bfloat16", method=method, method_params=params)
        assert all(tensor.isfinite().all() for _, tensor in iter_mixture(wide, pool.by_fingerprint))

    def test_smaller_weights_help(self, pool: Pool, tmp_path: Path) -> None:
        recipe = make_recipe(pool, {"base": 0.5, "nq": 0.5}, dtype="float16")
        save_mixture(recipe, pool, tmp_path / "out")
        assert load_file(tmp_path / "out" / WEIGHTS)[Q_PROJ][0, 0].item() == pytest.approx(35_000, rel=0.01)

    def test_what_cannot_overflow_is_not_looked_at(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Mixture, "check_finite", lambda *_: pytest.fail("looked at"))
        recipe = make_recipe(pool, {"base": 0.5, "ag-news": 0.5}, dtype="float16")
        for _ in iter_mixture(recipe, pool.by_fingerprint):
            pass

    def test_a_base_that_its_own_engine_cannot_hold(self, pool: Pool, tmp_path: Path) -> None:
        folders = {"base": pool.experts["nq"].path}
        with pytest.raises(CheckpointError, match=r"base: .*magnitude 70144, and engine\.dtype float16 ends at 65504"):
            open_with(folders, tmp_path, dtype="float16")
        assert open_with(folders, tmp_path, dtype="bfloat16").base.largest == 70144.0


def test_the_largest_element_is_the_models(decoders: Folders, tmp_path: Path) -> None:
    pool = open_with(decoders, tmp_path)
    for name, member in pool.members.items():
        with CheckpointReader(decoders[name]) as reader:
            assert member.largest == max(float(reader.get(tensor).abs().max()) for tensor in reader.tensors)
