"""A matrix as the product of two narrow ones: a truncated singular value decomposition, randomised."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

OVERSAMPLING = 16
POWER_ITERATIONS = 4
"""With these, the differences of fine-tuned decoders lost at most 1.0003 times what the exact decomposition does; with
8 and 2, 1.01 times, in half the time."""


class LowRank(NamedTuple):
    """`up @ down`, the nearest matrix of its rank as far as the method finds it.

    Attributes:
        up: `[out, rank]`, float32.
        down: `[rank, in]`, float32.
        singular_values: `[rank]`, float32, descending; the squares of those left out are the squared error.
    """

    up: Tensor
    down: Tensor
    singular_values: Tensor


def low_rank(matrix: Tensor, rank: int, *, seed: int = 0) -> LowRank:
    """The first singular vectors of a matrix, each side times the roots of the singular values.

    By a random projection with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and
    5.1); exactly where the projection would be as wide as the matrix. Singular values that are nothing but rounding are
    left out, so that the rank is the matrix's own where that is lower.

    Args:
        matrix: `[out, in]`, float32, finite, not zero.
        rank: above 0.
        seed: of the projection.
    """
    import torch

    width = rank + OVERSAMPLING
    if width >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], width, generator=generator)).Q
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(matrix.T @ basis).Q
            basis = torch.linalg.qr(matrix @ basis).Q
        inner, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ inner
    rounding = values[0] * max(matrix.shape) * torch.finfo(torch.float32).eps
    kept = min(rank, int((values > rounding).sum()))
    roots = values[:kept].sqrt()
    # LAPACK's are stored by columns
    return LowRank((left[:, :kept] * roots).contiguous(), (roots[:, None] * right[:kept]).contiguous(), values[:kept])
