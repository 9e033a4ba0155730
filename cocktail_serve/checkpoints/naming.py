"""Which parameter of the model a tensor of a checkpoint becomes: told by the library that loads it, not by a list here.

Publishers save one model under several names: with the prefix of a head or without it, under the names of their own
code, with buffers that the architecture once had. transformers renames, splits and joins what it loads by a mapping of
its own, and the same mapping is asked here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail_serve.checkpoints.layout import read_config, read_modules
from cocktail_serve.checkpoints.model_config import open_model_config
from cocktail_serve.errors import CheckpointError
from cocktail_serve.loading import library_loading

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

_KEPT_MODELS = 16

POOLER = "pooler."
"""A layer of BERT and its kind that is trained to classify pairs, and not read where token embeddings are pooled."""


@dataclass(frozen=True, slots=True)
class ParameterTarget:
    """Where a stored tensor goes.

    Attributes:
        name: the parameter of the model; of several that are tied, always the same one; of several that the tensor is
            split into, the first.
        part: which part of the parameter it is, where several tensors are joined into one (the experts of a mixture of
            experts) or one is split: the mapping's pattern and the numbers in the stored name. Empty for a tensor that
            is the parameter.
        is_read: whether what the engine computes depends on it.
    """

    name: str
    part: tuple[str, ...] = ()
    is_read: bool = True


class ParameterNames:
    """The names of one model, and what the names of checkpoints mean to it.

    Args:
        model: its parameters may be on the meta device.
        unread: how parameters begin that no output of the engine depends on.
    """

    def __init__(self, model: PreTrainedModel, *, unread: tuple[str, ...] = ()) -> None:
        with library_loading:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                dot_natural_key,
                rename_source_key,
            )

        self._rename, self._in_order = rename_source_key, dot_natural_key
        self._model = model
        self._unread = unread
        self._state = model.state_dict(keep_vars=True)
        first_of: dict[int, str] = {}
        self._source = {name: first_of.setdefault(id(tensor), name) for name, tensor in self._state.items()}
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._known: dict[str, tuple[str, str | None]] = {}
        self._converter_of = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def target(self, stored: str) -> ParameterTarget:
        """Where the tensor goes that a checkpoint calls `stored`; `is_read` is false where the model has no place.

        What lies in a folder of its own is a module of sentence-transformers, which is behind the model and read.
        """
        if "/" in stored:
            return ParameterTarget(stored)
        name, pattern = self._renamed(stored)
        part = () if pattern is None else (pattern, *re.findall(r"\d+", stored))
        return ParameterTarget(self._source.get(name, name), part, name in self._state and not self._is_unread(name))

    def name_of(self, stored: str) -> str:
        """The model's name of what a checkpoint calls `stored`; of several that are tied, this very one."""
        return self._renamed(stored)[0]

    def sharing(self, stored: str) -> list[str]:
        """All names of the parameter that a tensor becomes: several where the model ties them."""
        source = self.target(stored).name
        return [name for name, first in self._source.items() if first == source]

    @property
    def input_embeddings(self) -> str:
        """Name of the parameter that token ids are looked up in."""
        embeddings = self._model.get_input_embeddings()
        return next(f"{name}.weight" for name, module in self._model.named_modules() if module is embeddings)

    def made_of(self, stored: str) -> list[str]:
        """Names of the parameters that a tensor becomes, or becomes part of: several where it is split."""
        name, pattern = self._renamed(stored)
        ends = [""] if pattern is None else self._converter_of[pattern].target_patterns
        made = [name.replace(ends[0], end, 1) for end in ends]
        return [self._source.get(name, name) for name in made]

    def modules_of(self, stored: str) -> dict[str, Module]:
        """The modules whose weight a tensor is, as it is stored, by name: several where the model ties them, none where
        it is a bias, a part of a parameter, or a parameter that no module calls its weight."""
        if self.target(stored).part:
            return {}
        weights = [name for name in self.sharing(stored) if name.endswith(".weight")]
        return {
            name.removesuffix(".weight"): self._model.get_submodule(name.removesuffix(".weight")) for name in weights
        }

    def covers(self, stored: Iterable[str]) -> bool:
        """Whether a checkpoint of these tensors gives the model every parameter that is read.

        Where it does not, the library does not know these names, and what it says of them is worth nothing.
        """
        return not self.missing(stored)

    def missing(self, stored: Iterable[str]) -> list[str]:
        """The parameters that are read and that a checkpoint of these tensors does not give the model."""
        given = {made for name in stored for made in self.made_of(name)}
        read = {self._source[name] for name, _ in self._model.named_parameters() if not self._is_unread(name)}
        return sorted(read - given)

    def shape_of(self, stored: str) -> tuple[int, ...] | None:
        """What the configuration makes of a tensor's shape; None where it is no whole parameter of the model."""
        target = self.target(stored)
        return None if target.part or target.name not in self._state else tuple(self._state[target.name].shape)

    def converted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters out of a checkpoint's tensors, renamed, split and joined as the library loads them.

        Parameters that are tied come under the name that `target` gives them. What the model has no place for is left
        out.
        """
        joined: dict[str, tuple[Any, list[tuple[str, str, Tensor]]]] = {}
        for stored, tensor in tensors:
            name, pattern = self._renamed(stored)
            if name not in self._state:
                continue
            if pattern is None:
                yield self._source[name], tensor
            else:
                joined.setdefault(name, (self._converter_of[pattern], []))[1].append((stored, pattern, tensor))
        for name, (converter, parts) in joined.items():
            conversion = deepcopy(converter)
            for stored, pattern, tensor in sorted(parts, key=lambda part: self._in_order(part[0])):
                conversion.add_tensor(name, stored, pattern, tensor)
            for made, value in conversion.convert(name, model=self._model, config=self._model.config).items():
                if made in self._state:
                    yield self._source[made], value[0] if isinstance(value, list) else value

    def _is_unread(self, name: str) -> bool:
        return bool(self._unread) and name.startswith(self._unread)

    def _renamed(self, stored: str) -> tuple[str, str | None]:
        """The model's name, and the pattern of the conversion that the tensor takes part in."""
        if (known := self._known.get(stored)) is not None:
            return known
        prefix = self._model.base_model_prefix
        found: tuple[str, str | None] = self._rename(stored, self._renamings, self._converters, prefix, self._state)
        if found[0] not in self._state and stored in self._state:  # it has the model's name already
            found = self._rename(stored, [], [], prefix, self._state)
        self._known[stored] = found
        return found


