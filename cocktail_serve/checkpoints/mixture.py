"""A recipe's parameters, made straight from the models' files: one tensor at a time, or chunk by chunk into a file."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cocktail_serve.checkpoints.adapters.reader import AdapterReader
from cocktail_serve.checkpoints.compatibility import check_tensors
from cocktail_serve.checkpoints.finite import LARGEST, OVERFLOWS_FROM, largest_and_not_finite
from cocktail_serve.checkpoints.quantisation import refusal
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.checkpoints.tensor_files import TensorInfo, tensor_bytes
from cocktail_serve.checkpoints.unchanged import open_base, open_expert_of
from cocktail_serve.errors import (
    CheckpointError,
    IncompatibleModelsError,
    InvalidMixError,
    ModelChangedError,
    NotFiniteError,
)
from cocktail_serve.merging.bounds import largest_of_mixture
from cocktail_serve.merging.native import Operand
from cocktail_serve.methods import find_method
from cocktail_serve.pool import Member
from cocktail_serve.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from cocktail_serve.merging.merger import Empty


class Mixture:
    """A recipe and the open files of its models, which fit each other and hold what their fingerprints say.

    As a context manager it looks at the files again at the end: what somebody wrote to meanwhile is mixed into nothing
    that anybody gets.

    Args:
        members: by fingerprint, at least the base and every model in the recipe.

    Attributes:
        tensors: what the mixture holds, in the order of the base's files: floating tensors in the recipe's dtype,
            others as the base has them. Tied tensors once.
        method: what the recipe's method is.
        weights: coefficients in the order of accumulation.
        readers: the recipe's models by fingerprint, in that order; closed with the mixture.
        may_overflow: whether an element may round to infinity, as far as the models' largest ones tell. Then each
            tensor is looked at once it is mixed.

    Raises:
        InvalidMixError: the pool lacks a model, or the method is not known.
        ModelChangedError: a model's files hold something else than its fingerprint says.
        CheckpointError: a folder cannot be read as a checkpoint, or the base is quantised.
        IncompatibleModelsError: names or shapes differ, or a tensor that is not floating has other values in an expert.
    """

    def __init__(self, recipe: Recipe, members: Mapping[str, Member]) -> None:
        self.method = find_method(recipe.method)
        fingerprints = [fingerprint for fingerprint, _ in recipe.coefficients]
        for fingerprint in (recipe.base, *fingerprints):
            if fingerprint not in members:
                raise InvalidMixError(
                    f"the recipe needs the model {fingerprint[:12]}, which is not among the pool's files"
                )
        self.recipe = recipe
        self.weights = [coefficient for _, coefficient in recipe.coefficients]
        self._names = [members[fingerprint].name for fingerprint in fingerprints]
        base = members[recipe.base]
        if base.quantisation is not None:
            raise CheckpointError(refusal(base.path))
        with ExitStack() as stack:
            self.base = stack.enter_context(open_base(base))
            self.readers: dict[str, CheckpointReader | AdapterReader] = {}
            for fingerprint in fingerprints:
                if fingerprint == recipe.base:
                    self.readers[fingerprint] = self.base
                    continue
                reader = open_expert_of(base, self.base, members[fingerprint])
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
        largest = largest_of_mixture(recipe, {f: members[f].largest for f in fingerprints})
        self.may_overflow = largest >= OVERFLOWS_FROM[recipe.dtype]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._stack:
            if error is None or isinstance(error, Exception):  # which a file that was cut short may be behind
                self.check_unwritten()

    def check_unwritten(self) -> None:
        """Proves that all that was mixed so far is of the models that the recipe names.

        Raises:
            ModelChangedError: a file was written to, or cut short, since it was opened.
        """
        for name, reader in zip(["base", *self._names], [self.base, *self.readers.values()], strict=True):
            try:
                reader.check_unwritten()
            except CheckpointError as error:
                raise ModelChangedError(f"the mixture is thrown away: of {name!r}, {error.message}") from error

    def params(self, *, empty: Empty | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each tensor, whole, merged when it is asked for. They share no memory with the files.

        Args:
            empty: as of `merger`.

        Raises:
            NotFiniteError: a tensor holds what its dtype cannot.
            ModelChangedError: as `check_unwritten`, after the last tensor.
        """
        from cocktail_serve.merging.merger import merger

        merge = merger(self.recipe, empty=empty)
        for name, info in self.base.tensors.items():
            if info.is_floating:
                merged = merge(name, [reader.get(name) for reader in self.readers.values()])
                if self.may_overflow:
                    self.check_finite(name, tensor_bytes(merged))
                yield name, merged
            else:
                yield name, self.base.get(name).clone()
        self.check_unwritten()

    def check_finite(self, name: str, merged: memoryview) -> None:
        """Looks at elements of a merged tensor.

        Raises:
            NotFiniteError: one is infinite or NaN; names the tensor and who went into it.
        """
        dtype = self.recipe.dtype
        _, count = largest_and_not_finite(merged, dtype)
        if count:
            parts = ", ".join(f"{weight:g} {model}" for model, weight in zip(self._names, self.weights, strict=True))
            raise NotFiniteError(
                f"tensor {name!r} of the mixture ({self.method.name}: {parts}) has {count:,} elements or more that "
                f"{dtype} cannot hold, which ends at {LARGEST[dtype]:g}; set engine.dtype to bfloat16 or float32, or "
                "give smaller merging weights"
            )

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


def iter_mixture(recipe: Recipe, members: Mapping[str, Member]) -> Iterator[tuple[str, Tensor]]:
    """Mixes the recipe, one tensor at a time in the order of the base's files.

    All that can be told in advance is checked in this call, before it returns and so before the first tensor: an
    iterator that fails half-way leaves whoever loads from it with half a model. Memory stays at one mixed tensor; the
    inputs are mapped files.

    Returns:
        Iterator of name and tensor, see `Mixture`, whose arguments and errors these are, and `Mixture.params`.
    """
    return _params_of(Mixture(recipe, members))


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
