"""One file of tensors, safetensors or pickled: what is in it and where, mapped from disk and read as asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cocktail_serve.checkpoints.layout import WeightFile
from cocktail_serve.checkpoints.mapping import HeldFile
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

    @property
    def file(self) -> HeldFile:
        """What its bytes come from."""
        ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What is in it."""
        ...

    def get_tensor(self, name: str) -> Tensor: ...

    def get_bytes(self, name: str) -> memoryview: ...


class _Safetensors:
    """An open safetensors file."""

    def __init__(self, path: Path) -> None:
        try:
            self.file = HeldFile(path)
            self.infos, self._offsets = _read_header(path, self.file)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}): it is truncated or corrupt, fetch it again"
            ) from error

    def get_bytes(self, name: str) -> memoryview:
        return self.file.read(*self._offsets[name])

    def get_tensor(self, name: str) -> Tensor:
        import torch

        info, content = self.infos[name], self.get_bytes(name)
        dtype = getattr(torch, info.dtype)
        if not content:
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype).view(info.shape)


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a tensor lies in its storage, which is bytes `begin` to `end` of the file; the rest as in torch."""

    begin: int
    end: int
    offset: int
    stride: tuple[int, ...]


class _Pickled:
    """An open `.bin` file. The pickle is read for where its tensors lie; their bytes come from the file itself."""

    def __init__(self, path: Path) -> None:
        self.file = HeldFile(path)
        self.infos, self._layouts = _read_pickle(path, self.file)

    def get_tensor(self, name: str) -> Tensor:
        import torch

        info, layout = self.infos[name], self._layouts[name]
        dtype = getattr(torch, info.dtype)
        if not info.num_elements:
            return torch.empty(info.shape, dtype=dtype)
        storage = torch.frombuffer(self.file.read(layout.begin, layout.end), dtype=dtype)
        return storage.as_strided(info.shape, layout.stride, layout.offset)

    def get_bytes(self, name: str) -> memoryview:
        return tensor_bytes(self.get_tensor(name))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements in C order."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def open_tensors(path: Path) -> TensorSource:
    """Opens one file of tensors, safetensors or a `.bin` of tensors alone.

    Raises:
        CheckpointError: it is corrupt, or holds anything else.
    """
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)


def open_weights(file: WeightFile) -> TensorSource:
    """Opens a file of a model's parameters.

    Raises:
        CheckpointError: it is corrupt, is not what the index says, or holds a dtype that cannot be averaged.
    """
    source = open_tensors(file.path)
    if file.names is not None and file.names != source.infos.keys():
        odd = sorted(file.names ^ source.infos.keys())[0]
        place = "is not in it" if odd in file.names else "is in it and not in the index"
        raise CheckpointError(f"{file.path}: the index and the shard disagree: tensor {odd!r} {place}")
    for name, info in source.infos.items():
        if info.dtype not in ITEM_BYTES:
            raise _quantised(file.path, name, info.dtype)
    return source


_MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""


def _read_header(path: Path, file: HeldFile) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Names, dtypes and shapes in the order of the bytes, and where in the file each begins and ends.

    Read and checked here, where the library would: it opens the path anew, which may lead to another file by then.

    Raises:
        CheckpointError: the file ends early, names a tensor twice, or holds a dtype that cannot be averaged.
        ValueError, RecursionError: the header is none, or does not cover the file without overlap and hole.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CheckpointError(f"{path}: the header names {twice[0]!r} twice; the file is corrupt")
        return dict(pairs)

    num_bytes = file.state.num_bytes
    if num_bytes < 8:
        raise ValueError("it has no header")
    length = int.from_bytes(file.copy(0, 8), "little")
    if length > min(_MAX_HEADER_BYTES, num_bytes - 8):
        raise ValueError("its header is longer than the file, or than the format allows")
    header = json.loads(bytes(file.copy(8, 8 + length)), object_pairs_hook=unique)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    infos, offsets, reached = {}, {}, 0
    entries = [(_span_of(name, entry), name, entry) for name, entry in header.items()]
    for (begin, end), name, entry in sorted(entries, key=lambda item: item[:2]):
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            if entry["dtype"] in _OTHER_DTYPES:
                raise _quantised(path, name, entry["dtype"])
            raise ValueError(f"tensor {name!r} is of the unknown dtype {entry['dtype']!r}")
        info = TensorInfo(dtype, tuple(entry["shape"]))
        if begin != reached or end - begin != info.num_bytes:
            raise ValueError(f"tensor {name!r} does not lie where its neighbours and its shape want it")
        # the bytes bound all sizes but those of an empty tensor
        if math.prod(size for size in info.shape if size) >= 2**63:
            raise CheckpointError(f"{path}: tensor {name!r} has the impossible shape {entry['shape']}; it is corrupt")
        infos[name], offsets[name], reached = info, (8 + length + begin, 8 + length + end), end
    if 8 + length + reached != num_bytes:
        raise ValueError("it is not as long as its header says")
    return infos, offsets


_OTHER_DTYPES = frozenset(
    {"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "C64"}
    | {"U16", "U32", "U64"}
)
"""What the format has beside those that are read: quantised, complex, unsigned."""


def _span_of(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end.

    Raises:
        ValueError: the entry of the header is not one.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise ValueError(f"its header says nothing of tensor {name!r}")
    shape, span = entry.get("shape"), entry.get("data_offsets")
    for numbers in (shape, span):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"shape and place of tensor {name!r} must be lists of numbers")
    assert isinstance(span, list)
    if len(span) != 2:
        raise ValueError(f"tensor {name!r} needs a begin and an end")
    return span[0], span[1]


def _quantised(path: Path, name: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor {name!r} is {dtype}, a quantised or complex dtype, which cannot be averaged; "
        "use the float32, float16 or bfloat16 checkpoint"
    )


def _read_pickle(path: Path, file: HeldFile) -> tuple[dict[str, TensorInfo], dict[str, _Layout]]:
    """What a state dict holds, and where: torch's own loader runs without reading a tensor.

    Raises:
        CheckpointError: it is no state dict of dense tensors, or holds anything else.
    """
    import torch

    try:
        # weights_only is what keeps a pickle from running code, the device what keeps its tensors from being read
        with file.open() as opened:
            state = torch.load(opened, map_location="meta", weights_only=True)
    except Exception as error:  # a corrupt pickle can raise anything
        raise _unreadable(path, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict; convert it to safetensors")
    infos, layouts = {}, {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            kind = "Tensor" if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(f"{path}: {name!r} is a {kind}; a state dict maps names to dense tensors")
        begin = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if begin is None:
            raise _unreadable(path, "it tells of no place in the file")
        end = begin + value.untyped_storage().nbytes()
        if end > file.state.num_bytes:
            raise _unreadable(path, f"tensor {name!r} ends behind the file")
        infos[name] = TensorInfo(str(value.dtype).removeprefix("torch."), tuple(value.shape))
        layouts[name] = _Layout(begin, end, int(value.storage_offset()), tuple(value.stride()))
    return infos, layouts


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as tensors alone ({reason}): it is "
        "corrupt, of an old format, or a pickle that would run code, which is never done; convert it to safetensors"
    )
