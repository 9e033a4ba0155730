"""What TIES and DARE share: trimmed task vectors, summed or elected, and added to the base chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cocktail_serve.merging.linear import check_params

Trim = Callable[[Tensor, int], None]
"""Sets elements of a task vector to 0, or scales them, in place: a chunk `[n]` float32 of the flattened parameter, and
the index of its first element. Called for the chunks in their order."""

CHUNK_NUMEL = 1 << 20
"""Elements at a time. No result depends on it; it bounds memory: some ten float32 buffers of 4 MB."""


def iter_task_vector(base: Tensor, expert: Tensor) -> Iterator[Tensor]:
    """The flattened `theta_i - theta_0`, chunk by chunk: new tensors `[n]` float32."""
    for begin in range(0, base.numel(), CHUNK_NUMEL):
        chunk = slice(begin, begin + CHUNK_NUMEL)
        yield expert.reshape(-1)[chunk].to(torch.float32, copy=True).sub_(base.reshape(-1)[chunk])


def add_task_vectors(
    params: Sequence[Tensor],
    coefficients: Sequence[float],
    *,
    trims: Sequence[Trim],
    elects_signs: bool,
    normalize: bool,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """`theta_0 + lambda * merge_i(c_i * trim_i(theta_i - theta_0))` of one parameter.

    The merge is the sum; or, with elected signs, the sum over the models that agree with the sign of the sum, element
    by element (TIES, arXiv 2306.01708, section 3: elect by mass, then disjoint merge; a sum of 0 elects plus). Every
    operation is rounded to float32 on its own, models in the order given, and the result once to `out_dtype`.

    Args:
        params: base and N experts, floating tensors of one shape `[*S]` on one device. Left unchanged.
        coefficients: N finite floats.
        trims: N, applied to the task vectors before their coefficients.
        normalize: divide by the sum of the coefficients whose models agree (of all N without election), where that
            is not 0.
        scale: lambda.
        out_dtype: dtype of the result.

    Returns:
        Contiguous tensor `[*S]` of `out_dtype`, sharing no memory with the inputs.

    Raises:
        InvalidMixError, IncompatibleModelsError: as `merge_param`.
    """
    check_params(params, [1.0, *coefficients], out_dtype)
    base, *experts = params
    merged = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    vectors = [iter_task_vector(base, expert) for expert in experts]
    for begin in range(0, base.numel(), CHUNK_NUMEL):
        chunk = base.reshape(-1)[begin : begin + CHUNK_NUMEL].to(torch.float32)
        total = _Elected(chunk) if elects_signs else _Sum(chunk)
        for chunks, coefficient, trim in zip(vectors, coefficients, trims, strict=True):
            vector = next(chunks)
            trim(vector, begin)
            total.add(vector.mul_(coefficient), coefficient)
        added = total.mean() if normalize else total.sum()
        merged.view(-1)[begin : begin + CHUNK_NUMEL].copy_(added.mul_(scale).add_(chunk))
    return merged


class _Sum:
    """Sum of a chunk over the models."""

    def __init__(self, like: Tensor) -> None:
        self._sum = torch.zeros_like(like)
        self._divisor = 0.0

    def add(self, vector: Tensor, coefficient: float) -> None:
        self._sum.add_(vector)
        self._divisor += coefficient

    def sum(self) -> Tensor:
        return self._sum

    def mean(self) -> Tensor:
        return self._sum if self._divisor == 0.0 else self._sum.div_(self._divisor)


class _Elected:
    """Sum of a chunk over the models whose sign is that of the sum over all."""

    def __init__(self, like: Tensor) -> None:
        # the sum, whose sign elects a side; the sum of either side, and the coefficients behind it
        self._total = torch.zeros_like(like)
        self._positive, self._negative = torch.zeros_like(like), torch.zeros_like(like)
        self._positive_divisor, self._negative_divisor = torch.zeros_like(like), torch.zeros_like(like)
        # masks are float32: on a CPU torch's boolean ones cost several times as much
        self._mask = torch.empty_like(like)

    def add(self, vector: Tensor, coefficient: float) -> None:
        self._total.add_(vector)
        self._positive_divisor.add_(torch.gt(vector, 0.0, out=self._mask), alpha=coefficient)
        self._negative_divisor.add_(torch.lt(vector, 0.0, out=self._mask), alpha=coefficient)
        self._positive.add_(vector.clamp_min(0.0))
        self._negative.add_(vector.clamp_max_(0.0))

    def sum(self) -> Tensor:
        return self._on_elected_side(self._positive, self._negative)

    def mean(self) -> Tensor:
        divisor = self._on_elected_side(self._positive_divisor, self._negative_divisor)
        divisor.add_(torch.eq(divisor, 0.0, out=self._mask))
        return self.sum().div_(divisor)

    def _on_elected_side(self, positive: Tensor, negative: Tensor) -> Tensor:
        is_positive = torch.ge(self._total, 0.0, out=self._mask)
        return positive * is_positive + negative * (1.0 - is_positive)
