"""The merging methods by their definitions, in float64 and numpy: what the engines' parameters are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def linear(
    states: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The state dict of a linear cocktail (LM-Cocktail, Eq. 1): a weighted sum in float64 of each floating tensor.

    Args:
        states: by model; other tensors are those of the first that is weighted.
        dtype: that sums are rounded to; None: each tensor's own.
    """
    mixed = dict(states[next(iter(weights))])
    for name, tensor in mixed.items():
        if tensor.is_floating_point():
            total = sum(weight * states[model][name].double() for model, weight in weights.items())
            assert isinstance(total, Tensor)
            mixed[name] = total.to(dtype or tensor.dtype)
    return mixed


def largest(vector: Array, density: float) -> Array:
    """Keeps the elements of largest magnitude, the first of equal ones."""
    trimmed = np.zeros(vector.size)
    kept = np.argsort(-np.abs(vector.ravel()), kind="stable")[: max(1, int(density * vector.size))]
    trimmed[kept] = vector.ravel()[kept]
    return trimmed.reshape(vector.shape)


def elected(vectors: Sequence[Array], coefficients: Sequence[float], *, normalize: bool) -> Array:
    """Elect and disjoint merge of TIES (arXiv 2306.01708), with coefficients as in mergekit."""
    weights = np.array(coefficients).reshape(-1, *[1] * vectors[0].ndim)
    weighted = weights * np.stack(vectors)
    agrees = weighted * np.where(weighted.sum(0) >= 0.0, 1.0, -1.0) > 0.0
    divisor = (weights * agrees).sum(0) if normalize else 1.0
    return (weighted * agrees).sum(0) / np.where(divisor == 0.0, 1.0, divisor)


def interpolated(first: Array, second: Array, t: float) -> Array:
    """SLERP of two arrays taken as vectors, with mergekit's bounds for those of one direction or none."""
    norms = [norm if norm > 1e-8 else 1.0 for norm in (np.linalg.norm(first), np.linalg.norm(second))]
    cosine = float((first * second).sum() / norms[0] / norms[1])
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def merged(method: str, params: Mapping[str, Array], weights: Mapping[str, float], **options: float) -> Array:
    """One parameter of a cocktail: of `base` and experts by name, with the coefficients of the experts.

    Args:
        options: of the method; `scale` is lambda.
    """
    base = params["base"]
    vectors = [params[name] - base for name in weights]
    coefficients = list(weights.values())
    scale = options.get("scale", 1.0)
    if method == "task_arithmetic":
        return base + scale * sum(c * vector for c, vector in zip(coefficients, vectors, strict=True))
    if method == "ties":
        trimmed = [largest(vector, options["density"]) for vector in vectors]
        return base + scale * elected(trimmed, coefficients, normalize=bool(options.get("normalize", True)))
    assert method == "slerp"
    ((name, t),) = weights.items()
    return interpolated(base, params[name], t)
