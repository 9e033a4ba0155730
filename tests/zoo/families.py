"""The zoo as tests share it: families made when they are first asked for, each with its reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.config import PoolConfig
from tests.zoo.making import BASE, BASE_RESAVED_BY_4, BASE_RESAVED_BY_5, RESAVED_BY_4, make_family
from tests.zoo.other_release import OtherRelease
from tests.zoo.reference import Reference
from tests.zoo.specimens import Specimen

MAX_MODEL_LEN = 128


def cases(specimens: Iterable[Specimen], *members: tuple[str, ...]) -> list[Any]:
    """Parameters of a test: each specimen, with each of the tuples of members that it has and that are not refused.

    Those that `make test` leaves out are marked `full`.
    """
    return [
        pytest.param(
            specimen,
            *chosen,
            id="-".join((specimen.name, *chosen)),
            marks=() if specimen.is_in_short_run else pytest.mark.full,
        )
        for specimen in specimens
        for chosen in members or ((),)
        if not any(member in specimen.refused or member.replace("base-", "") in specimen.refused for member in chosen)
        and not (specimen.unknown_to_4 and any(member.endswith("by-4") for member in chosen))
    ]


@dataclass(frozen=True)
class Family:
    """A specimen on disk.

    Attributes:
        folders: by member.
        lacking: why members made by transformers 4 are missing, where they should not be.
    """

    specimen: Specimen
    folders: dict[str, Path]
    lacking: str

    @cached_property
    def reference(self) -> Reference:
        """Its models in transformers, peft and sentence-transformers."""
        return Reference(self.specimen, self.folders)

    def folder(self, member: str) -> Path:
        """Where a member lies. Skips the test where it cannot be made here."""
        if member not in self.folders:
            pytest.skip(f"no transformers 4 here: {self.lacking}")
        return self.folders[member]

    @property
    def experts(self) -> list[str]:
        """The members that can be mixed with the base."""
        others = {BASE, BASE_RESAVED_BY_4, BASE_RESAVED_BY_5, *self.specimen.refused}
        return [member for member in self.folders if member not in others]

    def pool(self, experts: list[str] | None = None, *, base: Path | None = None) -> PoolConfig:
        """The configuration of a pool of its base, or of another folder, with experts; all of them if not said."""
        engine: dict[str, Any] = {"type": "sentence_transformers", "dtype": "float32"}
        if self.specimen.kind == "decoder":
            engine = {"type": "vllm", "dtype": "float32", "max_model_len": MAX_MODEL_LEN}
        return PoolConfig.model_validate(
            {
                "id": "zoo",
                "kind": self.specimen.kind,
                "base": str(base or self.folders[BASE]),
                "experts": {name: str(self.folders[name]) for name in (self.experts if experts is None else experts)},
                "engine": engine,
            }
        )


class Zoo:
    """All families under one folder.

    Args:
        other: transformers 4, where it could be installed.
        lacking: why it could not.
    """

    def __init__(self, root: Path, other: OtherRelease | None, lacking: str = "") -> None:
        self._root = root
        self._other = other
        self._lacking = lacking
        self._families: dict[str, Family] = {}

    def family(self, specimen: Specimen) -> Family:
        """The family of a specimen, the same for every test."""
        if specimen.name not in self._families:
            folders = make_family(self._root / specimen.name, specimen, self._other)
            assert self._other is None or (RESAVED_BY_4 in folders) != specimen.unknown_to_4
            self._families[specimen.name] = Family(specimen, folders, self._lacking)
        return self._families[specimen.name]
