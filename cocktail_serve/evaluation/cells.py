"""Finished measurements, kept by content: a run that was broken off goes on where it was."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cocktail_serve.digest import digest_of
from cocktail_serve.errors import StorageError
from cocktail_serve.evaluation.metrics import Metric

VERSION = 1
"""Part of every key: raised when the same measurement comes to give other figures."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One system on one task.

    Attributes:
        system: name of the system, as it stands in a table's row.
        task: name of the task it is measured on.
        made_for: name of the task the system was made for; that of `task`, unless the two differ.
        metrics: values of each row (or query) by metric, in the rows' order: cells of one task are paired.
        about: what the system is (merging weights, losses on the examples, temperature, ...) and how it was measured
            (rows left out as too long, few-shot examples that fitted).
    """

    system: str
    task: str
    made_for: str
    metrics: Mapping[Metric, Sequence[float]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def mean(self, metric: Metric) -> float:
        values = self.metrics[metric]
        return sum(values) / len(values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class CellStore:
    """JSON values by key, each in a file named by the key's digest; in memory alone where there is no folder.

    Args:
        folder: made if missing.

    Raises:
        StorageError: the folder cannot be made, or a value not be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, Any] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"cannot make {folder}: {error.strerror or error}") from error

    def get(self, key: Mapping[str, Any]) -> Any | None:
        """The value kept for a key, or None. A file that was cut short counts as none."""
        digest = self._digest(key)
        if digest in self._memory or self._folder is None:
            return self._memory.get(digest)
        try:
            value = json.loads((self._folder / f"{digest}.json").read_text())["value"]
        except (FileNotFoundError, ValueError, KeyError):
            return None
        self._memory[digest] = value
        return value

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Keeps a value: whole on disk, or not at all."""
        digest = self._digest(key)
        self._memory[digest] = value
        if self._folder is None:
            return
        path = self._folder / f"{digest}.json"
        partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
        try:
            partial.write_text(json.dumps({"key": key, "value": value}))
            os.replace(partial, path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error

    def _digest(self, key: Mapping[str, Any]) -> str:
        return digest_of({"version": VERSION, **key})
