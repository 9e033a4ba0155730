"""Parameters of a model folder by name, mapped from disk, so that opening a checkpoint costs no memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Self

from cocktail_serve.checkpoints.layout import CONFIG, WeightFile, check_folder, model_folder, read_config, weight_files
from cocktail_serve.checkpoints.mapping import HeldFile, settings_state
from cocktail_serve.checkpoints.quantisation import Quantisation, QuantisedWeight, quantisation_settings, refusal
from cocktail_serve.checkpoints.tensor_files import TensorInfo, TensorSource, open_weights
from cocktail_serve.dtypes import FLOATING
from cocktail_serve.errors import CheckpointError
from cocktail_serve.pool import FileState

if TYPE_CHECKING:
    from torch import Tensor

_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")

_RECOMPUTED = ("rotary_emb.inv_freq",)
"""Floating buffers that old checkpoints carry and every engine computes from the configuration."""

_MASKS = (".bias", ".masked_bias")
"""How further such buffers end, causal masks: of four dimensions or of none, which no bias has."""


class CheckpointReader:
    """Reads a model folder: safetensors, or `.bin` files that hold tensors and nothing else.

    Opening it reads and checks all headers and no parameters. Use it as a context manager; tensors got from it stay
    valid after it is closed, since they hold their mapping.

    Args:
        folder: a full checkpoint with its `config.json`, in one file or in shards with an index.
        allow_quantised: also one that is quantised: a base that nothing is mixed with, beside whose weights adapters
            are served.

    Attributes:
        tensors: what is stored, by name, in the order of the files. Without what is not a parameter of its own: the
            output embeddings where `tie_word_embeddings` makes them the input embeddings (see `tied`), and rotary
            frequencies.
        quantisation: how it is quantised; None where it is not.
        quantised: the weights that are stored quantised, in several tensors each, by the parameter's name.
        tied: names left out of `tensors` because they repeat another tensor, with that tensor's name.
        unread: floating tensors that this checkpoint and the base it is named as (`named_as`) do not both have, and
            that no engine reads; by the name of whoever has one.
        repeated: floating tensors that are left out because another one becomes the same parameter of the base it is
            named as, with that one's name.
        files: the files that all this comes from, the configuration first, as they were opened.

    Raises:
        CheckpointError: the folder cannot be read as a checkpoint, or is quantised: names the file and what to do.
    """

    def __init__(self, folder: Path, *, allow_quantised: bool = False) -> None:
        self.folder = Path(folder)
        check_folder(self.folder)
        if not allow_quantised and quantisation_settings(self.folder):
            raise CheckpointError(refusal(self.folder))
        self.quantisation = Quantisation.of(self.folder)
        self._get: dict[str, tuple[TensorSource, str]] = {}
        self._prefixes: dict[str, str] = {}
        self._held: list[HeldFile] = []
        self._stored: CheckpointReader | None = None
        tensors: dict[str, TensorInfo] = {}
        try:
            config = settings_state(model_folder(self.folder) / CONFIG)
        except OSError as error:
            raise CheckpointError(f"cannot read the configuration of {self.folder}: {error.strerror}") from error
        for file in weight_files(self.folder):
            infos = self._open(file)
            for twice in infos.keys() & tensors.keys():
                raise CheckpointError(f"{file.path}: tensor {twice!r} is already in another shard")
            tensors |= infos
        self.files: tuple[FileState, ...] = (config, *(held.state for held in self._held))
        self.tied = MappingProxyType(_tied(self.folder, tensors))
        self.unread: Mapping[str, TensorInfo] = MappingProxyType({})
        self.repeated: Mapping[str, str] = MappingProxyType({})
        left_out = self.tied.keys() | _buffers(self.folder, tensors)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: info for name, info in tensors.items() if name not in left_out}
        )
        found = {} if self.quantisation is None else self.quantisation.find(self.tensors, self.get)
        self.quantised: Mapping[str, QuantisedWeight] = MappingProxyType(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files; a mapping ends with the last tensor got from it."""
        self._get.clear()
        for held in self._held:
            held.close()

    def check_unwritten(self) -> None:
        """Proves that what was read is what lies in the files. Before `close`.

        Raises:
            CheckpointError: one was written to, or cut short, since it was opened.
        """
        for held in self._held:
            held.check_unwritten()

    def get(self, name: str) -> Tensor:
        """The tensor of that name, a view of the mapped file: treat it as read-only.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        source, key = self._find(name)
        return source.get_tensor(key)

    def get_rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a matrix among `parameters`, dequantised where it is stored quantised.

        Args:
            rows: indices, `[num_rows]`.

        Raises:
            CheckpointError: the checkpoint has no such parameter.
        """
        weight = self.quantised.get(name)
        return self.get(name)[rows] if weight is None else weight.rows(self.get, rows)

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
        renamed._get, renamed._prefixes, renamed._stored = {}, {}, self
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
        taken = {own: names.target(own) for own in paired.values() if own is not None}
        by_target = {target: own for own, target in taken.items()}
        renamed.repeated = MappingProxyType(
            {
                name: by_target[names.target(name)]
                for name, info in self.tensors.items()
                if info.is_floating and name not in taken and name not in lone
            }
        )
        return renamed

    @property
    def parameters(self) -> Mapping[str, TensorInfo]:
        """`tensors`, but weights that are stored quantised as they are computed with, in place of their parts."""
        return self._dequantised if self.quantised else self.tensors

    @cached_property
    def _dequantised(self) -> Mapping[str, TensorInfo]:
        stored = {part for weight in self.quantised.values() for part in weight.parts.values()}
        weights = {name: TensorInfo(self.dtype, weight.shape) for name, weight in self.quantised.items()}
        return MappingProxyType({name: info for name, info in self.tensors.items() if name not in stored} | weights)

    @property
    def as_stored(self) -> CheckpointReader:
        """The checkpoint under its own names, whatever base it is named as: its fingerprint is of those."""
        return self if self._stored is None else self._stored

    def prefix_of(self, name: str) -> str:
        """Where a tensor lies: empty for the model itself, `2_Dense/` for a module with parameters of its own."""
        return self._prefixes[name]

    @property
    def dtype(self) -> str:
        """The floating dtype that most bytes of the parameters have; of a quantised checkpoint, that of its model."""
        if self.quantisation is not None:
            config = read_config(self.folder)
            named = str(config.get("dtype") or config.get("torch_dtype"))
            if named in FLOATING:
                return named
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
        source = open_weights(file)
        self._held.append(source.file)
        infos = source.infos
        for name in infos:
            self._get[file.prefix + name] = (source, name)
            self._prefixes[file.prefix + name] = file.prefix
        return {file.prefix + name: info for name, info in infos.items()}


def _tied(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Output embeddings that are stored though the configuration ties them to the input embeddings."""
    outputs = [name for name in tensors if name in _OUTPUT_EMBEDDINGS]
    if not outputs or not ties_embeddings(folder):
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


def ties_embeddings(folder: Path) -> bool:
    """Whether a model's output embeddings are its input embeddings.

    Raises:
        CheckpointError: the configuration cannot be read.
    """
    config = read_config(folder)
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        if "tie_word_embeddings" in section:
            return bool(section["tie_word_embeddings"])
    from cocktail_serve.checkpoints.model_config import load_model_config

    return bool(load_model_config(folder).get("tie_word_embeddings", True))
