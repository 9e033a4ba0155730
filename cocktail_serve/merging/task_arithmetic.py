"""Task arithmetic: fine-tunings added to the base as vectors (arXiv 2212.04089)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cocktail_serve.merging.linear import merge_param


def merge_task_arithmetic(
    params: Sequence[Tensor], coefficients: Sequence[float], *, scale: float, out_dtype: torch.dtype
) -> Tensor:
    """`theta_0 + lambda * sum_i c_i * (theta_i - theta_0)` of one parameter (task arithmetic, arXiv 2212.04089).

    A weighted sum of the models in which the base weighs `1 - lambda * sum_i c_i`, and computed as one: the same
    kernel, one pass, one rounding.

    Args:
        params: base and N experts, floating tensors of one shape `[*S]` on one device. Left unchanged.
        coefficients: N finite floats, of the experts' task vectors.
        scale: the paper's lambda.
        out_dtype: dtype of the result; accumulation is float64.

    Returns:
        Contiguous tensor `[*S]` of `out_dtype`, sharing no memory with the inputs.

    Raises:
        InvalidMixError, IncompatibleModelsError: as `merge_param`.
    """
    shares = [scale * coefficient for coefficient in coefficients]
    return merge_param(params, [1.0 - math.fsum(shares), *shares], out_dtype=out_dtype)
