"""Short texts one behind the other in a single row, so that nothing is computed for padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FIRST_POSITION = {"bert": 0, "roberta": None, "xlm-roberta": None}
"""Architectures whose words know each other by attention and their place by an absolute position alone, so that a mask
and positions of our own keep texts apart; and where those positions begin (None: behind the padding's index)."""


class Packing:
    """Computes token embeddings of texts packed into one row `[1, T]` under a block-diagonal attention mask.

    Every token costs the same in a transformer's linear layers, padding included, so a row without any is faster; its
    attention grows with the square of the row, so only short texts gain.

    Attributes:
        first_position: position id of a text's first token.
        width: hidden size.
    """

    def __init__(self, *, first_position: int, width: int) -> None:
        self.first_position = first_position
        self.width = width

    @classmethod
    def of(cls, transformer: torch.nn.Module) -> Packing | None:
        """How this transformer is packed; None where it is not known to be packable."""
        config: Any = transformer.config
        if config.model_type not in _FIRST_POSITION or config._attn_implementation != "sdpa":
            return None
        if getattr(config, "position_embedding_type", "absolute") != "absolute" or getattr(config, "is_decoder", False):
            return None
        first = _FIRST_POSITION[config.model_type]
        return cls(first_position=config.pad_token_id + 1 if first is None else first, width=config.hidden_size)

    def is_worth_it(self, lengths: Sequence[int]) -> bool:
        """Whether one row of these texts costs less than a padded batch.

        A layer's linear maps cost 24 T D^2 operations for T tokens, its attention 4 T L D for rows of L.
        """
        packed, longest = sum(lengths), max(lengths)
        padded = longest * len(lengths)
        return packed * (6 * self.width + packed) < padded * (6 * self.width + longest)

    def token_embeddings(self, transformer: torch.nn.Module, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Token embeddings `[N, longest, D]` of N texts, padded on the right with zeros."""
        lengths = np.fromiter(map(len, token_ids), dtype=np.int64)
        text = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        place = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
        hidden: Tensor = transformer(
            input_ids=torch.from_numpy(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids]))[None],
            attention_mask=(text[:, None] == text[None, :])[None, None],
            position_ids=(place + self.first_position)[None],
        ).last_hidden_state[0]
        padded = hidden.new_zeros((len(lengths), int(lengths.max()), hidden.shape[1]))
        padded[text, place] = hidden
        return padded
