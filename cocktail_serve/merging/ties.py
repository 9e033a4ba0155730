"""TIES: trim task vectors by magnitude, elect signs, merge what agrees (arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cocktail_serve.merging.linear import check_params
from cocktail_serve.merging.task_vectors import Trim, add_task_vectors, iter_task_vector


def merge_ties(
    params: Sequence[Tensor],
    coefficients: Sequence[float],
    *,
    density: float,
    normalize: bool,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """TIES-Merging of one parameter (arXiv 2306.01708, algorithm 1), with a coefficient for each model as in mergekit.

    Of each task vector the `max(1, int(density * numel))` elements of largest magnitude are kept, of equal ones those
    that come first. The rest is `add_task_vectors` with elected signs. With coefficients 1 and `normalize` it is the
    paper's method.

    Memory beside the result is a few chunks: the magnitude that parts kept from trimmed is found by counting bit
    patterns, in two further passes over the base and each expert (none where `density` is 1).

    Args:
        params: base and N experts, floating tensors of one shape `[*S]` on one device. Left unchanged.
        coefficients: N finite floats, of the experts' task vectors.
        density: share kept, above 0, at most 1.
        normalize, scale, out_dtype: as in `add_task_vectors`.

    Returns:
        Contiguous tensor `[*S]` of `out_dtype`, sharing no memory with the inputs.

    Raises:
        InvalidMixError, IncompatibleModelsError: as `merge_param`.
    """
    check_params(params, [1.0, *coefficients], out_dtype)
    base, *experts = params
    return add_task_vectors(
        params,
        coefficients,
        trims=[_largest(base, expert, density) for expert in experts],
        elects_signs=True,
        normalize=normalize,
        scale=scale,
        out_dtype=out_dtype,
    )


def _largest(base: Tensor, expert: Tensor, density: float) -> Trim:
    """Trims all but the elements of largest magnitude, of equal ones those that come first."""
    numel = base.numel()
    if density >= 1.0 or numel == 0:
        return lambda vector, begin: None
    threshold, left = _kth_largest(base, expert, max(1, int(density * numel)))

    def trim(vector: Tensor, begin: int) -> None:
        nonlocal left
        magnitudes = vector.abs()
        kept = torch.gt(magnitudes, threshold, out=torch.empty_like(vector))
        equal = torch.eq(magnitudes, threshold, out=magnitudes)
        taken = int(equal.sum())  # exact: below 2**24 ones
        if taken > left:
            equal.mul_(equal.cumsum(0) <= left)
            taken = left
        left -= taken
        vector.mul_(kept.add_(equal))

    return trim


def _magnitude_bits(vector: Tensor) -> Tensor:
    """Bit patterns of `|x|`, `[n]` int32: ordered as the magnitudes are."""
    return vector.abs().view(torch.int32)


_LOW_BITS = 15
"""Of the 31 bits of a magnitude; the 16 above them are counted first."""


def _kth_largest(base: Tensor, expert: Tensor, k: int) -> tuple[float, int]:
    """The k-th largest magnitude of a task vector, and how many of its elements of that size are kept.

    A radix selection with two digits: exact, whatever the order of counting.
    """
    high_counts = torch.zeros(1 << (31 - _LOW_BITS), dtype=torch.int64, device=base.device)
    for vector in iter_task_vector(base, expert):
        bits = _magnitude_bits(vector)
        high_counts += torch.bincount(bits >> _LOW_BITS, minlength=len(high_counts))
    high, k = _digit_of_kth(high_counts, k)
    # those of another upper digit are counted at either end
    low_counts = torch.zeros((1 << _LOW_BITS) + 2, dtype=torch.int64, device=base.device)
    for vector in iter_task_vector(base, expert):
        digits = (_magnitude_bits(vector) - (high << _LOW_BITS)).clamp_(-1, 1 << _LOW_BITS) + 1
        low_counts += torch.bincount(digits, minlength=len(low_counts))
    low, k = _digit_of_kth(low_counts[1:-1], k)
    bits = torch.tensor((high << _LOW_BITS) + low, dtype=torch.int32)
    return float(bits.view(torch.float32)), k


def _digit_of_kth(counts: Tensor, k: int) -> tuple[int, int]:
    """The digit of the k-th largest, and its rank among those with the same digit, both from 1 for the rank."""
    at_least = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(at_least, k))
    above = int(at_least[place - 1]) if place else 0
    return len(counts) - 1 - place, k - above
