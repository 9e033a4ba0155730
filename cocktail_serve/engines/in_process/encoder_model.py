"""An encoder: from token ids to pooled and normalised vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling
from torch import Tensor

from cocktail_serve.checkpoints.layout import read_modules
from cocktail_serve.checkpoints.naming import POOLER
from cocktail_serve.dtypes import DType
from cocktail_serve.engines.in_process.packing import Packing
from cocktail_serve.engines.in_process.swappable import SwappableModel
from cocktail_serve.errors import ConfigError

_LAST_HIDDEN_STATE = {"method": "forward", "method_output_name": "last_hidden_state"}
"""What sentence-transformers makes token embeddings of, unless it is told otherwise."""

_READ_EMBEDDINGS = {Pooling, Normalize, Dense, LayerNorm}
"""Modules that read embeddings and their mask alone, and not token ids or the states of other layers."""


class Encoder(SwappableModel):
    """A sentence-transformers folder with its pooling; see `SwappableModel`.

    Attributes:
        dimension: size of an embedding.

    Raises:
        ConfigError: not a text encoder this engine can run; says why.
    """

    _library_class = SentenceTransformer
    # pooling reads token embeddings, never BERT's own pooler
    _unread = (f"0.{POOLER}",)

    _model: SentenceTransformer

    def __init__(self, folder: Path, *, dtype: DType, device: torch.device) -> None:
        _check_modules(folder)
        super().__init__(folder, dtype=dtype, device=device)
        poolings = [module for module in self._model if isinstance(module, Pooling)]
        if not poolings:
            raise ConfigError(f"{folder}: no pooling module, so there is one vector per token and none per text")
        self.tokenizer.check_token_types()
        self.dimension: int = self._model.get_embedding_dimension()
        self._is_normalizing = any(isinstance(module, Normalize) for module in self._model)
        self._excludes_prompt = not all(pooling.include_prompt for pooling in poolings)
        self._packing = self._packed()

    def replicate(self) -> Self:
        twin = super().replicate()
        twin._packing = twin._packed()
        return twin

    def _packed(self) -> Packing | None:
        """How texts share rows; None where they are not packed."""
        transformer, *others = self._model
        if self._device.type != "cpu" or self._pads_left:  # a GPU is not busy with what short texts save
            return None
        if transformer.modality_config["text"] != _LAST_HIDDEN_STATE or not {*map(type, others)} <= _READ_EMBEDDINGS:
            return None
        return Packing.of(self._transformer)

    def forward(self, token_ids: Sequence[Sequence[int]], *, prompt_length: int | None = None) -> np.ndarray:
        """Embeddings `[N, D]` float32 of N inputs in one pass, under the bound parameters."""
        packing = self._packing
        if packing is not None and not packing.is_worth_it(list(map(len, token_ids))):
            packing = None
        features = self._features(token_ids) if packing is None else _packed_features(packing, token_ids)
        if prompt_length is not None:
            features["prompt_length"] = prompt_length
        for module in [self._model] if packing is None else list(self._model)[1:]:
            features = module(features)
        vectors: Tensor = features["sentence_embedding"]
        rows: np.ndarray = vectors.float().cpu().numpy()
        return rows

    def shorten(self, vectors: np.ndarray, dimensions: int) -> np.ndarray:
        """The leading `dimensions` of embeddings `[N, D]`, of length 1 again where the whole ones are."""
        vectors = np.ascontiguousarray(vectors[:, :dimensions])
        if self._is_normalizing:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return vectors

    def prompt_length(self, prompt: str) -> int | None:
        """Tokens that pooling must leave out, where it leaves prompts out. On the thread that owns the tokenizer."""
        return self.tokenizer.prompt_length(prompt) if prompt and self._excludes_prompt else None


def _packed_features(packing: Packing, token_ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the modules behind the transformer read."""
    lengths = torch.tensor(list(map(len, token_ids)))
    return {
        "token_embeddings": packing.token_embeddings(token_ids),
        "attention_mask": (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).long(),
    }


def _check_modules(folder: Path) -> None:
    if not read_modules(folder):
        raise ConfigError(
            f"{folder} has no modules.json, which says how token embeddings become one vector; save the model with "
            "SentenceTransformer(...).save(...), with the pooling it was trained with"
        )
