"""What becomes of an example whose loss is infinite or not a number: the request is told which, and under what."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cocktail_serve.errors import NotFiniteError


def require_finite(losses: Sequence[float], label: str, dtype: str, rows: Sequence[int] | None = None) -> None:
    """Raises NotFiniteError unless all losses are finite; names the model and the first example at fault.

    Args:
        losses: of examples under one model.
        label: the model, as messages name it: `'ag-news'`, with its quotes, or `the mixture`.
        dtype: that it computed in.
        rows: which examples they are of, from 0; None: all, in their order.
    """
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            row = index if rows is None else rows[index]
            raise NotFiniteError(
                f"row {row + 1}: the loss of {label} on this example is {loss}: what it computes overflows in {dtype}; "
                "leave the model out with 'experts', or have engine.dtype set to float32",
                param="examples",
            )
