"""A full expert as a LoRA adapter over its base: the difference of each layer, cut to a rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cocktail_serve.checkpoints.adapters.reader import read_expert
from cocktail_serve.checkpoints.folder import check_room, copy_files, write_json
from cocktail_serve.checkpoints.layout import ADAPTER_CONFIG
from cocktail_serve.checkpoints.naming import ParameterNames, parameter_names
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import InvalidRequestError, StorageError
from cocktail_serve.offline.low_rank import low_rank
from cocktail_serve.pool import Member
from cocktail_serve.progress import OnProgress, silent

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_FILE = "adapter_model.safetensors"
FACTOR_BYTES = 4

LayerKind = Literal["linear", "conv1d", "embedding"]
"""What peft adapts of what decoders are made of; a `Conv1D` of transformers is a linear layer stored transposed."""


@dataclass(frozen=True, slots=True)
class ExtractedLayer:
    """A parameter whose difference to the base an adapter holds.

    Attributes:
        name: the base's, stored.
        modules: what peft adapts for it: several where the model ties them.
        rank: of the factors; lower than asked for where the layer is narrower, or its difference has no more.
        difference: Frobenius norm of the difference.
        error: Frobenius norm of what the factors lack of it.
        singular_values: of the difference, as many as the rank, descending.
    """

    name: str
    shape: tuple[int, ...]
    kind: LayerKind
    modules: tuple[str, ...]
    rank: int
    difference: float
    error: float
    singular_values: tuple[float, ...]

    @property
    def relative_error(self) -> float:
        return self.error / self.difference


@dataclass(frozen=True, slots=True)
class LostParameter:
    """A parameter that differs from the base's and stays the base's in the adapter.

    Attributes:
        reason: why it has no factors.
        difference: Frobenius norm of the difference.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    difference: float


@dataclass(frozen=True, slots=True)
class Extraction:
    """What became of an expert.

    Attributes:
        rank: what was asked for.
        layers: what the adapter holds, in the order of the base's files.
        lost: what it does not.
        num_bytes: size of the factors.
    """

    expert: str
    rank: int
    layers: tuple[ExtractedLayer, ...]
    lost: tuple[LostParameter, ...]
    num_bytes: int

    @property
    def difference(self) -> float:
        """Frobenius norm of the difference of all parameters to the base's."""
        return math.hypot(*(layer.difference for layer in self.layers), self._lost)

    @property
    def relative_error(self) -> float:
        """Frobenius norm of all that the adapter lacks, lost parameters included, over that of the difference."""
        return math.hypot(*(layer.error for layer in self.layers), self._lost) / self.difference

    @property
    def lost_share(self) -> float:
        """What lost parameters are of the squared difference, from 0 to 1."""
        return (self._lost / self.difference) ** 2

    @property
    def _lost(self) -> float:
        return math.hypot(*(each.difference for each in self.lost))

    def relative_error_at(self, rank: int) -> float:
        """`relative_error` if the same factors were cut to a lower rank, from their singular values."""
        kept = sum(value**2 for layer in self.layers for value in layer.singular_values[:rank])
        return math.sqrt(max(0.0, 1.0 - kept / self.difference**2))


