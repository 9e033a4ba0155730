"""Truncated singular value decomposition: as near as the exact one, to the rank that there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cocktail_serve.offline.low_rank import OVERSAMPLING, low_rank


def matrix_of(values: Tensor, rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """A float32 matrix of these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64)).Q
        for side in (rows, columns)
    )
    return ((left * values) @ right.T).float()


def spectrum(kind: str, count: int) -> Tensor:
    steps = torch.arange(count, dtype=torch.float64)
    return {"flat": torch.ones(count).double(), "slow": (1 + steps) ** -0.5, "fast": 0.85**steps}[kind] * 3e-4


@pytest.mark.parametrize("kind", ["flat", "slow", "fast"])
@pytest.mark.parametrize(("rows", "columns"), [(96, 96), (200, 64), (64, 200)])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_error_is_that_of_the_exact_decomposition(kind: str, rows: int, columns: int, rank: int) -> None:
    matrix = matrix_of(spectrum(kind, min(rows, columns)), rows, columns)
    assert rank + OVERSAMPLING < min(rows, columns), "or the exact one is computed"
    up, down, values = low_rank(matrix, rank)
    assert (up.shape, down.shape) == ((rows, rank), (rank, columns))
    assert up.is_contiguous()
    assert down.is_contiguous()
    exact = torch.linalg.svdvals(matrix.double())
    squared = (matrix.double() - up.double() @ down.double()).square().sum()
    assert squared <= exact[rank:].square().sum() * 1.005 + exact.square().sum() * 1e-12
    # what was kept and what was not are all of it, so that errors at lower ranks follow from the values
    assert squared + values.double().square().sum() == pytest.approx(exact.square().sum().item(), rel=1e-5)
    torch.testing.assert_close(up.square().sum(0), values, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(20, 12, 12), (12, 20, 40), (1, 9, 4), (9, 1, 4)])
def test_a_rank_that_the_matrix_cannot_have_is_its_width(rows: int, columns: int, rank: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    up, down, values = low_rank(matrix, rank)
    assert len(values) == up.shape[1] == down.shape[0] == min(rows, columns)
    torch.testing.assert_close(up @ down, matrix)


@pytest.mark.parametrize("true_rank", [1, 3])
@pytest.mark.parametrize("width", [40, 200])
def test_a_matrix_of_lower_rank_gets_no_factors_of_rounding(true_rank: int, width: int) -> None:
    matrix = matrix_of(torch.ones(true_rank, dtype=torch.float64), width, width)
    up, down, values = low_rank(matrix, 24)
    assert len(values) == true_rank
    torch.testing.assert_close(up @ down, matrix, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_factors() -> None:
    matrix = matrix_of(spectrum("slow", 96), 96, 96)
    torch.manual_seed(1)
    one = low_rank(matrix, 4)
    torch.manual_seed(2)
    assert all(a.equal(b) for a, b in zip(one, low_rank(matrix, 4), strict=True))
    assert not one.up.equal(low_rank(matrix, 4, seed=1).up)
