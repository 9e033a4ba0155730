"""Short texts side by side in rows, so that little is computed for padding, and in a call without the interpreter."""

from __future__ import annotations

import contextlib
import heapq
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

_COUNTS_PADDING = {"bert": True, "roberta": False, "xlm-roberta": False}
"""Architectures whose words know each other by attention and their place by an absolute position alone, so that a mask
and positions of our own keep texts apart; and whether a padding token in a text has a place like any other. Where it
has not, positions begin behind the padding's id, and that is the position of all padding."""

_ROW_TOKENS = 48
"""About how long rows are. Attention is fastest per token in rows of 25 to 35; longer ones are filled more evenly."""

_LONGEST = 512
"""Tokens of the longest text that is worth a mask of its row's length squared. Beyond it, attention without one is what
counts, and neither padding nor the interpreter."""

_ATTENTION = 8
"""An operation of attention in short rows takes so many times as long as one of a matrix product; measured on a CPU in
bfloat16, as the next."""

_HEAD_START = 1_200_000
"""Operations of a matrix product in the time that attention needs for a head of a row to begin with, some 3 us."""

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`input_ids [R, W]`, `attention_mask [R, 1, W, W]` and `position_ids [R, W]` to hidden states `[R, W, D]`."""


class Packing:
    """Computes token embeddings of texts that share rows `[R, W]`, kept apart by a block-diagonal attention mask.

    Every token costs the same in a transformer's linear layers, padding included, so rows without any are faster.

    Args:
        transformer: one of `_COUNTS_PADDING`, with PyTorch's own attention.
    """

    def __init__(self, transformer: nn.Module) -> None:
        config: Any = transformer.config
        self._width: int = config.hidden_size
        self._num_heads: int = config.num_attention_heads
        self._uncounted: int | None = None if _COUNTS_PADDING[config.model_type] else config.pad_token_id
        self._forward = _traced(_Hidden(transformer))

    @classmethod
    def of(cls, transformer: nn.Module) -> Packing | None:
        """How this transformer is packed; None where it is not known to be packable."""
        config: Any = transformer.config
        if config.model_type not in _COUNTS_PADDING or config._attn_implementation != "sdpa":
            return None
        if getattr(config, "position_embedding_type", "absolute") != "absolute" or getattr(config, "is_decoder", False):
            return None
        if config.chunk_size_feed_forward:  # takes only rows of a multiple of it
            return None
        return cls(transformer)

    def is_worth_it(self, lengths: Sequence[int]) -> bool:
        """Whether texts of so many tokens should be packed."""
        return max(lengths) <= _LONGEST

    def rows_of(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which texts share a row: about as many in each, or one in each where that costs less."""
        fewest = sum(lengths) // max(_ROW_TOKENS, *lengths)
        choices = [_filled_evenly(lengths, number) for number in (fewest, fewest + 1) if 0 < number < len(lengths)]
        choices.append([[index] for index in range(len(lengths))])
        return min(choices, key=lambda rows: self._cost(len(rows), _width(rows, lengths)))

    def _cost(self, num_rows: int, width: int) -> int:
        """Of a layer, in operations of a matrix product: 24 D^2 for the linear maps of a place, 4 W D for attention."""
        linear = num_rows * width * 24 * self._width**2
        attention = num_rows * width * 4 * width * self._width
        return linear + _ATTENTION * attention + _HEAD_START * num_rows * self._num_heads

    def token_embeddings(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Token embeddings `[N, longest, D]` of N texts, padded on the right with zeros."""
        lengths = list(map(len, token_ids))
        rows = self.rows_of(lengths)
        shape = len(rows), _width(rows, lengths)
        ids, position = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        text, place = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for number, row in enumerate(rows):
            start = 0
            for index in row:
                columns = slice(start, start + lengths[index])
                ids[number, columns] = token_ids[index]
                text[number, columns] = index
                place[number, columns] = np.arange(lengths[index])
                position[number, columns] = self._positions(ids[number, columns])
                start = columns.stop
        # padding sees padding, so that no line of the mask is empty
        mask = torch.from_numpy(text[:, None, :, None] == text[:, None, None, :])
        hidden = self._forward(torch.from_numpy(ids), mask, torch.from_numpy(position))
        is_text = text >= 0
        padded = hidden.new_zeros((len(lengths), max(lengths), hidden.shape[-1]))
        padded[torch.from_numpy(text[is_text]), torch.from_numpy(place[is_text])] = hidden[torch.from_numpy(is_text)]
        return padded

    def _positions(self, ids: np.ndarray) -> np.ndarray:
        """Position ids of a text's tokens, both `[L]` int64."""
        if self._uncounted is None:
            return np.arange(len(ids))
        is_counted = ids != self._uncounted
        positions: np.ndarray = np.cumsum(is_counted) * is_counted + self._uncounted
        return positions


def _filled_evenly(lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Longest first, each to the row that is emptiest."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    filled = [(0, number) for number in range(num_rows)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        num_tokens, number = filled[0]
        rows[number].append(index)
        heapq.heapreplace(filled, (num_tokens + lengths[index], number))
    return rows


def _width(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return max(sum(lengths[index] for index in row) for row in rows)


class _Hidden(nn.Module):
    """A transformer as a function of tensors."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self._transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        hidden: Tensor = self._transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=torch.zeros_like(input_ids),  # a model's own end where its positions do, rows may go on
            return_dict=True,
        ).last_hidden_state
        return hidden


_TRACING = threading.Lock()
"""What silences warnings, and tracing itself, change the state of the process; pools are loaded side by side."""


@contextlib.contextmanager
def _silent_transformers() -> Iterator[None]:
    """Tracing looks at all attributes of a model, and one that encoders do not have complains of that."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _traced(module: _Hidden) -> Forward:
    """The same function as TorchScript, which runs without the interpreter and its lock, over the module's own
    parameters; the module itself where its trace is not the same function for other shapes, or torch cannot trace.
    """

    def inputs(num_rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.arange(2, 2 + width).expand(num_rows, width)
        mask = torch.ones(num_rows, 1, width, width, dtype=torch.bool).tril()
        return places, mask, places

    with _TRACING, torch.no_grad(), warnings.catch_warnings(), _silent_transformers():
        warnings.simplefilter("ignore")  # deprecated, and it names each size that it takes for a constant
        try:
            traced: Forward = torch.jit.trace(module, inputs(2, 3), check_trace=False)  # type: ignore[no-untyped-call]
            shapes = (1, 7), (5, 1), (3, 4), (2, 3)
            is_same = all(torch.equal(traced(*inputs(*shape)), module(*inputs(*shape))) for shape in shapes)
        except (AttributeError, IndexError, RuntimeError):  # no such function any more, or a model of fewer positions
            return module
    return traced if is_same else module
