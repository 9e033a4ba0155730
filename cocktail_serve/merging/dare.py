"""DARE: drop elements of task vectors at random and rescale the rest (arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cocktail_serve.digest import digest_of
from cocktail_serve.merging.task_vectors import Trim, add_task_vectors

_PER_COUNTER = 8
"""Elements that one step of Philox's counter decides: four words of 64 bits, the lower half of each first."""


def merge_dare(
    params: Sequence[Tensor],
    coefficients: Sequence[float],
    *,
    keys: Sequence[int],
    density: float,
    rescale: bool,
    elects_signs: bool,
    normalize: bool,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """DARE of one parameter (arXiv 2311.03099): each element of a task vector is dropped with p = 1 - density.

    Then `add_task_vectors`: the sum is DARE with task arithmetic, elected signs give DARE with TIES.

    Args:
        params: base and N experts, floating tensors of one shape `[*S]` on one device. Left unchanged.
        coefficients: N finite floats, of the experts' task vectors.
        keys: N numbers of 128 bits, from `mask_key`: what is dropped depends on them and the element's index alone.
        density: share kept, above 0, at most 1.
        rescale: divide by `density` what is kept.
        elects_signs, normalize, scale, out_dtype: as in `add_task_vectors`.

    Returns:
        Contiguous tensor `[*S]` of `out_dtype`, sharing no memory with the inputs.

    Raises:
        InvalidMixError, IncompatibleModelsError: as `merge_param`.
    """
    return add_task_vectors(
        params,
        coefficients,
        trims=[_random(key, density, 1.0 / density if rescale else 1.0) for key in keys],
        elects_signs=elects_signs,
        normalize=normalize,
        scale=scale,
        out_dtype=out_dtype,
    )


def mask_key(seed: int, model: str, name: str) -> int:
    """Key of the mask of one parameter in one model: of 128 bits, the same in every process and release.

    Args:
        model: fingerprint, so that models are trimmed independently of each other.
        name: of the parameter.
    """
    return int(digest_of(["dare", seed, model, name])[:32], 16)


def keep_mask(key: int, begin: int, size: int, density: float) -> np.ndarray:
    """Which of the elements `begin` to `begin + size` are kept, `[size]` bool.

    Element e is kept where its 32 bits of Philox4x64-10 are below `density * 2**32`: a function of key and e, so it
    depends on neither chunks, threads nor device.

    Args:
        begin: a multiple of 8.
    """
    words = np.random.Philox(key=key, counter=begin // _PER_COUNTER).random_raw(-(-size // 2))
    draws = words.astype("<u8", copy=False).view("<u4")[:size]
    kept: np.ndarray = draws < round(density * 2**32)
    return kept


def _random(key: int, density: float, factor: float) -> Trim:
    if density >= 1.0:
        return lambda vector, begin: None

    def trim(vector: Tensor, begin: int) -> None:
        kept = torch.from_numpy(keep_mask(key, begin, len(vector), density))
        vector.mul_(kept.to(vector.device, torch.float32)).mul_(factor)

    return trim
