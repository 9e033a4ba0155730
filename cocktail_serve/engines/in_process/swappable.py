"""One sentence-transformers model whose parameters are swapped: the module is shared, the recipes are state dicts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor
from transformers.utils import logging as transformers_logging

from cocktail_serve.checkpoints.layout import read_modules
from cocktail_serve.checkpoints.mapping import library_reads
from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.checkpoints.naming import ParameterNames
from cocktail_serve.dtypes import DType
from cocktail_serve.engines.in_process.input_tokenizer import InputTokenizer
from cocktail_serve.errors import CheckpointError, ConfigError
from cocktail_serve.loading import library_loading, require_words
from cocktail_serve.pool import Member
from cocktail_serve.recipe import Recipe


class SwappableModel:
    """The model's own modules, with parameters of one recipe bound. Each subclass knows what goes in and comes out.

    `bind` and what computes belong to one thread, the rest to any; another thread computes with a `replicate` of it.

    Args:
        folder: the pool's base.
        dtype: of the parameters and of all arithmetic.
        device: a torch device.

    Attributes:
        own_params: the base's parameters, by the name of the slot they are bound to.
        max_length: tokens of an input, special ones included.
        tokenizer: owned by another thread than the model.

    Raises:
        ConfigError: not a text model this engine can run; says why.
    """

    _library_class: ClassVar[type[SentenceTransformer | CrossEncoder]]
    """What loads the model."""

    _unread: ClassVar[tuple[str, ...]] = ()
    """How slots begin that no output depends on, and that a checkpoint may lack."""

    def __init__(self, folder: Path, *, dtype: DType, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        transformers_logging.disable_progress_bar()
        try:
            with library_loading, library_reads(folder):
                self._model = self._library_class(
                    str(folder),
                    device=str(device),
                    local_files_only=True,
                    trust_remote_code=False,
                    # what does not fit is told by name, when the base is mixed
                    model_kwargs={"dtype": getattr(torch, dtype), "ignore_mismatched_sizes": True},
                ).to(getattr(torch, dtype))
                _leave_files(self._model)
        except Exception as error:  # each architecture, and each file of a folder, has errors of its own
            raise ConfigError(f"sentence-transformers cannot load {folder}: {type(error).__name__}: {error}") from error
        self._model.eval().requires_grad_(False)
        first = self._model[0]
        # a tokenizer with a chat template reads messages as well
        if not isinstance(first, Transformer) or {*first.modalities} - {"message"} != {"text"}:
            raise ConfigError(f"{folder}: only a transformer that reads plain text can be served")
        self._transformer = first.auto_model
        limits = (self._model.max_seq_length, _num_positions(self._transformer))
        if limits == (None, None):
            raise ConfigError(
                f"{folder} does not say how many tokens it takes; set model_max_length in its tokenizer_config.json"
            )
        self.max_length: int = min(limit for limit in limits if limit is not None)
        tokenizer = self._model.tokenizer
        require_words(tokenizer, folder)
        self.tokenizer = InputTokenizer(
            tokenizer, max_length=self.max_length, vocab_size=self._transformer.config.vocab_size
        )
        self._pad_token_id: int = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # masked: any will do
        self._pads_left = tokenizer.padding_side == "left"
        # floating tensors of the state dict: parameters and the rare buffer that is trained along (running means)
        self._slots = {name: slot for name, slot in _slots(self._model) if slot.is_floating_point()}
        self.own_params = {name: slot.data for name, slot in self._slots.items()}
        self._bound: Mapping[str, Tensor] = self.own_params
        self._names = ParameterNames(self._transformer)

    def replicate(self) -> Self:
        """The same model for another thread: modules of its own over the same parameters, which are not copied."""
        twin = copy.copy(self)
        # what is in a deepcopy's memo is not copied: the modules are, their tensors are wrapped anew
        tensors = (*self._model.parameters(), *self._model.buffers())
        twin._model = copy.deepcopy(self._model, {id(tensor): _wrapped_anew(tensor) for tensor in tensors})
        twin._transformer = twin._model[0].auto_model
        twin._slots = {name: slot for name, slot in _slots(twin._model) if name in self._slots}
        twin._bound = {}
        twin.bind(self.own_params)
        return twin

    @property
    def mixture_bytes(self) -> int:
        """Size of the parameters of one recipe in memory."""
        return sum(tensor.nbytes for tensor in self.own_params.values())

    def mix(self, recipe: Recipe, members: Mapping[str, Member]) -> dict[str, Tensor]:
        """The parameters of a recipe, by slot, mixed tensor by tensor from the experts' mapped files.

        Args:
            members: the pool's models by fingerprint.

        Raises:
            CheckpointError, IncompatibleModelsError, NotFiniteError: from reading and mixing; or a parameter of the
                model is missing.
        """
        params: dict[str, Tensor] = {}

        def of_transformer() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in iter_mixture(recipe, members):
                if "/" not in name:
                    yield name, tensor
                elif (slot := self._slot_behind(name)) is not None:
                    params[slot] = tensor.to(self._device)

        for name, tensor in self._names.converted(of_transformer()):
            if f"0.{name}" in self._slots:  # heads and integer buffers have none
                params[f"0.{name}"] = tensor.to(self._device)
        for slot, own in self.own_params.items():
            mixed = params.get(slot)
            if mixed is None and self._unread and slot.startswith(self._unread):
                params[slot] = own
            elif mixed is None or mixed.shape != own.shape or mixed.dtype != own.dtype:
                found = "none" if mixed is None else f"{mixed.dtype} {list(mixed.shape)}"
                raise CheckpointError(
                    f"{self._folder}: the model's parameter {slot!r} is {own.dtype} {list(own.shape)}, but the "
                    f"checkpoint gives {found}; save it with the class it is served with"
                )
        return params

    def check_names(self, base_recipe: Recipe, members: Mapping[str, Member]) -> None:
        """Proves that checkpoint names lead to the right parameters: the base, mixed, must be what the library loaded.

        Raises:
            CheckpointError: it is not; names the parameter.
        """
        for slot, mixed in self.mix(base_recipe, members).items():
            if not torch.equal(mixed, self.own_params[slot]):
                raise CheckpointError(
                    f"{self._folder}: transformers loads other values into {slot!r} than the checkpoint holds under "
                    "that name, as transformers names them; save the model anew with the class it is served with"
                )

    def bind(self, params: Mapping[str, Tensor]) -> None:
        """Makes the model compute with these parameters, of all slots, without copying them."""
        if params is self._bound:
            return
        for name, slot in self._slots.items():
            slot.data = params[name]
        self._bound = params

    def unbind(self, params: Mapping[str, Tensor]) -> None:
        """Holds on to these parameters no longer, so that their memory can be freed."""
        if params is self._bound:
            self.bind(self.own_params)

    def _features(
        self, token_ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]] | None = None
    ) -> dict[str, Any]:
        """What the transformer reads: `[N, longest]` ids, mask and token types, padded where its tokenizer pads."""
        longest = max(map(len, token_ids))
        ids = np.full((len(token_ids), longest), self._padding_of(token_ids), dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, tokens in enumerate(token_ids):
            columns = slice(longest - len(tokens), None) if self._pads_left else slice(len(tokens))
            ids[row, columns] = tokens
            mask[row, columns] = 1
            if type_ids is not None:
                types[row, columns] = type_ids[row]
        features = {"input_ids": ids, "attention_mask": mask} | ({} if type_ids is None else {"token_type_ids": types})
        return {name: torch.from_numpy(table).to(self._device) for name, table in features.items()}

    def _padding_of(self, token_ids: Sequence[Sequence[int]]) -> int:
        """The id that shorter inputs of a pass are filled up with."""
        return self._pad_token_id

    def _slot_behind(self, name: str) -> str | None:
        """The slot of a module behind the transformer, which has parameters of its own: `2_Dense/linear.weight`."""
        path, _, name = name.rpartition("/")
        index = next(index for index, module in enumerate(read_modules(self._folder)) if module.path == path)
        return f"{index}.{name}" if f"{index}.{name}" in self._slots else None


def _leave_files(model: torch.nn.Module) -> None:
    """Copies parameters and buffers into memory of their own: the library may leave them in the files that it mapped,
    where whoever writes to these would change a model that is served."""
    for tensor in (*model.parameters(), *model.buffers()):  # each once
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _slots(model: SentenceTransformer | CrossEncoder) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by module index and name, tied ones once."""
    seen: set[int] = set()
    for index, module in enumerate(model):
        inner = module.auto_model if isinstance(module, Transformer) else module
        for name, slot in inner.state_dict(keep_vars=True).items():
            if id(slot) not in seen:
                seen.add(id(slot))
                yield f"{index}.{name}", slot


def _wrapped_anew(tensor: Tensor) -> Tensor:
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor.data, requires_grad=False)
    return tensor.detach()


def _num_positions(transformer: torch.nn.Module) -> int | None:
    """Positions that the model has; RoBERTa's kind starts to count behind the padding's index."""
    positions: int | None = getattr(transformer.config, "max_position_embeddings", None)
    for module in transformer.modules():
        table = getattr(module, "position_embeddings", None)
        if positions is not None and isinstance(table, torch.nn.Embedding) and table.padding_idx is not None:
            return min(positions, table.num_embeddings - table.padding_idx - 1)
    return positions
