"""Quantised bases: found and dequantised by their format, served with adapters, and never mixed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from cocktail_serve.checkpoints.adapters.reader import AdapterReader
from cocktail_serve.checkpoints.compatibility import compare
from cocktail_serve.checkpoints.fingerprint import identify
from cocktail_serve.checkpoints.mixture import Mixture
from cocktail_serve.checkpoints.opening import open_expert, open_pool
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.cli import app
from cocktail_serve.config import PoolConfig
from cocktail_serve.errors import CheckpointError, ConfigError, IncompatibleModelsError
from cocktail_serve.offline.models import check_loads
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe
from tests.adapters import train_adapter
from tests.models import make_decoder, pool_section
from tests.quantised import FORMATS, dequantised, is_quantised, packed, quantise

WEIGHTS = "model.safetensors"
PROJECTION = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("full") / "base")


@pytest.fixture(scope="module")
def lora(full: Path) -> Path:
    return train_adapter(full, full.parent / "lora", target_modules=["q_proj", "down_proj", "embed_tokens"]).folder


@pytest.fixture(scope="module", params=FORMATS)
def quantised(request: pytest.FixtureRequest, full: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A base, and what it is quantised by."""
    return quantise(full, tmp_path_factory.mktemp("quantised") / "base", request.param), request.param