def extract_adapter(
    base: Member,
    expert: Member,
    folder: Path,
    *,
    rank: int,
    source: str,
    revision: str | None = None,
    report: OnProgress = silent,
) -> Extraction:
    """Writes the adapter of a full expert as peft has it: configuration, factors, and the expert's files beside its
    parameters (tokenizer, chat template, generation settings), so that it is called as the expert is.

    Weights of linear layers, embeddings and output heads that differ from the base's get factors, in float32 and with a
    scaling of 1; the same for both where the model ties them. What is no such weight (norms, biases, convolutions,
    parameters stored in parts) cannot be LoRA and stays the base's. One layer's difference is in memory at a time,
    beside the factors of those before it.

    Args:
        folder: is made.
        source, revision: where the base is, for `base_model_name_or_path`.

    Raises:
        InvalidRequestError: nothing that the expert changed can be LoRA.
        CheckpointError, IncompatibleModelsError: as the readers.
        StorageError: the disk has no room.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    names = parameter_names(base.path)
    factors: dict[str, Tensor] = {}
    layers: list[ExtractedLayer] = []
    lost: list[LostParameter] = []
    folder.mkdir()
    with CheckpointReader(base.path) as mine, read_expert(expert.path, mine) as theirs:
        shared = [name for name, info in mine.tensors.items() if info.is_floating and name in theirs.tensors]
        total = sum(mine.tensors[name].num_bytes for name in shared)
        _check_room(folder, mine, names, shared, rank)
        done = 0
        for name in shared:
            report(f"extracting {expert.name}", done, total, is_bytes=True)
            done += mine.tensors[name].num_bytes
            difference = theirs.get(name).float() - mine.get(name).float()
            size = _norm(difference)
            if size == 0.0 or not names.target(name).is_read:
                continue
            places, reason = _places(names, name, mine.tensors[name].shape)
            if reason:
                lost.append(LostParameter(name, mine.tensors[name].shape, reason, size))
                continue
            up, down, values = low_rank(difference, rank)
            for module, kind in places.items():
                factors |= _named(module, kind, up, down)
            layers.append(
                ExtractedLayer(
                    name=name,
                    shape=mine.tensors[name].shape,
                    kind=next(iter(places.values())),
                    modules=tuple(places),
                    rank=len(values),
                    difference=size,
                    error=_norm(difference.addmm_(up, down, alpha=-1.0)),
                    singular_values=tuple(values.tolist()),
                )
            )
        report(f"extracting {expert.name}", total, total, is_bytes=True)
        mine.check_unwritten()
        theirs.check_unwritten()
    if not layers:
        differing = (
            f"; it differs in {', '.join(each.name for each in lost[:3])}, which LoRA cannot hold" if lost else ""
        )
        raise InvalidRequestError(
            f"expert {expert.name!r} has the base's parameters in every layer that LoRA adapts{differing}: there is no "
            "adapter to make of it, take it out of the pool"
        )
    copy_files(expert.path, folder)
    write_json(folder / ADAPTER_CONFIG, _config(layers, rank, source=source, revision=revision))
    try:
        save_file(factors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StorageError(f"cannot write {folder.name}/{ADAPTER_FILE}: {error}; nothing was left there") from error
    num_bytes = sum(tensor.numel() * FACTOR_BYTES for tensor in factors.values())
    return Extraction(expert.name, rank, tuple(layers), tuple(lost), num_bytes)


def _check_room(folder: Path, base: CheckpointReader, names: ParameterNames, shared: Sequence[str], rank: int) -> None:
    def bytes_of(name: str) -> int:
        shape = base.tensors[name].shape
        places, _ = _places(names, name, shape)
        return len(places) * min(rank, *shape) * sum(shape) * FACTOR_BYTES if places else 0

    check_room(folder, sum(map(bytes_of, shared)), "the adapter")


def _places(names: ParameterNames, stored: str, shape: tuple[int, ...]) -> tuple[dict[str, LayerKind], str]:
    """The modules whose weight a tensor is, and what they are; empty with the reason where LoRA does not adapt it."""
    if len(shape) == 1:
        return {}, "a vector"
    modules = names.modules_of(stored)
    if not modules:
        return {}, "part of a parameter, or no layer's weight"
    kinds = {name: _kind(module) for name, module in modules.items()}
    for name, kind in kinds.items():
        if kind is None:
            return {}, f"weight of a {type(modules[name]).__name__}"
    return {name: kind for name, kind in kinds.items() if kind is not None}, ""


def _kind(module: Any) -> LayerKind | None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds: tuple[tuple[type, LayerKind], ...] = ((nn.Linear, "linear"), (Conv1D, "conv1d"), (nn.Embedding, "embedding"))
    return next((kind for cls, kind in kinds if isinstance(module, cls)), None)


def _named(module: str, kind: LayerKind, up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The factors as peft stores them: it adds `B @ A`, and its transpose to an embedding and a `Conv1D`."""
    prefix = f"base_model.model.{module}"
    if kind == "linear":
        yield f"{prefix}.lora_A.weight", down
        yield f"{prefix}.lora_B.weight", up
    else:
        a, b = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        yield f"{prefix}.{a}", _turned(up)
        yield f"{prefix}.{b}", _turned(down)


def _turned(factor: Tensor) -> Tensor:
    """The transpose, in memory of its own: what shares any is not stored."""
    import torch

    return factor.T.clone(memory_format=torch.contiguous_format)


def _config(layers: Sequence[ExtractedLayer], rank: int, *, source: str, revision: str | None) -> Mapping[str, Any]:
    """The fields of peft's LoraConfig that are not its defaults: `lora_alpha` is the rank everywhere."""
    ranks = {module: layer.rank for layer in layers for module in layer.modules if layer.rank != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "fan_in_fan_out": any(layer.kind == "conv1d" for layer in layers),
        "ensure_weight_tying": any(len(layer.modules) > 1 for layer in layers),
        "target_modules": [module for layer in layers for module in layer.modules],
    }


def _norm(tensor: Tensor) -> float:
    """Frobenius norm, summed in float64."""
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
