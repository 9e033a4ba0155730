"""SLERP: two models interpolated along the arc between them (Shoemake, Animating Rotation, SIGGRAPH 1985)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cocktail_serve.merging.linear import check_params, merge_param

DOT_THRESHOLD = 0.9995
"""Cosine beyond which two tensors are interpolated linearly; mergekit's."""

MIN_NORM = 1e-8
"""Norm up to which a tensor has no direction and is not normalised; mergekit's."""

_BLOCK_NUMEL = 1 << 18
"""Elements of one partial sum, a power of two. Part of the definition: the order of summation follows from it."""


def merge_slerp(params: Sequence[Tensor], coefficients: Sequence[float], *, out_dtype: torch.dtype) -> Tensor:
    """`sin(c_0 * phi) / sin(phi) * theta_0 + sin(c_1 * phi) / sin(phi) * theta_1` of one parameter.

    phi is the angle between the two tensors, each flattened whole, as in mergekit; where they are nearly parallel or
    opposite, the coefficients themselves are used. The usual t is `c_1`. The angle comes from float64 sums whose order
    is fixed, the sum of the tensors from the linear kernel.

    Args:
        params: two floating tensors of one shape `[*S]` on one device. Left unchanged.
        coefficients: two finite floats of sum 1.
        out_dtype: dtype of the result; accumulation is float64.

    Returns:
        Contiguous tensor `[*S]` of `out_dtype`, sharing no memory with the inputs.

    Raises:
        InvalidMixError, IncompatibleModelsError: as `merge_param`.
    """
    check_params(params, coefficients, out_dtype)
    first, second = params
    cosine = _cosine(first, second)
    if abs(cosine) > DOT_THRESHOLD:
        return merge_param(params, coefficients, out_dtype=out_dtype)
    angle = math.acos(cosine)
    return merge_param(params, [math.sin(c * angle) / math.sin(angle) for c in coefficients], out_dtype=out_dtype)


def _cosine(first: Tensor, second: Tensor) -> float:
    sums: list[tuple[float, float, float]] = []
    for begin in range(0, first.numel(), _BLOCK_NUMEL):
        x, y = (param.reshape(-1)[begin : begin + _BLOCK_NUMEL].to(torch.float64) for param in (first, second))
        sums.append((_sum(x * x), _sum(y * y), _sum(x * y)))
    xx, yy, xy = (math.fsum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0, 0.0)
    norms = [norm if norm > MIN_NORM else 1.0 for norm in (math.sqrt(xx), math.sqrt(yy))]
    return max(-1.0, min(1.0, xy / (norms[0] * norms[1])))


def _sum(values: Tensor) -> float:
    """Sum of `[n]`, overwritten, by halves: a library's own sum is ordered by its threads and vector registers."""
    while len(values) > 1:
        half = (len(values) + 1) // 2
        values[: len(values) - half].add_(values[half:])
        values = values[:half]
    return float(values[0])
