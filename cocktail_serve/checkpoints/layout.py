"""What lies in a model folder, told from file names and small JSON files alone: no tensor is read here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cocktail_serve.errors import CheckpointError

CONFIG = "config.json"
MODULES = "modules.json"
ADAPTER_CONFIG = "adapter_config.json"
LIBRARY_CONFIG = "config_sentence_transformers.json"

_CLASS_OF = {"sparse_encoder": "SparseEncoder", "multi_vector_encoder": "MultiVectorEncoder"}
"""The class whose models have modules of such a part; releases before 6 did not write the class down."""

_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of parameters.

    Attributes:
        prefix: put before the names of its tensors: empty for the model itself, `2_Dense/` for a sentence-transformers
            module with parameters of its own.
        names: what the sharded index says the file holds; None where there is no index.
    """

    path: Path
    prefix: str
    names: frozenset[str] | None


@dataclass(frozen=True, slots=True)
class Module:
    """An entry of sentence-transformers' `modules.json`: type (last part of its dotted name) and folder.

    Attributes:
        library: the part of sentence-transformers that it belongs to, such as `sparse_encoder`.
    """

    type: str
    path: str
    library: str = field(default="", compare=False)


def check_folder(folder: Path) -> None:
    """Refuses what cannot be mixed and can be told without opening a tensor.

    Raises:
        CheckpointError: no folder, an adapter instead of a model, or no `config.json`.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}")
    if (model_folder(folder) / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}), not a full checkpoint: it is an expert in a pool of its "
            "base and nothing alone; or merge it into its base with peft (merge_and_unload) and name the result"
        )
    read_config(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The model's `config.json`, wherever sentence-transformers put it.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    path = model_folder(folder) / CONFIG
    if not path.is_file() and (adapters := sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))):
        names = ", ".join(adapter.parent.name for adapter in adapters)
        raise CheckpointError(
            f"{folder} holds adapters in folders of their own ({names}), as peft saves those that have a name: give "
            f"the folder of one, such as {adapters[0].parent}"
        )
    return read_json(path)


def model_class(folder: Path) -> str:
    """The class that the model's configuration names; empty where it names none.

    Raises:
        CheckpointError: `architectures` is no list of names.
    """
    named = read_config(folder).get("architectures") or [""]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise CheckpointError(
            f"{model_folder(folder) / CONFIG}: architectures must be a list of class names, got {named!r:.80}"
        )
    return named[0]


def generates(folder: Path) -> bool:
    """Whether the model writes text, by the class that its configuration names."""
    return model_class(folder).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: missing, unreadable, or not an object.
    """
    value = load_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def load_json(path: Path) -> Any:
    """A JSON value from a file of a checkpoint.

    Raises:
        CheckpointError: missing, or unreadable.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is no complete model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path} as JSON: {error}") from error


def read_modules(folder: Path) -> list[Module]:
    """The sentence-transformers modules of a folder in order; empty where there is no `modules.json`.

    Raises:
        CheckpointError: malformed, or a module that is code of the checkpoint's own.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    entries = load_json(path)
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("type"), str) and isinstance(e.get("path", ""), str) for e in entries
    ):
        raise CheckpointError(f"{path} must hold a list of modules with 'type' and 'path'")
    modules = []
    for entry in entries:
        if not entry["type"].startswith("sentence_transformers."):
            raise CheckpointError(
                f"{path}: module {entry['type']!r} is code that comes with the checkpoint, which is never run"
            )
        _, library, *inner = entry["type"].split(".")
        name = [library, *inner][-1]
        modules.append(Module(type=name, path=_inside(entry.get("path", ""), path), library=library))
    return modules


def read_library_class(folder: Path) -> str | None:
    """The class of sentence-transformers that saved a folder, such as `SparseEncoder`; None where it is not said.

    Raises:
        CheckpointError: a file that says it cannot be read.
    """
    path = folder / LIBRARY_CONFIG
    named = read_json(path).get("model_type") if path.is_file() else None
    if named is not None:
        return str(named)
    return next((_CLASS_OF[m.library] for m in read_modules(folder) if m.library in _CLASS_OF), None)


def model_folder(folder: Path) -> Path:
    """Where the transformer's own files are: the folder, or (older sentence-transformers) `0_Transformer` in it."""
    if (folder / CONFIG).is_file():
        return folder
    modules = read_modules(folder)
    return folder / modules[0].path if modules else folder


def weight_files(folder: Path) -> list[WeightFile]:
    """The files with parameters: the model's, then those of modules that have their own. Safetensors go before `.bin`.

    Raises:
        CheckpointError: none, or an index that is malformed or names a file that is missing.
    """
    root = model_folder(folder)
    files = _weights_in(root, prefix="")
    if not files:
        raise CheckpointError(
            f"{root} holds no parameters: expected model.safetensors, model.safetensors.index.json or pytorch_model.bin"
        )
    return files + module_files(folder)


def module_files(folder: Path) -> list[WeightFile]:
    """The files of sentence-transformers modules that have parameters of their own.

    Raises:
        CheckpointError: an index that is malformed or names a file that is missing.
    """
    root = model_folder(folder)
    return [
        file
        for module in read_modules(folder)
        if module.path and folder / module.path != root
        for file in _weights_in(folder / module.path, prefix=f"{module.path}/")
    ]


def _weights_in(folder: Path, *, prefix: str) -> list[WeightFile]:
    for single, index in zip(_SINGLE_FILES, _INDEX_FILES, strict=True):
        if (folder / single).is_file():
            return [WeightFile(folder / single, prefix, None)]
        if (folder / index).is_file():
            return _sharded(folder / index, prefix)
    return []


def _sharded(index: Path, prefix: str) -> list[WeightFile]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, Mapping)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(f"{index}: 'weight_map' must map each tensor's name to the shard that holds it")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(file, set()).add(name)
    suffix = ".safetensors" if ".safetensors" in index.name else ".bin"
    files = []
    for file in sorted(shards):
        path = index.parent / _inside(file, index)
        if not path.is_file():
            raise CheckpointError(
                f"{index} names the shard {file!r}, which is missing: the download is incomplete, fetch it again"
            )
        if not file.endswith(suffix):
            raise CheckpointError(f"{index} names the shard {file!r}, which is no {suffix} file")
        files.append(WeightFile(path, prefix, frozenset(shards[file])))
    return files


def _inside(relative: str, source: Path) -> str:
    """A path that a file of the checkpoint names; it may not lead out of the folder."""
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or "\0" in relative or "\\" in relative:
        raise CheckpointError(f"{source} names {relative!r}, which lies outside its folder")
    return "" if str(parts) == "." else str(parts)
