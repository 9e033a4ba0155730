"""Layers of an engine are held to the base's parameters, however these are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import IncompatibleModelsError
from tests.models import make_decoder
from tests.quantised import FORMATS, dequantised, quantise
from vllm_cocktail.unmerged.layers import LayerFinder, Place

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
