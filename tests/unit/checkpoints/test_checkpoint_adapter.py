"""LoRA experts: read as the full model that peft would merge, mixed with full checkpoints; refused where no sum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, LlamaForCausalLM

from cocktail_serve.checkpoints.adapter import AdapterReader, fold
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError
from cocktail_serve.merging import threads
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import make_recipe, one_hot

Folders = dict[str, Path]
Open = Callable[..., Pool]


def make_adapter(base: Path, folder: Path, *, auto_class: Any = LlamaForCausalLM, seed: int = 1, **options: Any) -> Any:
    """Saves an adapter with peft; returns the model that peft merges of it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False}
    model = get_peft_model(auto_class.from_pretrained(base, dtype=torch.float32), LoraConfig(**(settings | options)))
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.fixture
def lora(decoders: Folders, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """An adapter over the base, and the parameters that peft makes of it."""
    merged = make_adapter(decoders["base"], tmp_path / "lora")
    return tmp_path / "lora", {name: tensor.detach() for name, tensor in merged.state_dict().items()}


def parameters_of(folder: Path, base: Path) -> dict[str, Tensor]:
    with CheckpointReader(base) as base_reader, AdapterReader(folder, base_reader) as reader:
        return {name: reader.get(name) for name in reader.tensors}


def assert_folded(folder: Path, base: Path, merged: dict[str, Tensor]) -> None:
    folded, before = parameters_of(folder, base), load_file(base / "model.safetensors")
    assert any(not torch.equal(folded[name], before[name]) for name in folded)
    for name, tensor in folded.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\.mlp\.up_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"]},
    ],
    ids=["all linear layers", "rslora", "patterns", "some layers"],
)
def test_it_is_the_model_that_peft_merges(decoders: Folders, tmp_path: Path, options: dict[str, Any]) -> None:
    merged = make_adapter(decoders["base"], tmp_path / "lora", **options)
    assert_folded(tmp_path / "lora", decoders["base"], dict(merged.state_dict()))


def test_names_may_lack_the_prefix_of_another_class(encoders: Folders, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["query", "value"], "auto_class": AutoModel}
    merged = make_adapter(encoders["base"], tmp_path / "lora", **options)
    assert_folded(tmp_path / "lora", encoders["base"], dict(merged.state_dict()))


def test_the_fold_is_rounded_once_and_the_same_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 70, generator=generator).bfloat16()
    down, up = torch.randn(5, 70, generator=generator), torch.randn(300, 5, generator=generator)
    folded = fold(weight, down, up, 0.75)
    exact = weight.double() + 0.75 * (up.double() @ down.double())
    ulp = torch.nextafter(folded.abs(), torch.tensor(float("inf"))) - folded.abs()
    assert ((folded.double() - exact).abs() <= 0.501 * ulp.double()).all()
    monkeypatch.setattr("cocktail_serve.checkpoints.adapter.FOLD_NUMEL", 70)
    assert torch.equal(fold(weight, down, up, 0.75), folded)
    monkeypatch.setattr(threads, "num_threads", lambda: 1)
    assert torch.equal(fold(weight, down, up, 0.75), folded)


def test_a_pool_mixes_adapters_with_full_checkpoints(
    decoders: Folders, lora: tuple[Path, dict[str, Tensor]], opened: Open
) -> None:
    folder, merged = lora
    pool = opened({**decoders, "lora": folder})
    full = next(name for name in decoders if name != "base")
    recipe = make_recipe(pool, {"base": 0.2, full: 0.5, "lora": 0.3}, dtype="float32")
    stored = {name: load_file(decoders[name] / "model.safetensors") for name in ("base", full)}
    for name, tensor in iter_mixture(recipe, pool.by_fingerprint):
        expected = 0.2 * stored["base"][name] + 0.5 * stored[full][name] + 0.3 * merged[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_a_mixture_of_adapters_is_written_and_loads(
    decoders: Folders, lora: tuple[Path, dict[str, Tensor]], opened: Open, tmp_path: Path
) -> None:
    folder, merged = lora
    pool = opened({"base": decoders["base"], "lora": folder})
    save_mixture(one_hot(pool, "lora", dtype="float32"), pool, tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-5, atol=1e-6)


def test_its_fingerprint_is_of_factors_scaling_and_base(
    decoders: Folders, lora: tuple[Path, dict[str, Tensor]], opened: Open, tmp_path: Path
) -> None:
    folder, _ = lora

    def fingerprint(base: Path) -> str:
        return opened({"base": base, "lora": folder}).experts["lora"].fingerprint

    before = fingerprint(decoders["base"])
    assert fingerprint(decoders["base"]) == before
    assert fingerprint(next(path for name, path in decoders.items() if name != "base")) != before
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 13}))
    assert fingerprint(decoders["base"]) != before
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(factors))
    save_file(factors | {name: factors[name] + 1}, folder / "adapter_model.safetensors")
    assert fingerprint(decoders["base"]) != before


def test_a_bin_of_tensors_alone_is_read(decoders: Folders, lora: tuple[Path, dict[str, Tensor]]) -> None:
    folder, merged = lora
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert_folded(folder, decoders["base"], merged)


def test_fan_in_fan_out_is_turned(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "lora"
    for made in (base, folder):
        made.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2", "tie_word_embeddings": False}))
    weight, down, up = torch.randn(6, 3), torch.randn(2, 6), torch.randn(3, 2)
    save_file({"h.0.attn.c_attn.weight": weight}, base / "model.safetensors")
    prefix = "base_model.model.transformer.h.0.attn.c_attn"
    save_file({f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    folded = parameters_of(folder, base)["h.0.attn.c_attn.weight"]
    torch.testing.assert_close(folded, weight + 2.0 * (up @ down).T)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "above 0"),
        ({"lora_alpha": "much"}, "above 0"),
    ],
)
def test_what_is_no_sum_is_refused(
    decoders: Folders, lora: tuple[Path, dict[str, Tensor]], opened: Open, changes: dict[str, Any], reason: str
) -> None:
    path = lora[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=reason):
        opened({"base": decoders["base"], "lora": lora[0]})


def test_factors_that_do_not_fit_are_named(
    decoders: Folders, lora: tuple[Path, dict[str, Tensor]], opened: Open
) -> None:
    path = lora[0] / "adapter_model.safetensors"
    factors = load_file(path)
    name = next(name for name in factors if "lora_A" in name)
    other = name.replace("layers.0", "layers.9")

    def pool_of(changed: dict[str, Tensor]) -> Pool:
        save_file(changed, path)
        return opened({"base": decoders["base"], "lora": lora[0]})

    with pytest.raises(IncompatibleModelsError, match="the adapter of another model"):
        pool_of(factors | {name: torch.zeros(4, 7)})
    with pytest.raises(IncompatibleModelsError, match=r"layers\.9.*does not hold"):
        pool_of({**factors, other: factors[name].clone(), other.replace("lora_A", "lora_B"): torch.zeros(7, 4)})
    with pytest.raises(CheckpointError, match="only one of the factors"):
        pool_of({key: value for key, value in factors.items() if key != name})
    with pytest.raises(CheckpointError, match="only plain LoRA"):
        pool_of(factors | {"base_model.model.lm_head.weight": torch.zeros(3, 3)})
