"""Quantised checkpoints written by hand, in the layouts that the formats document, and what their parameters are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP_SIZE = 32
"""Inputs that share a scale, in the formats of four bits."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each four bits of a word of AWQ hold, the lowest bits first."""


def quantise(base: Path, folder: Path, quantisation: str) -> Path:
    """Writes a full checkpoint as a quantised one: its layers' linear modules, and not embeddings and head.

    Returns:
        `folder`.
    """
    write, config = FORMATS[quantisation]
    shutil.copytree(base, folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if is_quantised(name):
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in write(tensor.float()).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return folder


def dequantised(base: Path, quantisation: str) -> dict[str, Tensor]:
    """The parameters that `quantise` leaves of a checkpoint, float32, by the rounding and not by the stored bits."""
    round_weight: Callable[[Tensor], Tensor] = ROUNDED[quantisation]
    return {
        name: round_weight(tensor.float()) if is_quantised(name) else tensor.float()
        for name, tensor in load_file(base / "model.safetensors").items()
    }


def is_quantised(name: str) -> bool:
    return name.endswith("_proj.weight")


def _by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of each output's own scale, `[out, in]` and `[out, 1]`."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().clamp(-128, 127), scale


def _symmetric_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Four bits from -8 to 7, `[out, in]`, and scales `[out, in / GROUP_SIZE]`, which are stored in float16."""
    grouped = weight.unflatten(1, (-1, GROUP_SIZE))
    scale = (grouped.abs().amax(2) / 7).half().float()
    return (grouped / scale[:, :, None]).round().clamp(-8, 7).flatten(1), scale


def _zeroed_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four bits from 0 to 15, scales and zero points, which are stored as four bits too."""
    grouped = weight.unflatten(1, (-1, GROUP_SIZE))
    low, high = grouped.amin(2).clamp_max(0), grouped.amax(2).clamp_min(0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    return ((grouped / scale[:, :, None]).round() + zero[:, :, None]).clamp(0, 15).flatten(1), scale, zero


def packed(values: Tensor, num_bits: int = 4) -> Tensor:
    """As many of the last dimension as there is room for in one int32, the first in the lowest bits."""
    words = values.long().unflatten(-1, (-1, 32 // num_bits)) << torch.arange(0, 32, num_bits)
    return words.sum(-1).to(torch.uint32).view(torch.int32)


def _int_quantised(weight: Tensor) -> dict[str, Tensor]:
    values, scale = _by_channel(weight)
    return {"weight": values.to(torch.int8), "weight_scale": scale}


def _pack_quantised(weight: Tensor) -> dict[str, Tensor]:
    values, scale = _symmetric_groups(weight)
    return {
        "weight_packed": packed(values + 8),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def _pack_quantised_int8(weight: Tensor) -> dict[str, Tensor]:
    values, scale = _by_channel(weight)
    return {
        "weight_packed": packed(values + 128, num_bits=8),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def _gptq(weight: Tensor) -> dict[str, Tensor]:
    values, scale = _symmetric_groups(weight)
    out, inputs = weight.shape
    return {
        "qweight": packed(values + 8).T,
        "qzeros": packed(torch.full((inputs // GROUP_SIZE, out), 7)),  # the format's first version stores one less
        "scales": scale.T.half(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP_SIZE,
    }


def _awq(weight: Tensor) -> dict[str, Tensor]:
    values, scale, zero = _zeroed_groups(weight)

    def in_order(of_outputs: Tensor) -> Tensor:
        return packed(of_outputs.unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1))

    return {"qweight": in_order(values.T), "qzeros": in_order(zero.T), "scales": scale.T.half()}


def _rounded_by_channel(weight: Tensor) -> Tensor:
    values, scale = _by_channel(weight)
    return values * scale


def _rounded_symmetric(weight: Tensor) -> Tensor:
    values, scale = _symmetric_groups(weight)
    return (values.unflatten(1, (-1, GROUP_SIZE)) * scale[:, :, None]).flatten(1)


def _rounded_zeroed(weight: Tensor) -> Tensor:
    values, scale, zero = _zeroed_groups(weight)
    return ((values.unflatten(1, (-1, GROUP_SIZE)) - zero[:, :, None]) * scale[:, :, None]).flatten(1)


ROUNDED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "w8a8": _rounded_by_channel,
    "w8a16": _rounded_by_channel,
    "w4a16": _rounded_symmetric,
    "gptq": _rounded_symmetric,
    "awq": _rounded_zeroed,
}


def _compressed_tensors(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}
_OF_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

FORMATS: Mapping[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "w8a8": (_int_quantised, _compressed_tensors("int-quantized", _INT8, _OF_TOKENS)),
    "w8a16": (_pack_quantised_int8, _compressed_tensors("pack-quantized", _INT8, None)),
    "w4a16": (_pack_quantised, _compressed_tensors("pack-quantized", _INT4 | {"dynamic": False}, None)),
    "gptq": (
        _gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "desc_act": False, "sym": True, "lm_head": False},
    ),
    "awq": (
        _awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"},
    ),
}
"""How a weight `[out, in]` is stored, and what `config.json` says of it."""
