"""What the tensors of an adapter's file are, told from their names as peft and the trainers built on it write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from cocktail_serve.checkpoints.adapters.config import MERGE
from cocktail_serve.checkpoints.tensor_files import TensorInfo
from cocktail_serve.dtypes import ITEM_BYTES
from cocktail_serve.errors import CheckpointError

AdapterPart = Literal["down", "up", "bias", "magnitude", "rows"]
"""A, B and B's bias, DoRA's magnitudes, and rows of single tokens."""

_PARTS: Mapping[str, AdapterPart] = {
    "lora_A.weight": "down",
    "lora_embedding_A": "down",
    "lora_B.weight": "up",
    "lora_embedding_B": "up",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
}
_PART = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")

_PREFIX = "base_model.model."

_UNUSED = re.compile(r".+\.(?:lora_velora_embed|lora_monteclora_sampler\..+|original_module\.[^.]+)")
"""State of training, and what a module that was saved whole took the place of."""

_OF_PEFT = re.compile(r".*(?:lora_|trainable_tokens)")

_WRAPPER = re.compile(r"\.(?:(?:token_adapter\.)?base_layer|modules_to_save)\.")
"""What peft puts between a module it wraps and the module's own parameters."""


def sort_tensors(
    folder: Path, infos: Mapping[str, TensorInfo]
) -> tuple[dict[str, str], dict[str, dict[AdapterPart, str]]]:
    """Stored names by what they are.

    Returns:
        The parameter's name of each tensor that was saved whole, by stored name; and the stored names of each adapted
        module's parts, by module. Names are the model's, without peft's prefix.

    Raises:
        CheckpointError: a tensor that is nothing of LoRA, or of a dtype that cannot be folded.
    """
    wholes: dict[str, str] = {}
    modules: dict[str, dict[AdapterPart, str]] = {}
    for stored, info in infos.items():
        name = stored.removeprefix(_PREFIX)
        if _UNUSED.fullmatch(name):
            continue
        part = _PART.fullmatch(name)
        if info.dtype not in ITEM_BYTES or (part is not None and not info.is_floating):
            raise CheckpointError(
                f"{folder}: tensor {stored!r} is {info.dtype}, a quantised dtype, which cannot be folded; {MERGE}"
            )
        if part is not None:
            modules.setdefault(part["module"], {})[_PARTS[part["part"]]] = stored
        elif _OF_PEFT.match(name):
            raise CheckpointError(
                f"{folder}: tensor {stored!r} is nothing that peft writes for LoRA of a linear layer or an embedding; "
                "save the adapter with save_pretrained of peft"
            )
        else:
            wholes[stored] = _WRAPPER.sub(".", name)
    return wholes, modules
