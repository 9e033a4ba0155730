"""The factors of an expert that is a LoRA adapter, read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cocktail_serve.checkpoints.adapters.reader import AdapterReader
from cocktail_serve.checkpoints.unchanged import open_base, open_expert_of
from cocktail_serve.errors import IncompatibleModelsError, NotFiniteError
from cocktail_serve.pool import Member

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cocktail_serve.dtypes import DType


@dataclass(frozen=True, slots=True)
class FactorTensors:
    """What an expert adds to one parameter: `scaling * up @ down` (LoRA, arXiv 2106.09685, section 4.1).

    Attributes:
        down: A, `[rank, in]`, in the engine's dtype.
        up: B, `[out, rank]`, likewise.
        is_turned: the parameter is stored `[in, out]`, so that the transposed product is added.
    """

    down: Tensor
    up: Tensor
    scaling: float
    is_turned: bool


def read_factors(base: Member, expert: Member, *, dtype: DType) -> Mapping[str, FactorTensors]:
    """The factors of an expert by the stored name of the base's parameter; none where it is the base itself.

    Raises:
        ModelChangedError: its files, or the base's, hold something else than they did.
        CheckpointError: they cannot be read.
        IncompatibleModelsError: it is no LoRA adapter alone, or one of another base; says what it changes otherwise.
        NotFiniteError: a factor is infinite or NaN in the engine's dtype; names the tensor.
    """
    import torch

    if expert.fingerprint == base.fingerprint:
        return {}
    with open_base(base) as base_reader, open_expert_of(base, base_reader, expert) as reader:
        if not isinstance(reader, AdapterReader):
            raise IncompatibleModelsError(
                f"{expert.path} is a full model, which has no factors: extract an adapter from it (cocktail-serve "
                "extract), or set engine.mode: merged"
            )
        torch_dtype: torch.dtype = getattr(torch, dtype)
        found = {}
        for parameter, change in reader.changes.items():
            if not change.is_low_rank or change.pair is None:
                raise IncompatibleModelsError(
                    f"{expert.path} changes {parameter} by more than two factors: set engine.mode: merged"
                )
            pair = change.pair
            found[parameter] = FactorTensors(
                down=_finite(reader, pair.down, torch_dtype),
                up=_finite(reader, pair.up, torch_dtype),
                scaling=pair.scaling,
                is_turned=pair.is_turned,
            )
        return found


def _finite(reader: AdapterReader, stored: str, dtype: torch.dtype) -> Tensor:
    tensor = reader.factor(stored).to(dtype).contiguous()
    if not tensor.isfinite().all():
        raise NotFiniteError(f"tensor {stored} of {reader.folder} is not finite in {dtype}; train the adapter again")
    # of its own: the file may go while the engine runs
    return tensor.clone()
