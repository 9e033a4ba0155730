"""A recipe's parameters, made one tensor at a time straight from the models' files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from cocktail_serve.checkpoints.compatibility import check_tensors
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import IncompatibleModelsError, InvalidMixError
from cocktail_serve.merging.merger import Merge, merger
from cocktail_serve.recipe import Recipe


def iter_mixture(recipe: Recipe, folders: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Mixes the recipe, one tensor at a time in the order of the base's files.

    All that can be told in advance is checked in this call, before it returns and so before the first tensor: an
    iterator that fails half-way leaves whoever loads from it with half a model. Memory stays at one mixed tensor; the
    inputs are mapped files.

    Args:
        folders: folder by fingerprint, at least of the base and of every model in the recipe. They are taken at their
            word: who named them by fingerprint has read them.

    Returns:
        Iterator of name and tensor: floating tensors merged by the recipe's method in float32 and rounded once to its
        dtype, others as the base has them. They share no memory with the files. Tied tensors come once.

    Raises:
        InvalidMixError: a model has no folder, or the method is not known.
        CheckpointError: a folder cannot be read as a checkpoint.
        IncompatibleModelsError: names or shapes differ, or a tensor that is not floating has other values in an expert.
    """
    merge = merger(recipe)
    fingerprints = [fingerprint for fingerprint, _ in recipe.coefficients]
    for fingerprint in (recipe.base, *fingerprints):
        if fingerprint not in folders:
            raise InvalidMixError(f"the recipe needs the model {fingerprint[:12]}, which is not among the pool's files")
    with ExitStack() as stack:
        base = stack.enter_context(CheckpointReader(folders[recipe.base]))
        readers = [
            base if fingerprint == recipe.base else stack.enter_context(CheckpointReader(folders[fingerprint]))
            for fingerprint in fingerprints
        ]
        for reader in readers:
            if reader is not base:
                check_tensors(base.tensors, reader.tensors, name=str(reader.folder))
                _check_integers(base, reader)
        return _mix(merge, base, readers, stack.pop_all())


def _mix(
    merge: Merge, base: CheckpointReader, readers: list[CheckpointReader], stack: ExitStack
) -> Iterator[tuple[str, Tensor]]:
    with stack:
        for name, info in base.tensors.items():
            if info.is_floating:
                yield name, merge(name, [reader.get(name) for reader in readers])
            else:
                yield name, base.get(name).clone()


def _check_integers(base: CheckpointReader, expert: CheckpointReader) -> None:
    for name, info in base.tensors.items():
        if info.is_floating or name not in expert.tensors:
            continue
        if not torch.equal(base.get(name).to(torch.int64), expert.get(name).to(torch.int64)):
            raise IncompatibleModelsError(
                f"tensor {name} is {info} and cannot be averaged; the base and {expert.folder} have other values in it"
            )
