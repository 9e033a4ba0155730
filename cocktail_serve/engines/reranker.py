"""A reranker: from pairs of query and document to one score each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from torch import Tensor

from cocktail_serve.engines.input_tokenizer import Pair
from cocktail_serve.engines.swappable import SwappableModel
from cocktail_serve.errors import ConfigError
from cocktail_serve.recipe import DType


class Reranker(SwappableModel):
    """A cross-encoder, as sentence-transformers' `CrossEncoder` loads it; see `SwappableModel`.

    Raises:
        ConfigError: not a reranker this engine can run; says why.
    """

    _library_class = CrossEncoder

    _model: CrossEncoder

    def __init__(self, folder: Path, *, dtype: DType, device: torch.device) -> None:
        super().__init__(folder, dtype=dtype, device=device)
        if len(self._model) != 1 or self._model.num_labels != 1:
            raise ConfigError(
                f"{folder}: a reranker is a sequence classifier with one label, whose logit is the score; this one has "
                f"{self._model.num_labels} labels and {len(self._model)} modules"
            )
        self._prompt: str = self._model.prompts.get(self._model.default_prompt_name or "", "")

    def tokenize(
        self, pairs: Sequence[Pair], *, truncate_to: int | None = None
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """Ids and types of each pair's tokens, as `InputTokenizer.encode_pairs`, the model's default prompt before each
        query. On the thread that owns the tokenizer."""
        prompted = [(self._prompt + query, document) for query, document in pairs]
        return self.tokenizer.encode_pairs(prompted, truncate_to=truncate_to)

    def forward(
        self, token_ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]] | None = None
    ) -> np.ndarray:
        """Logits `[N, 1]` float32 of N pairs in one pass, under the bound parameters."""
        logits: Tensor = self._model(self._features(token_ids, type_ids))["scores"]
        rows: np.ndarray = logits.float().cpu().numpy()
        return rows

    def activate(self, logits: np.ndarray) -> np.ndarray:
        """Scores of logits `[N, 1]` float32, by the activation the model was saved with, else the sigmoid."""
        scores: np.ndarray = self._model.activation_fn(torch.from_numpy(logits)).numpy()
        return scores
