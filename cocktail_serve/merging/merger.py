"""The one door to the methods' arithmetic: a recipe becomes a function that merges one parameter of its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cocktail_serve.merging.dare import mask_key, merge_dare
from cocktail_serve.merging.linear import merge_param
from cocktail_serve.merging.slerp import merge_slerp
from cocktail_serve.merging.task_arithmetic import merge_task_arithmetic
from cocktail_serve.merging.ties import merge_ties
from cocktail_serve.methods import MethodName, find_method
from cocktail_serve.recipe import Recipe

Merge = Callable[[str, Sequence[Tensor]], Tensor]
"""From the name of a parameter and its tensors, one per model in the recipe's order, of one shape and device, to the
merged tensor: of the recipe's dtype, sharing no memory with the inputs. A pure function of these and the recipe."""


Empty = Callable[[torch.Size, torch.dtype], Tensor]
"""Makes a contiguous tensor on the CPU whose elements are then written."""


def merger(recipe: Recipe, *, empty: Empty | None = None) -> Merge:
    """The arithmetic of a recipe.

    Args:
        empty: makes the merged tensors of models on the CPU; only linear mixtures ask for it.

    Raises:
        InvalidMixError: the method is not known.
    """
    dtype = getattr(torch, recipe.dtype)
    method = find_method(recipe.method)
    return _linear(recipe, dtype, empty) if method.name == "linear" else _MERGERS[method.name](recipe, dtype)


def _coefficients(recipe: Recipe) -> list[float]:
    return [coefficient for _, coefficient in recipe.coefficients]


def _linear(recipe: Recipe, dtype: torch.dtype, empty: Empty | None) -> Merge:
    coefficients = _coefficients(recipe)

    def merge(name: str, params: Sequence[Tensor]) -> Tensor:
        out = empty(params[0].shape, dtype) if empty is not None else None
        return merge_param(params, coefficients, out_dtype=dtype, out=out)

    return merge


def _slerp(recipe: Recipe, dtype: torch.dtype) -> Merge:
    coefficients = _coefficients(recipe)
    return lambda name, params: merge_slerp(params, coefficients, out_dtype=dtype)


def _task_arithmetic(recipe: Recipe, dtype: torch.dtype) -> Merge:
    _, *coefficients = _coefficients(recipe)
    scale: float = recipe.method_params["lambda"]
    return lambda name, params: merge_task_arithmetic(params, coefficients, scale=scale, out_dtype=dtype)


def _ties(recipe: Recipe, dtype: torch.dtype) -> Merge:
    _, *coefficients = _coefficients(recipe)
    chosen = recipe.method_params
    return lambda name, params: merge_ties(
        params,
        coefficients,
        density=chosen["density"],
        normalize=chosen["normalize"],
        scale=chosen["lambda"],
        out_dtype=dtype,
    )


def _dare(recipe: Recipe, dtype: torch.dtype) -> Merge:
    _, *coefficients = _coefficients(recipe)
    _, *models = (fingerprint for fingerprint, _ in recipe.coefficients)
    chosen = recipe.method_params
    return lambda name, params: merge_dare(
        params,
        coefficients,
        keys=[mask_key(chosen["seed"], model, name) for model in models],
        density=chosen["density"],
        rescale=chosen["rescale"],
        elects_signs=recipe.method == "dare_ties",
        normalize=chosen.get("normalize", False),
        scale=chosen["lambda"],
        out_dtype=dtype,
    )


_MERGERS: Mapping[MethodName, Callable[[Recipe, torch.dtype], Merge]] = {
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "dare_linear": _dare,
    "dare_ties": _dare,
    "slerp": _slerp,
}
