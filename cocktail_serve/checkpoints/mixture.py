"""A recipe's parameters, made straight from the models' files: one tensor at a time, or chunk by chunk into a file."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cocktail_serve.checkpoints.adapter import AdapterReader, read_expert
from cocktail_serve.checkpoints.compatibility import check_tensors
from cocktail_serve.checkpoints.reader import CheckpointReader, TensorInfo
from cocktail_serve.errors import IncompatibleModelsError, InvalidMixError
from cocktail_serve.merging.native import Operand
from cocktail_serve.methods import find_method
from cocktail_serve.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from cocktail_serve.merging.merger import Empty


class Mixture:
    """A recipe and the open files of its models, which fit each other.

    Args:
        folders: folder by fingerprint, at least of the base and of every model in the recipe. They are taken at their
            word: who named them by fingerprint has read them.

    Attributes:
        tensors: what the mixture holds, in the order of the base's files: floating tensors in the recipe's dtype,
            others as the base has them. Tied tensors once.
        method: what the recipe's method is.
        weights: coefficients in the order of accumulation.
        readers: the recipe's models by fingerprint, in that order; closed with the mixture.

    Raises:
        InvalidMixError: a model has no folder, or the method is not known.
        CheckpointError: a folder cannot be read as a checkpoint.
        IncompatibleModelsError: names or shapes differ, or a tensor that is not floating has other values in an expert.
    """

    def __init__(self, recipe: Recipe, folders: Mapping[str, Path]) -> None:
        self.method = find_method(recipe.method)
        fingerprints = [fingerprint for fingerprint, _ in recipe.coefficients]
        for fingerprint in (recipe.base, *fingerprints):
            if fingerprint not in folders:
                raise InvalidMixError(
                    f"the recipe needs the model {fingerprint[:12]}, which is not among the pool's files"
                )
        self.recipe = recipe
        self.weights = [coefficient for _, coefficient in recipe.coefficients]
        with ExitStack() as stack:
            self.base = stack.enter_context(CheckpointReader(folders[recipe.base]))
            self.readers: dict[str, CheckpointReader | AdapterReader] = {}
            for fingerprint in fingerprints:
                if fingerprint == recipe.base:
                    self.readers[fingerprint] = self.base
                    continue
                reader = read_expert(folders[fingerprint], self.base)
                stack.callback(reader.close)
                self.readers[fingerprint] = reader
            for reader in self.readers.values():
                if reader is not self.base:
                    check_tensors(self.base.tensors, reader.tensors, name=str(reader.folder))
                    _check_integers(self.base, reader)
            self._stack = stack.pop_all()
        self.tensors = {
            name: TensorInfo(recipe.dtype if info.is_floating else info.dtype, info.shape)
            for name, info in self.base.tensors.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def params(self, *, empty: Empty | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each tensor, whole, merged when it is asked for. They share no memory with the files.

        Args:
            empty: as of `merger`.
        """
        from cocktail_serve.merging.merger import merger

        merge = merger(self.recipe, empty=empty)
        for name, info in self.base.tensors.items():
            if info.is_floating:
                yield name, merge(name, [reader.get(name) for reader in self.readers.values()])
            else:
                yield name, self.base.get(name).clone()

    @property
    def is_mapped(self) -> bool:
        """Whether all elements lie in files as they are summed, so that any part of them can be summed apart."""
        return not any(isinstance(reader, AdapterReader) for reader in self.readers.values())

    def operands(self, name: str) -> tuple[list[Operand], list[memoryview]]:
        """A floating tensor of every model as the compiled kernel takes it, and what keeps it in memory."""
        contents = [reader.get_bytes(name) for reader in self.readers.values()]
        operands = [
            Operand(address_of(content), reader.tensors[name].dtype)
            for reader, content in zip(self.readers.values(), contents, strict=True)
        ]
        return operands, contents


def iter_mixture(recipe: Recipe, folders: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Mixes the recipe, one tensor at a time in the order of the base's files.

    All that can be told in advance is checked in this call, before it returns and so before the first tensor: an
    iterator that fails half-way leaves whoever loads from it with half a model. Memory stays at one mixed tensor; the
    inputs are mapped files.

    Returns:
        Iterator of name and tensor, see `Mixture`, whose arguments and errors these are.
    """
    return _params_of(Mixture(recipe, folders))


def _params_of(mixture: Mixture) -> Iterator[tuple[str, Tensor]]:
    with mixture:
        yield from mixture.params()


def address_of(content: memoryview) -> int:
    """Where a buffer that is not empty begins in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(content))


def _check_integers(base: CheckpointReader, expert: CheckpointReader | AdapterReader) -> None:
    names = [name for name, info in base.tensors.items() if not info.is_floating and name in expert.tensors]
    if not names:
        return
    import torch

    for name in names:
        if not torch.equal(base.get(name).to(torch.int64), expert.get(name).to(torch.int64)):
            raise IncompatibleModelsError(
                f"tensor {name} is {base.tensors[name]} and cannot be averaged; the base and {expert.folder} have "
                "other values in it"
            )
