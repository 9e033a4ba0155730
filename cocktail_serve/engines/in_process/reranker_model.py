"""A reranker: from pairs of query and document to one score each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from sentence_transformers import CrossEncoder
from torch import Tensor

from cocktail_serve.dtypes import DType
from cocktail_serve.engines.in_process.input_tokenizer import TextPair, check_encodable
from cocktail_serve.engines.in_process.swappable import SwappableModel
from cocktail_serve.errors import ConfigError, InvalidRequestError

_ANY_LENGTH = 1 << 24
"""Tokens that no pair has: those of one that is too long are counted, not cut."""


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
        self._has_template = "message" in self._model[0].modalities

    def tokenize(
        self, pairs: Sequence[TextPair], *, truncate_to: int | None = None
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """Ids and types of each pair's tokens, as `InputTokenizer.encode_pairs`, the model's default prompt before each
        query; of a model with a chat template, those that it renders a pair into. On the thread that owns the
        tokenizer.

        Raises:
            ConfigError: the chat template cannot render a pair.
            InvalidRequestError: a pair holds a token that the tokenizer has and the model does not know, or what no
                tokenizer takes.
        """
        if self._has_template:
            check_encodable(pairs)
            rendered = [self._rendered(pair, truncate_to) for pair in pairs]
            self._check_known(rendered)
            return rendered, None
        prompted = [(self._prompt + query, document) for query, document in pairs]
        return self.tokenizer.encode_pairs(prompted, truncate_to=truncate_to)

    def _rendered(self, pair: TextPair, truncate_to: int | None) -> list[int]:
        """Ids of a pair as sentence-transformers' `CrossEncoder.predict` reads it where the tokenizer has a chat
        template: two messages, of the roles query and document."""
        limit = _ANY_LENGTH if truncate_to is None else truncate_to
        try:
            features = self._model[0].preprocess(
                [pair],
                prompt=self._prompt or None,
                processing_kwargs={"text": {"max_length": limit, "padding": False}},
            )
        except (ValueError, TemplateError) as error:
            raise ConfigError(
                f"{self._folder}: sentence-transformers reads a pair through the tokenizer's chat template, which "
                f"fails: {error}. If the model was trained on plain pairs, take chat_template.jinja out of the folder, "
                "and chat_template out of tokenizer_config.json"
            ) from error
        ids: list[int] = features["input_ids"][0].tolist()
        return ids

    def _check_known(self, token_ids: Sequence[Sequence[int]]) -> None:
        """Before a pass that other requests are in too."""
        vocab_size: int = self._transformer.config.get_text_config().vocab_size
        for index, ids in enumerate(token_ids):
            unknown = next((token for token in ids if token >= vocab_size), None)
            if unknown is not None:
                token = self._model.tokenizer.convert_ids_to_tokens(unknown)
                raise InvalidRequestError(
                    f"document {index}, with its query, holds {token!r}, a token that the tokenizer has and the model "
                    "has no embedding for; take it out of the text",
                    param=f"documents.{index}",
                )

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