@pytest.fixture
def gptq(full: Path, tmp_path: Path) -> Path:
    return quantise(full, tmp_path / "gptq", "gptq")


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_settings(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def opened(base: Path, tmp_path: Path, *, mode: str | None = None, dtype: str = "float16", **experts: Path) -> Pool:
    engine = {"type": "fake", "mode": mode, "dtype": dtype}
    section = pool_section("pico", "decoder", {"base": base, **experts}, engine)
    return open_pool(PoolConfig.model_validate(section), cache_dir=tmp_path / "cache")


def test_parameters_are_those_of_the_model_and_rows_are_dequantised(quantised: tuple[Path, str], full: Path) -> None:
    folder, quantisation = quantised
    wanted = dequantised(full, quantisation)
    rows = torch.tensor([3, 0, 63, 17, 8, 14])
    with CheckpointReader(folder, allow_quantised=True) as reader, CheckpointReader(full) as full_reader:
        assert reader.quantisation is not None
        assert reader.quantisation.method in (quantisation, "compressed-tensors")
        assert dict(reader.parameters) == dict(full_reader.tensors)
        assert set(reader.quantised) == {name for name in wanted if is_quantised(name)}
        assert reader.tensors.keys() == load_file(folder / WEIGHTS).keys()
        for name in reader.parameters:
            if len(reader.parameters[name].shape) == 2:
                found = reader.get_rows(name, rows).float()
                torch.testing.assert_close(found, wanted[name][rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changes", [{"sym": False}, {"sym": False, "checkpoint_format": "gptq_v2"}])
def test_zero_points_of_gptq_are_read_where_it_is_not_symmetric(
    gptq: Path, full: Path, changes: dict[str, Any]
) -> None:
    edit_settings(gptq, **changes)
    stored = 8 if "checkpoint_format" in changes else 7
    word = int(packed(torch.full((8,), stored)))
    edit_tensors(gptq, lambda tensors: [tensors[name].fill_(word) for name in tensors if name.endswith("qzeros")])
    with CheckpointReader(gptq, allow_quantised=True) as reader:
        rows = reader.get_rows(f"{PROJECTION}.weight", torch.arange(64))
    torch.testing.assert_close(rows, dequantised(full, "gptq")[f"{PROJECTION}.weight"], rtol=1e-6, atol=1e-6)


def test_groups_of_gptq_may_be_in_any_order(gptq: Path, full: Path) -> None:
    """`desc_act`: inputs are quantised in the order of their weight, and stored where they were."""
    edit_tensors(gptq, lambda tensors: tensors[f"{PROJECTION}.g_idx"].copy_(torch.arange(128) % 4))
    scales = load_file(gptq / WEIGHTS)[f"{PROJECTION}.scales"].float()
    plain = dequantised(full, "gptq")[f"{PROJECTION}.weight"] / scales.T.repeat_interleave(32, 1)
    with CheckpointReader(gptq, allow_quantised=True) as reader:
        rows = reader.get_rows(f"{PROJECTION}.weight", torch.arange(64))
    torch.testing.assert_close(rows, plain * scales.T.repeat(1, 32), rtol=1e-5, atol=1e-6)


def test_scale_and_zero_points_may_be_one_for_all(full: Path, tmp_path: Path) -> None:
    folder = quantise(full, tmp_path / "base", "w8a8")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PROJECTION}.weight_scale"] = torch.tensor([0.5])
        tensors[f"{PROJECTION}.weight_zero_point"] = torch.tensor([3], dtype=torch.int8)

    edit_tensors(folder, change)
    with CheckpointReader(folder, allow_quantised=True) as reader:
        rows = reader.get_rows(f"{PROJECTION}.weight", torch.tensor([5]))
        assert torch.equal(rows, (reader.get(f"{PROJECTION}.weight")[5:6].float() - 3) * 0.5)


def test_packed_zero_points_are_of_outputs(full: Path, tmp_path: Path) -> None:
    folder = quantise(full, tmp_path / "base", "w4a16")
    with CheckpointReader(folder, allow_quantised=True) as reader:
        before = reader.get_rows(f"{PROJECTION}.weight", torch.arange(64))
        scale = reader.get(f"{PROJECTION}.weight_scale").repeat_interleave(32, 1)
    of_outputs = torch.arange(64) % 16 - 8
    zeros = packed(of_outputs + 8)[:, None].repeat(1, 4)
    edit_tensors(folder, lambda tensors: tensors.update({f"{PROJECTION}.weight_zero_point": zeros}))
    with CheckpointReader(folder, allow_quantised=True) as reader:
        after = reader.get_rows(f"{PROJECTION}.weight", torch.arange(64))
    torch.testing.assert_close(after, before - of_outputs[:, None] * scale, rtol=1e-5, atol=1e-5)


def test_the_fingerprint_is_of_what_is_stored_and_of_what_it_means(gptq: Path) -> None:
    def fingerprint() -> str:
        with CheckpointReader(gptq, allow_quantised=True) as reader:
            return identify(reader).fingerprint

    first = fingerprint()
    edit_settings(gptq, sym=False)
    other_meaning = fingerprint()
    edit_settings(gptq, sym=True)
    assert fingerprint() == first
    edit_tensors(gptq, lambda tensors: tensors[f"{PROJECTION}.qweight"][0].add_(1))
    assert len({first, other_meaning, fingerprint()}) == 3


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_weight_in_parts_that_do_not_fit_is_told(gptq: Path, part: str) -> None:
    name = f"{PROJECTION}.{part}"
    whole = load_file(gptq / WEIGHTS)[name]
    for changed in ({name: whole[:-1].clone()}, {name: whole[:0].clone()}, {name: whole.flatten()[0]}, {}):
        edit_tensors(gptq, lambda tensors, changed=changed: (tensors.pop(name), tensors.update(changed)))
        with pytest.raises(CheckpointError, match=f"{PROJECTION} is stored as .* no weight of gptq"):
            CheckpointReader(gptq, allow_quantised=True)


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", None, 3])
def test_other_methods_are_told_by_name(gptq: Path, method: Any) -> None:
    edit_settings(gptq, quant_method=method)
    with pytest.raises(CheckpointError, match=f"is quantised .*quant_method is {method!r}.* gptq, awq"):
        CheckpointReader(gptq, allow_quantised=True)


def test_a_pool_of_adapters_is_served_unmerged(quantised: tuple[Path, str], lora: Path, tmp_path: Path) -> None:
    folder, quantisation = quantised
    for mode in (None, "unmerged"):
        pool = opened(folder, tmp_path, mode=mode, lora=lora)
        assert (pool.mode, pool.base.quantisation in (quantisation, "compressed-tensors")) == ("unmerged", True)
        assert (pool.base.dtype, pool.experts["lora"].merged_only) == ("float32", None)
        check_loads(pool)
    alone = opened(folder, tmp_path)
    assert alone.mode == "unmerged"
    late = open_expert(alone, "late", lora, cache_dir=tmp_path / "cache")
    assert late.fingerprint == pool.experts["lora"].fingerprint


def test_the_dtype_is_the_configurations(gptq: Path, tmp_path: Path) -> None:
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert opened(gptq, tmp_path).base.dtype == "bfloat16"


def test_packed_weights_are_computed_with_in_16_bits(quantised: tuple[Path, str], tmp_path: Path) -> None:
    folder, quantisation = quantised
    if quantisation == "w8a8":
        assert opened(folder, tmp_path, dtype="float32").mode == "unmerged"
        return
    for dtype in ("float32", "auto"):
        with pytest.raises(CheckpointError, match=r"pool 'pico', base: .* packed .* set engine.dtype"):
            opened(folder, tmp_path, dtype=dtype)


def test_nothing_is_merged_into_it(gptq: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pool 'pico', base: .* is quantised .* use the float32.*mode is merged"):
        opened(gptq, tmp_path, mode="merged", lora=lora)


def test_experts_that_are_merged_alone_are_refused(gptq: Path, full: Path, lora: Path, tmp_path: Path) -> None:
    dora = train_adapter(full, tmp_path / "dora", use_dora=True).folder
    with pytest.raises(CheckpointError, match=r"is quantised .* served over it unmerged, .*'dora': it is DoRA"):
        opened(gptq, tmp_path, lora=lora, dora=dora)
    with pytest.raises(ConfigError, match=r"DoRA.*; leave that out"):
        opened(gptq, tmp_path, mode="unmerged", dora=dora)
    for whole in (full, shutil.copytree(gptq, tmp_path / "again")):
        with pytest.raises(CheckpointError, match="is quantised"):
            opened(gptq, tmp_path, full=whole)
        with pytest.raises(CheckpointError, match="is quantised"):
            open_expert(opened(gptq, tmp_path), "late", whole, cache_dir=tmp_path / "cache")
    with pytest.raises(IncompatibleModelsError, match=r"DoRA.*; add an adapter"):
        open_expert(opened(gptq, tmp_path), "late", dora, cache_dir=tmp_path / "cache")
    with pytest.raises(CheckpointError, match="gptq is quantised"):
        opened(full, tmp_path, expert=gptq)


def test_an_adapter_of_other_shapes_is_no_expert_of_it(gptq: Path, tmp_path: Path) -> None:
    wide = train_adapter(make_decoder(tmp_path / "wide", hidden_size=96), tmp_path / "lora").folder
    with pytest.raises(IncompatibleModelsError, match=r"down_proj.weight: the base has \[64, 128\], the adapter"):
        opened(gptq, tmp_path, lora=wide)


def test_a_mixture_is_not_begun(gptq: Path, lora: Path, tmp_path: Path) -> None:
    pool = opened(gptq, tmp_path, lora=lora)
    expert = pool.experts["lora"].fingerprint
    recipe = Recipe(pool.base.fingerprint, ((pool.base.fingerprint, 0.5), (expert, 0.5)), "float32")
    with pytest.raises(CheckpointError, match="is quantised"):
        Mixture(recipe, pool.by_fingerprint)
    with CheckpointReader(gptq, allow_quantised=True) as base, AdapterReader(lora, base) as reader:
        with pytest.raises(CheckpointError, match="is quantised"):
            reader.get(f"{PROJECTION}.weight")
        assert reader.get("model.embed_tokens.weight").shape == (320, 64)


def test_what_the_files_lack_is_told_before_the_engine_starts(gptq: Path, tmp_path: Path) -> None:
    edit_tensors(gptq, lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks parameters .*layers\.0\.input_layernorm"):
        check_loads(opened(gptq, tmp_path))
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps(config | {"intermediate_size": 96, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"lacks parameters|is \[128, 64\] in its files, but \[96, 64\]"):
        check_loads(opened(gptq, tmp_path))


def test_inspect_and_compare_tell_it(gptq: Path, lora: Path, full: Path) -> None:
    assert compare(gptq, lora).is_compatible
    shown = CliRunner().invoke(app, ["inspect", str(gptq), str(lora), "--json"])
    assert shown.exit_code == 0, shown.output
    base, adapter = json.loads(shown.stdout)["models"]
    assert (base["quantisation"], adapter["engine_modes"]) == ("gptq", ["unmerged"])
    assert base["num_parameters"] == sum(tensor.numel() for tensor in load_file(full / WEIGHTS).values())
    text = CliRunner().invoke(app, ["inspect", str(gptq), str(lora)])
    assert text.exit_code == 0
    assert "gptq: a base of LoRA adapters" in text.stdout
