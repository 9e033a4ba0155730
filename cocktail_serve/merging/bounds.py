"""How large a mixture's elements can get, told from the largest of each model's. Pure numbers: imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cocktail_serve.recipe import Recipe

_SLERP_GAIN = 32.0
"""Above 1 / sin(phi) of the smallest angle that `slerp` divides by: beyond a cosine of 0.9995 it is linear."""

_ROUNDING = 1.0 + 1e-5
"""More than all roundings of the sums together, in float32 and for hundreds of models."""


def largest_of_mixture(recipe: Recipe, largest: Mapping[str, float]) -> float:
    """A bound of the magnitudes of a mixture's elements, and of every float32 number on the way to them.

    Args:
        largest: by fingerprint, a bound of the magnitudes of each model in the recipe.

    Returns:
        Infinity where there is none.
    """
    coefficients = [coefficient for _, coefficient in recipe.coefficients]
    models = [largest[fingerprint] for fingerprint, _ in recipe.coefficients]
    if recipe.method == "linear":
        bound = _weighted(coefficients, models)
    elif recipe.method == "slerp":
        bound = _weighted([max(_SLERP_GAIN, abs(c)) for c in coefficients], models)
    elif recipe.method == "task_arithmetic":
        shares = [recipe.method_params["lambda"] * c for c in coefficients[1:]]
        bound = _weighted([1.0 - math.fsum(shares), *shares], models)
    else:
        bound = _of_task_vectors(recipe, coefficients[1:], models)
    return bound * _ROUNDING


def _of_task_vectors(recipe: Recipe, coefficients: list[float], models: list[float]) -> float:
    """TIES and DARE: the base, and the sum or the mean of what is left of the task vectors."""
    base, *experts = models
    params = recipe.method_params
    vectors = [base + expert for expert in experts]
    if params.get("rescale"):
        vectors = [vector / params["density"] for vector in vectors]
    added = _weighted(coefficients, vectors)
    if params.get("normalize") and coefficients:
        if min(coefficients) <= 0.0:
            return math.inf  # it divides by a sum of coefficients, which may be as small as can be
        added = max(added, *vectors)
    scale: float = params["lambda"]
    return base + max(1.0, abs(scale)) * added


def _weighted(coefficients: list[float], largest: list[float]) -> float:
    return math.fsum(abs(c) * bound for c, bound in zip(coefficients, largest, strict=True) if c)
