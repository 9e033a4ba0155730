"""Where a base stores what an adapter changes: classes and releases of transformers call one parameter differently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cocktail_serve.checkpoints.adapters.config import MERGE
from cocktail_serve.checkpoints.naming import ParameterNames, parameter_names
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import IncompatibleModelsError

_WRAPPING_MODULE = "language_model."
"""What a model for text and images puts between itself and the layers of the one for text that it holds."""


@dataclass(frozen=True, slots=True)
class AdaptedParameter:
    """A parameter of the model that an adapter was trained in.

    Attributes:
        name: the stored one; of a place that is tied to another, which the base stores, the model's.
        stored: what the base calls the tensor that it is made of.
    """

    name: str
    stored: str


class BaseNames:
    """The parameters of a base, found by the names that they have in models.

    Args:
        folder: the adapter's, for messages.
        base: open.
    """

    def __init__(self, folder: Path, base: CheckpointReader) -> None:
        self._folder = folder
        self._base = base

    def place_of(self, name: str) -> AdaptedParameter:
        """Where a parameter is stored: under its name; under one that begins otherwise, since classes put prefixes such
        as `model.` before it; or under one that transformers renames to it, or to what it is tied to.

        Raises:
            IncompatibleModelsError: nowhere, in several tensors, or together with others.
        """
        found = [name] if name in self._base.parameters else self._ends.find(name)
        if len(found) == 1:
            return AdaptedParameter(found[0], found[0])
        if not found:
            found = self._held_as(name)
        if len(found) != 1:
            raise IncompatibleModelsError(
                f"{self._folder} changes {name}, which the base {self._base.folder} "
                + (f"holds as {found}" if found else "does not hold: it is the adapter of another model or model class")
            )
        is_tied = len(self.library.sharing(found[0])) > 1
        return AdaptedParameter(self.library.name_of(name) if is_tied else found[0], found[0])

    def _held_as(self, name: str) -> list[str]:
        """The tensors that transformers makes the same parameter of."""
        wanted = self.library.target(name).name
        found = [stored for stored in self._base.parameters if wanted in self.library.made_of(stored)]
        if any(self.library.target(stored).part for stored in found):
            raise IncompatibleModelsError(
                f"{self._folder} changes {name}, which the base {self._base.folder} stores in parts or joined with "
                f"others ({', '.join(found[:3])}): {MERGE}"
            )
        return found

    @cached_property
    def library(self) -> ParameterNames:
        """What transformers knows of the model."""
        return parameter_names(self._base.folder)

    @cached_property
    def _ends(self) -> _Ends:
        return _Ends(self._base.parameters)


class _Ends:
    """Names by how they end, whole components at a time."""

    def __init__(self, names: Iterable[str]) -> None:
        self._ends: dict[str, list[str]] = {}
        self._plain: dict[str, list[str]] = {}
        for name in names:
            plain = name.replace(_WRAPPING_MODULE, "")
            self._plain.setdefault(plain, []).append(name)
            for end in _ends(plain):
                self._ends.setdefault(end, []).append(name)

    def find(self, name: str) -> list[str]:
        """Those that end with a name, or else that it ends with."""
        plain = name.replace(_WRAPPING_MODULE, "")
        longer = self._ends.get(plain)
        return longer or next((self._plain[end] for end in _ends(plain) if end in self._plain), [])


def _ends(name: str) -> Iterator[str]:
    """A dotted name, and what is left of it without its first component, its first two, and so on."""
    while name:
        yield name
        name = name.partition(".")[2]