def parameter_names(folder: Path) -> ParameterNames:
    """The names of the model that an engine makes of a folder. Imports transformers, builds the model without memory.

    An encoder (`modules.json`) is built without a head, as sentence-transformers does; all else is built as the class
    that saved it.

    Raises:
        CheckpointError: transformers does not know the architecture, or cannot build it.
    """
    return _names_of(
        folder,
        json.dumps(read_config(folder), sort_keys=True),
        is_encoder=bool(read_modules(folder)),
        reads_pooler=_reads_pooler(folder),
    )


@lru_cache(maxsize=_KEPT_MODELS)
def _names_of(folder: Path, _content: str, *, is_encoder: bool, reads_pooler: bool) -> ParameterNames:
    with library_loading, _silenced():
        model = _build(open_model_config(folder), is_encoder=is_encoder)
        is_headless = type(model).__name__.endswith(("Model", "Encoder"))
        return ParameterNames(model, unread=() if not is_headless or reads_pooler else (POOLER,))


@contextmanager
def _silenced() -> Iterator[None]:
    """Without what transformers says of models that are built to be used."""
    with library_loading:
        from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _reads_pooler(folder: Path) -> bool:
    """Whether sentence-transformers was told to read the pooler's output instead of the tokens' embeddings."""
    for module in read_modules(folder)[:1]:
        path = folder / module.path / "sentence_bert_config.json"
        return path.is_file() and "pooler_output" in path.read_text(errors="replace")
    return False


def _build(config: Any, *, is_encoder: bool) -> PreTrainedModel:
    """The model of a configuration, on the meta device.

    Raises:
        CheckpointError: no class of transformers makes one.
    """
    import torch

    with library_loading:
        import transformers

    saved_as = str((getattr(config, "architectures", None) or [""])[0])
    is_headless = is_encoder and not saved_as.endswith("ForSequenceClassification")
    encoder = type(config).__name__.removesuffix("Config") + "EncoderModel"
    makers: list[Callable[[], Any]] = []
    if is_headless and hasattr(transformers, encoder):  # of an encoder-decoder, sentence-transformers takes the half
        makers.append(lambda: getattr(transformers, encoder)._from_config(config))
    elif is_headless:
        makers.append(lambda: transformers.AutoModel.from_config(config, trust_remote_code=False))
    else:
        if saved_as and hasattr(transformers, saved_as):
            makers.append(lambda: getattr(transformers, saved_as)._from_config(config))
        makers.append(lambda: transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        makers.append(lambda: transformers.AutoModel.from_config(config, trust_remote_code=False))
    reason: Exception | None = None
    for make in makers:
        try:
            with torch.device("meta"):
                model: PreTrainedModel = make()
            model.tie_weights()
            return model
        except Exception as error:  # noqa: BLE001  each architecture has errors of its own
            reason = error
    raise CheckpointError(
        f"transformers cannot build a {saved_as or config.model_type}: {type(reason).__name__}: {reason}"
    ) from reason


def pair_names(
    base: Mapping[str, Any], expert: Mapping[str, Any], names: ParameterNames
) -> tuple[dict[str, str | None], dict[str, bool]]:
    """For each tensor of a base, the expert's name of the same parameter.

    Args:
        base: what the base stores, by name.
        expert: what the expert stores.

    Returns:
        The expert's name by the base's, None where it stores no such tensor; and for each name that only one of them
        has a tensor for, whether the engine reads it.
    """
    by_target: dict[tuple[str, tuple[str, ...]], str] = {}
    for stored in expert:
        target = names.target(stored)
        by_target.setdefault((target.name, target.part), stored)
    paired: dict[str, str | None] = {}
    lone: dict[str, bool] = {}
    taken = set()
    for stored in base:
        target = names.target(stored)
        found = stored if stored in expert else by_target.get((target.name, target.part))
        paired[stored] = found
        taken.add((target.name, target.part))
        if found is None:
            lone[stored] = target.is_read
    for stored in expert:
        target = names.target(stored)
        if stored not in base and (target.name, target.part) not in taken:
            lone[stored] = target.is_read
    return paired, lone
