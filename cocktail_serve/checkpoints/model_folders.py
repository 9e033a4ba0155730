"""Which models lie below some folders, in the layouts of publishers, trainers and the hub's cache.

Told from names and small files alone: no tensor is read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cocktail_serve.checkpoints.adapters.reader import is_adapter
from cocktail_serve.checkpoints.layout import ADAPTER_CONFIG, CONFIG, MODULES, model_folder, read_config, read_json
from cocktail_serve.checkpoints.opening import kind_of
from cocktail_serve.errors import CheckpointError
from cocktail_serve.pool import Kind

MAX_DEPTH = 5
"""Folders below the one given: `hub/models--org--name/snapshots/<commit>/<adapter>` is the deepest that is known."""

_HUB_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SAYS_NOTHING = re.compile(
    r"base|model|final|best|last|merged|output|outputs|adapter|adapters|default|snapshots|0_transformer|"
    r"checkpoint-\d+|[0-9a-f]{40}",
    re.IGNORECASE,
)
"""Names of folders that stand for a place in a layout, and not for a model."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model that was found.

    Attributes:
        name: what people call it: its folder's name, or the name of the folder around it where that says nothing.
        kind: of the pool that it can be the base of; None for an adapter.
        made_of: what its own files name as the model that it was fine-tuned from, paths and hub ids, as they stand.
    """

    folder: Path
    name: str
    kind: Kind | None
    made_of: tuple[str, ...] = ()

    @property
    def is_adapter(self) -> bool:
        return self.kind is None

    def is_called(self, named: str) -> bool:
        """Whether a path or a hub id in another model's files means this one, wherever it lay then."""
        path = Path(named).expanduser()
        if path.is_dir() and path.resolve() == self.folder:
            return True
        return path.name.casefold() in (self.folder.name.casefold(), self.name.casefold())


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A folder that was looked at and not taken.

    Attributes:
        why: for the operator: what is wrong with it, or why it is not needed.
    """

    folder: Path
    why: str


def find_model_folders(folders: Sequence[Path]) -> tuple[list[ModelFolder], list[LeftOut]]:
    """The models in and below some folders, each once, in the order of their paths.

    A folder with a model in it is looked into for adapters alone (peft's with a name of their own). Of a trainer's
    `checkpoint-N` the last is taken, where the folder around them holds no model; of the hub's cache the snapshot that
    `main` is.

    Raises:
        CheckpointError: one of `folders` is not there, or cannot be read.
    """
    found: dict[Path, ModelFolder] = {}
    left_out: dict[Path, LeftOut] = {}
    for folder in folders:
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {folder}")
        try:
            for each in _walk(folder.resolve(), MAX_DEPTH):
                if isinstance(each, ModelFolder):
                    found.setdefault(each.folder, each)
                else:
                    left_out.setdefault(each.folder, each)
        except OSError as error:
            raise CheckpointError(f"cannot look into {folder}: {error.strerror or error}") from error
    return list(found.values()), list(left_out.values())


def _walk(folder: Path, depth: int, *, adapters_alone: bool = False) -> Iterator[ModelFolder | LeftOut]:
    holds = _holds_model(folder)
    if holds and (not adapters_alone or is_adapter(folder)):
        yield _look_at(folder)
    if depth == 0:
        return
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if (folder / "snapshots").is_dir() and _HUB_FOLDER.fullmatch(folder.name):
        below = [_current_snapshot(folder)]
    steps = [path for path in below if _CHECKPOINT.fullmatch(path.name)]
    last = None if holds else max(steps, key=_step_of, default=None)
    for path in below:
        if path in steps and path != last:
            why = "the model itself lies in the folder around it" if holds else f"{last.name if last else ''} is later"
            if _holds_model(path):
                yield LeftOut(path, f"a checkpoint of a training run: {why}")
            continue
        yield from _walk(path.resolve(), depth - 1, adapters_alone=adapters_alone or holds)


def _holds_model(folder: Path) -> bool:
    """Whether it is the folder of a model, as far as names tell: a module's `config.json` is not one."""
    if (folder / ADAPTER_CONFIG).is_file() or (folder / MODULES).is_file():
        return True
    if not (folder / CONFIG).is_file():
        return False
    try:
        config = read_json(folder / CONFIG)
    except CheckpointError:
        return True  # which is told
    return "model_type" in config or "architectures" in config


def _look_at(folder: Path) -> ModelFolder | LeftOut:
    name = _name_of(folder)
    try:
        if is_adapter(folder):
            named = read_json(model_folder(folder) / ADAPTER_CONFIG).get("base_model_name_or_path")
            return ModelFolder(folder, name, None, _texts(named))
        kind = kind_of(folder)
        if kind is None:
            return LeftOut(folder, f"{CONFIG} names no architecture ('architectures'), so nothing says what it is")
        return ModelFolder(folder, name, kind, (*_texts(read_config(folder).get("_name_or_path")), *_of_card(folder)))
    except CheckpointError as error:
        return LeftOut(folder, error.message)


def _name_of(folder: Path) -> str:
    for path in (folder, *folder.parents):
        if hub := _HUB_FOLDER.fullmatch(path.name):
            return hub["name"]
        if path.name and not _SAYS_NOTHING.fullmatch(path.name):
            return path.name
    return folder.name


def _step_of(folder: Path) -> int:
    step = _CHECKPOINT.fullmatch(folder.name)
    return int(step[1]) if step else -1


def _current_snapshot(folder: Path) -> Path:
    """Of a model in the hub's cache: what `main` was when it was last fetched, else what was fetched last."""
    main = folder / "refs" / "main"
    if main.is_file() and (named := folder / "snapshots" / main.read_text().strip()).is_dir():
        return named
    snapshots = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=folder / "snapshots")


def _of_card(folder: Path) -> tuple[str, ...]:
    """`base_model` in the head of a model card; empty where there is none that can be read."""
    card = folder / "README.md"
    if not card.is_file():
        return ()
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return ()
    return _texts(values.get("base_model")) if isinstance(values, dict) else ()


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(each for each in values if isinstance(each, str) and each.strip("/. "))
