"""LoRA experts: folded as exactly as can be, mixed with full checkpoints, named by all that decides what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from cocktail_serve.checkpoints.adapters.reader import fold
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError
from cocktail_serve.merging import threads
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import make_recipe, one_hot
from tests.adapters import parameters_of, train_adapter

Folders = dict[str, Path]
Open = Callable[..., Pool]


@pytest.fixture
def lora(decoders: Folders, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """An adapter over the base, and the parameters that peft makes of it."""
    trained = train_adapter(decoders["base"], tmp_path / "lora")
    return trained.folder, trained.merged()


def assert_folded(folder: Path, base: Path, merged: dict[str, Tensor]) -> None:
    folded, before = parameters_of(folder, base), load_file(base / "model.safetensors")
    assert any(not torch.equal(folded[name], before[name]) for name in folded)
    for name, tensor in folded.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_turned", [False, True])
def test_the_fold_with_magnitudes_is_rounded_once_and_the_same_whatever_the_threads(
    monkeypatch: pytest.MonkeyPatch, is_turned: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, magnitude = torch.randn(300, 77, generator=generator), torch.rand(300, generator=generator)
    down, up = torch.randn(5, 77, generator=generator), torch.randn(300, 5, generator=generator)
    stored = weight.T.contiguous() if is_turned else weight

    def folded() -> Tensor:
        made = fold(stored, down, up, 0.75, magnitude=magnitude, is_turned=is_turned)
        assert made.is_contiguous()
        return made.T if is_turned else made

    summed = weight.double() + 0.75 * (up.double() @ down.double())
    exact = summed * (magnitude.double() / summed.norm(dim=1))[:, None]
    first = folded()
    ulp = torch.nextafter(first.abs(), torch.tensor(float("inf"))) - first.abs()
    assert ((first.double() - exact).abs() <= 0.501 * ulp.double()).all()
    monkeypatch.setattr("cocktail_serve.checkpoints.adapters.reader.FOLD_NUMEL", 77)
    assert torch.equal(folded(), first)
    monkeypatch.setattr(threads, "num_threads", lambda: 1)
    assert torch.equal(folded(), first)


def test_the_fold_is_rounded_once_and_the_same_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 70, generator=generator).bfloat16()
    down, up = torch.randn(5, 70, generator=generator), torch.randn(300, 5, generator=generator)
    folded = fold(weight, down, up, 0.75)
    exact = weight.double() + 0.75 * (up.double() @ down.double())
    ulp = torch.nextafter(folded.abs(), torch.tensor(float("inf"))) - folded.abs()
    assert ((folded.double() - exact).abs() <= 0.501 * ulp.double()).all()
    monkeypatch.setattr("cocktail_serve.checkpoints.adapters.reader.FOLD_NUMEL", 70)
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
    with pytest.raises(CheckpointError, match=r"layers\.0.* twice, under two names"):
        pool_of(factors | {key.replace("model.model.", "model."): value.clone() for key, value in factors.items()})
    with pytest.raises(CheckpointError, match="only one of the factors"):
        pool_of({key: value for key, value in factors.items() if key != name})
    with pytest.raises(IncompatibleModelsError, match=r"lm_head\.weight.*\[320, 64\].*\[3, 3\]"):
        pool_of(factors | {"base_model.model.lm_head.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match="nothing that peft writes"):
        pool_of(factors | {name.replace("lora_A", "lora_A.default"): torch.zeros(4, 64)})
    with pytest.raises(CheckpointError, match="quantised"):
        pool_of(factors | {name: torch.zeros(4, 64, dtype=torch.uint8)})
    config = json.loads((lora[0] / "adapter_config.json").read_text())
    (lora[0] / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"q_proj": 8}}))
    with pytest.raises(CheckpointError, match=r"says rank 8 for model.*q_proj, and its factors have rank 4"):
        pool_of(factors)
