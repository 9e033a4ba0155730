"""Layers of an engine are held to the base's parameters, however these are stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import IncompatibleModelsError
from tests.models import make_decoder
from tests.quantised import FORMATS, dequantised, quantise
from vllm_cocktail.unmerged import layers as layers_module
from vllm_cocktail.unmerged.factors import FactorTensors
from vllm_cocktail.unmerged.kernel import Limits, load_kernel
from vllm_cocktail.unmerged.layers import AdaptedLayers, LayerFinder, Place, Steps

GATE, UP = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))


class FusedLayer(nn.Module):
    """Two linear layers in one, as an engine has them: it multiplies, rounds what comes in, and rounds the result."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        self.quant_method = self

    def apply(self, layer: Any, rows: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        assert layer is self
        scale = rows.abs().amax(-1, keepdim=True) / 127
        return ((rows / scale).round() * scale) @ self.weight.T.bfloat16()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("full") / "base")


@pytest.mark.parametrize("quantisation", FORMATS)
def test_a_layer_of_other_weights_than_the_quantised_ones_is_found(
    full: Path, tmp_path: Path, quantisation: str
) -> None:
    weights = dequantised(full, quantisation)
    model = nn.ModuleDict({"gate_up": FusedLayer([weights[GATE], weights[UP]])})
    with CheckpointReader(quantise(full, tmp_path / "base", quantisation), allow_quantised=True) as base:
        finder = LayerFinder(model, base, torch.bfloat16)
        for index, stored in enumerate((GATE, UP)):
            place = Place("gate_up", "linear", (128, 128), index)
            finder.require_product(stored, place, is_turned=False)
            other = Place("gate_up", "linear", (128, 128), 1 - index)
            with pytest.raises(IncompatibleModelsError, match=f"{stored} .* gate_up .* no plain product"):
                finder.require_product(stored, other, is_turned=False)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.gate_proj"], ids=["square", "oblong"])
def test_a_weight_that_is_stored_turned_is_compared_so(full: Path, name: str) -> None:
    stored = f"model.layers.0.{name}.weight"
    with CheckpointReader(full) as base:
        weight = base.get(stored)
        model = nn.ModuleDict({"turned": FusedLayer([weight.T])})
        finder = LayerFinder(model, base, torch.bfloat16)
        place = Place("turned", "linear", (weight.shape[1],), 0)
        finder.require_product(stored, place, is_turned=True)
        if weight.shape[0] == weight.shape[1]:
            with pytest.raises(IncompatibleModelsError, match=r"no plain product .* set engine.mode: merged"):
                finder.require_product(stored, place, is_turned=False)


SIZE, RANK = 64, 4


class PlainMethod:
    """As an engine has it: one object that computes a layer."""

    def apply(self, layer: Any, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        return rows @ layer.weight.T


class PlainLayer(nn.Module):
    """A linear layer that multiplies by its method."""

    input_size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE), requires_grad=False)
        self.quant_method = PlainMethod()

    def forward(self, rows: Tensor) -> Tensor:
        return self.quant_method.apply(self, rows)


class FoundByName:
    """A `LayerFinder` of layers that are named as what is stored."""

    def __init__(self, *_: Any) -> None:
        pass

    def find(self, stored: str, *, is_turned: bool) -> list[Place]:
        return [Place(stored, "linear", (SIZE,), 0)]


@pytest.fixture
def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: PlainLayer() for name in ("first", "second", "third")})


@pytest.fixture
def steps() -> Steps:
    return Steps(load_kernel(torch.device("cpu"), Limits(8, 4, 4 * RANK)))


@pytest.fixture
def adapted(model: nn.ModuleDict, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdaptedLayers]:
    monkeypatch.setattr(layers_module, "LayerFinder", FoundByName)
    layers = AdaptedLayers(model, steps, dtype=torch.float32)
    yield layers
    layers._library._destroy()  # a process has one model, and defines the operator once


def factors_of(*names: str) -> dict[str, FactorTensors]:
    return {name: FactorTensors(torch.randn(RANK, SIZE), torch.randn(SIZE, RANK), 0.5, False) for name in names}


def added(adapted: AdaptedLayers, expert: int, *names: str) -> dict[str, FactorTensors]:
    factors = factors_of(*names)
    adapted.add(expert, factors, base=None)  # type: ignore[arg-type]  # `FoundByName` reads none
    return factors


def test_a_layer_that_a_request_does_not_come_through_is_named(model: nn.ModuleDict, adapted: AdaptedLayers) -> None:
    added(adapted, 0, "first", "second")
    with pytest.raises(IncompatibleModelsError, match=r"first .* computes past it"):
        adapted.require_called()
    model["first"](torch.randn(1, SIZE))
    with pytest.raises(IncompatibleModelsError, match=r"second .* computes past it.* set engine.mode: merged"):
        adapted.require_called()
    model["second"](torch.randn(1, SIZE))
    adapted.require_called()


def test_once_the_model_is_compiled_experts_adapt_no_other_layers(
    model: nn.ModuleDict, adapted: AdaptedLayers, steps: Steps
) -> None:
    added(adapted, 0, "first", "second")
    adapted.seal()
    before = adapted.num_bytes
    with pytest.raises(IncompatibleModelsError, match=r"adapts third, .* restart the engine"):
        added(adapted, 1, "first", "third")
    assert (adapted.num_bytes, adapted.names) == (before, ["first linear", "second linear"])
    late = added(adapted, 1, "second")["second"]
    rows = torch.randn(1, SIZE)
    steps.set(np.array([[0.0, 2.0]], dtype=np.float32), np.array([1], dtype=np.int32))
    wanted = rows @ (model["second"].weight + 2.0 * late.scaling * late.up @ late.down).T
    torch.testing.assert_close(model["second"](rows), wanted)
    torch.testing.assert_close(model["first"](rows), rows @ model["first"].weight.T)


def test_compiled_graphs_find_a_layers_factors_by_its_number(adapted: AdaptedLayers, steps: Steps) -> None:
    factors = added(adapted, 0, "third", "first")
    steps.set(np.array([[1.0]], dtype=np.float32), np.array([1], dtype=np.int32))
    rows = torch.randn(1, SIZE)
    for number, name in enumerate(adapted.names):
        expert = factors[name.removesuffix(" linear")]
        product = torch.zeros(1, SIZE)
        torch.ops.cocktail.add_factors(rows, product, number)
        torch.testing.assert_close(product, expert.scaling * rows @ (expert.up @ expert.down).T)
