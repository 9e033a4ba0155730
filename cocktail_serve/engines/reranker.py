"""A reranker: from pairs of query and document to one score each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
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
        padding = self._transformer.config.get_text_config().pad_token_id
        self._names_padding = padding is not None and 0 <= padding < self._transformer.config.vocab_size
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

    def _padding_of(self, token_ids: Sequence[Sequence[int]]) -> int:
        """As above, and what the model takes for padding.

        Classifiers made of decoders score the last token that is not the configuration's padding, whatever the
        tokenizer's is. Where the configuration names none, they take one input at a time: told of an id that is in none
        of the inputs, they score each as they score it alone.
        """
        config = self._transformer.config.get_text_config()
        if not self._names_padding:
            present = frozenset().union(*token_ids)
            config.pad_token_id = next(unused for unused in count() if unused not in present)
        padding: int = config.pad_token_id
        return padding

    def activate(self, logits: np.ndarray) -> np.ndarray:
        """Scores of logits `[N, 1]` float32, by the activation the model was saved with, else the sigmoid."""
        scores: np.ndarray = self._model.activation_fn(torch.from_numpy(logits)).numpy()
        return scores
