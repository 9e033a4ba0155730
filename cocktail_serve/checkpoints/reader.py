"""Parameters of a model folder by name, mapped from disk, so that opening a checkpoint costs no memory."""

from __future__ import annotations

import copy
import json
import math
import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Self
from weakref import WeakValueDictionary

from safetensors import SafetensorError, safe_open

from cocktail_serve.checkpoints.layout import WeightFile, check_folder, read_config, weight_files
from cocktail_serve.dtypes import FLOATING, ITEM_BYTES
from cocktail_serve.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")

_RECOMPUTED = ("rotary_emb.inv_freq",)
"""Floating buffers that old checkpoints carry and every engine computes from the configuration."""

_MASKS = (".bias", ".masked_bias")
"""How further such buffers end, causal masks: of four dimensions or of none, which no bias has."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor.

    Attributes:
        dtype: name, as `bfloat16`.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]

    @property
    def is_floating(self) -> bool:
        return self.dtype in FLOATING

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class TensorSource(Protocol):
    """An open file of parameters."""

    def get_tensor(self, name: str) -> Tensor: ...

    def get_bytes(self, name: str) -> memoryview: ...


class CheckpointReader:
    """Reads a model folder: safetensors, or `.bin` files that hold tensors and nothing else.

    Opening it reads and checks all headers and no parameters. Use it as a context manager; tensors got from it stay
    valid after it is closed, since they hold their mapping.

    Args:
        folder: a full checkpoint with its `config.json`, in one file or in shards with an index.

    Attributes:
        tensors: what is stored, by name, in the order of the files. Without what is not a parameter of its own: the
            output embeddings where `tie_word_embeddings` makes them the input embeddings (see `tied`), and rotary
            frequencies.
        tied: names left out of `tensors` because they repeat another tensor, with that tensor's name.
        unread: floating tensors that this checkpoint and the base it is named as (`named_as`) do not both have, and
            that no engine reads; by the name of whoever has one.

    Raises:
        CheckpointError: the folder cannot be read as a checkpoint: names the file and what to do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        check_folder(self.folder)
        self._get: dict[str, tuple[TensorSource, str]] = {}
        self._prefixes: dict[str, str] = {}
        tensors: dict[str, TensorInfo] = {}
        for file in weight_files(self.folder):
            infos = self._open(file)
            for twice in infos.keys() & tensors.keys():
                raise CheckpointError(f"{file.path}: tensor {twice!r} is already in another shard")
            tensors |= infos
        self.tied = MappingProxyType(_tied(self.folder, tensors))
        self.unread: Mapping[str, TensorInfo] = MappingProxyType({})
        left_out = self.tied.keys() | _buffers(self.folder, tensors)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: info for name, info in tensors.items() if name not in left_out}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files; a mapping ends with the last tensor got from it."""
        self._get.clear()

    def get(self, name: str) -> Tensor:
        """The tensor of that name, a view of the mapped file: treat it as read-only.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        source, key = self._find(name)
        return source.get_tensor(key)

    def get_bytes(self, name: str) -> memoryview:
        """The tensor's elements as they lie in the mapped file, in C order, without torch where it is safetensors.

        Treat them as read-only.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        source, key = self._find(name)
        return source.get_bytes(key)

    def named_as(self, base: CheckpointReader) -> CheckpointReader:
        """The same checkpoint under the names that a base of the same architecture has for the same parameters.

        What differs in names alone, or by tensors that no engine reads, can be mixed then: where this checkpoint lacks
        one of those, the base's takes its place; where it has one more, that is left out. It is this reader itself
        where both have the same names already, which costs nothing to see, or where transformers does not know them.

        Raises:
            CheckpointError: transformers does not know the architecture, so that names cannot be told.
        """
        mine, theirs = (
            {name for name, info in tensors.items() if info.is_floating} for tensors in (base.tensors, self.tensors)
        )
        if mine == theirs:
            return self
        from cocktail_serve.checkpoints.naming import pair_names, parameter_names

        names = parameter_names(base.folder)
        if not names.covers(base.tensors):
            return self
        paired, lone = pair_names(base.tensors, self.tensors, names)
        tensors: dict[str, TensorInfo] = {}
        renamed = copy.copy(self)
        renamed._get, renamed._prefixes = {}, {}
        for name, info in base.tensors.items():
            own = paired[name]
            if own is not None:
                tensors[name] = self.tensors[own]
                renamed._get[name] = self._get[own]
            elif not lone[name] and info.is_floating:
                tensors[name] = info
                renamed._get[name] = base._get[name]
        for name in lone.keys() & self.tensors.keys():
            if lone[name]:
                tensors[name] = self.tensors[name]
                renamed._get[name] = self._get[name]
        renamed.tensors = MappingProxyType(tensors)
        stored = {**self.tensors, **base.tensors}
        renamed.unread = MappingProxyType(
            {name: stored[name] for name, is_read in lone.items() if not is_read and stored[name].is_floating}
        )
        return renamed

    def prefix_of(self, name: str) -> str:
        """Where a tensor lies: empty for the model itself, `2_Dense/` for a module with parameters of its own."""
        return self._prefixes[name]

    @property
    def dtype(self) -> str:
        """The floating dtype that most bytes of the parameters have."""
        sizes: dict[str, int] = {}
        for info in self.tensors.values():
            if info.is_floating:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
        if not sizes:
            raise CheckpointError(f"{self.folder} holds no floating tensor")
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def num_bytes(self) -> int:
        """Size of the parameters as stored."""
        return sum(info.num_bytes for info in self.tensors.values())

    def _find(self, name: str) -> tuple[TensorSource, str]:
        try:
            return self._get[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}") from None

    def _open(self, file: WeightFile) -> dict[str, TensorInfo]:
        source, infos = open_tensors(file.path)
        if file.names is not None and file.names != infos.keys():
            odd = sorted(file.names ^ infos.keys())[0]
            place = "is not in it" if odd in file.names else "is in it and not in the index"
            raise CheckpointError(f"{file.path}: the index and the shard disagree: tensor {odd!r} {place}")
        for name, info in infos.items():
            if info.dtype not in ITEM_BYTES:
                raise _quantised(file.path, name, info.dtype)
            self._get[file.prefix + name] = (source, name)
            self._prefixes[file.prefix + name] = file.prefix
        return {file.prefix + name: info for name, info in infos.items()}


class _Safetensors:
    """A mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        try:
            # checks lengths, offsets (no overlap, no hole) and that the file is as long as the header says
            with safe_open(path, framework="numpy"), path.open("rb") as file:
                self._mapped = memoryview(_map_file(file))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}): it is truncated or corrupt, fetch it again"
            ) from error
        self.infos, self._offsets = _read_header(path, self._mapped)

    def get_bytes(self, name: str) -> memoryview:
        begin, end = self._offsets[name]
        return self._mapped[begin:end]

    def get_tensor(self, name: str) -> Tensor:
        import torch

        info, content = self.infos[name], self.get_bytes(name)
        dtype = getattr(torch, info.dtype)
        if not content:
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype).view(info.shape)


