"""Adapters as peft itself saves them, and the models that it makes of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cocktail_serve.checkpoints.adapters.reader import AdapterReader
from cocktail_serve.checkpoints.reader import CheckpointReader


@dataclass(frozen=True)
class Trained:
    """A model with an adapter, as after training.

    Attributes:
        model: peft's, adapter in place.
    """

    folder: Path
    model: Any

    def merged(self) -> dict[str, Tensor]:
        """The parameters that peft merges. Once: it takes the model apart."""
        return {name: tensor.detach() for name, tensor in self.model.merge_and_unload().state_dict().items()}


def train_adapter(
    base: Path,
    folder: Path,
    *,
    auto_class: Any = None,
    seed: int = 1,
    saving: Mapping[str, Any] | None = None,
    **options: Any,
) -> Trained:
    """Puts an adapter of peft over a base, moves everything that would be trained, and saves it.

    Args:
        auto_class: of transformers; AutoModelForCausalLM unless given.
        saving: arguments of save_pretrained.
        options: of LoraConfig; rank 4, alpha 12 and all linear layers unless given.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft advises against much of what users do
        model = (auto_class or AutoModelForCausalLM).from_pretrained(base, dtype=torch.float32)
        peft_model = get_peft_model(model, LoraConfig(**(settings | options)))
        move_trained(peft_model)
        peft_model.save_pretrained(folder, **(saving or {}))
    return Trained(folder, peft_model.eval())


def move_trained(model: Any) -> None:
    """Adds noise to every parameter that a trainer would update."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def parameters_of(folder: Path, base: Path) -> dict[str, Tensor]:
    """What an adapter makes of a base."""
    with CheckpointReader(base) as base_reader, AdapterReader(folder, base_reader) as reader:
        return {name: reader.get(name) for name in reader.tensors}


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