_mapped_files: WeakValueDictionary[tuple[int, ...], mmap.mmap] = WeakValueDictionary()
_mapping = threading.Lock()


def _map_file(file: BinaryIO) -> mmap.mmap:
    """The whole file in memory, once for all who hold it: what one has touched costs the next no page fault."""
    status = os.fstat(file.fileno())
    version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    with _mapping:
        mapped = _mapped_files.get(version)
        if mapped is None:
            # private and so writable, which torch wants; nothing is written, so nothing is copied
            mapped = _mapped_files[version] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return mapped


class _StateDict:
    """A state dict behind the methods of a safetensors file that are used here."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def get_bytes(self, name: str) -> memoryview:
        return tensor_bytes(self.get_tensor(name))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements in C order."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def open_tensors(path: Path) -> tuple[TensorSource, dict[str, TensorInfo]]:
    """Opens one file of tensors, safetensors or a `.bin` of tensors alone, and says what is in it.

    Raises:
        CheckpointError: it is corrupt, or holds anything else.
    """
    if path.suffix == ".safetensors":
        source = _Safetensors(path)
        return source, source.infos
    return _open_bin(path)


def _read_header(path: Path, content: memoryview) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Names, dtypes and shapes in the order of the bytes, and where in the file each begins and ends.

    The file has passed safetensors' own checks.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CheckpointError(f"{path}: the header names {twice[0]!r} twice; the file is corrupt")
        return dict(pairs)

    length = int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8 : 8 + length]), object_pairs_hook=unique)
    header.pop("__metadata__", None)
    infos, offsets = {}, {}
    for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise _quantised(path, name, entry["dtype"])
        # the bytes bound all sizes but those of an empty tensor
        if math.prod(size for size in entry["shape"] if size) >= 2**63:
            raise CheckpointError(f"{path}: tensor {name!r} has the impossible shape {entry['shape']}; it is corrupt")
        infos[name] = TensorInfo(dtype, tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        offsets[name] = (8 + length + begin, 8 + length + end)
    return infos, offsets


def _quantised(path: Path, name: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor {name!r} is {dtype}, a quantised or complex dtype, which cannot be averaged; "
        "use the float32, float16 or bfloat16 checkpoint"
    )


def _open_bin(path: Path) -> tuple[_StateDict, dict[str, TensorInfo]]:
    import torch

    try:
        # weights_only is what keeps a pickle from running code; mmap what keeps it from being read whole
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a corrupt pickle can raise anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(
            f"{path} cannot be read as tensors alone ({reason}): it is "
            "corrupt, of an old format, or a pickle that would run code, which is never done; convert it to safetensors"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict; convert it to safetensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name!r} is a {type(value).__name__}; a state dict maps names to dense tensors"
            )
    return _StateDict(state), {
        name: TensorInfo(str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in state.items()
    }


def _tied(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Output embeddings that are stored though the configuration ties them to the input embeddings."""
    outputs = [name for name in tensors if name in _OUTPUT_EMBEDDINGS]
    if not outputs or not _ties_embeddings(folder):
        return {}
    inputs = [name for name in tensors if name.endswith(_INPUT_EMBEDDINGS)]
    return {
        output: source for output in outputs for source in inputs[:1] if tensors[source].shape == tensors[output].shape
    }


def _buffers(folder: Path, tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Floating tensors that are no parameters: whoever computes with the model makes them anew.

    Causal masks are stored as numbers of every kind, infinite ones among them. They are told by their shape first, then
    by the library: it has no place for them.
    """
    found = {name for name in tensors if name.endswith(_RECOMPUTED)}
    masks = {
        name
        for name, info in tensors.items()
        if info.is_floating and name.endswith(_MASKS) and len(info.shape) in (0, 4) and "/" not in name
    }
    if masks:
        from cocktail_serve.checkpoints.naming import parameter_names

        names = parameter_names(folder)
        found |= {name for name in masks if not names.target(name).is_read}
    return found


def _ties_embeddings(folder: Path) -> bool:
    config = read_config(folder)
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        if "tie_word_embeddings" in section:
            return bool(section["tie_word_embeddings"])
    from cocktail_serve.checkpoints.model_config import load_model_config

    return bool(load_model_config(folder).get("tie_word_embeddings", True))
