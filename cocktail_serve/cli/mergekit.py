"""A recipe as a configuration of mergekit, for those who use that tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from cocktail_serve.checkpoints.adapters.reader import is_adapter
from cocktail_serve.pool import BASE, Pool
from cocktail_serve.recipe import Recipe

MERGEKIT_FILE = "mergekit.yaml"

_AGREES = "It gives the same parameters within one rounding of {dtype}."
_DIFFERS = "DARE drops elements at random, and mergekit draws others: the same method, not the same parameters."


def mergekit_yaml(recipe: Recipe, pool: Pool, sources: Mapping[str, str]) -> str:
    """The recipe as `mergekit-yaml` reads it.

    mergekit takes the tokenizer from `base_model`. No `tokenizer_source`: it would cut embeddings to the tokenizer's
    size and move their rows, where all models of a pool have the same anyway.

    Args:
        sources: where each model of the pool is, by name: a folder, or a hub id with `@revision`.
    """
    names: dict[str, str] = {}
    for member in pool:
        names.setdefault(member.fingerprint, member.name)
    sources = {
        member.name: f"{sources[BASE]}+{sources[member.name]}" if is_adapter(member.path) else sources[member.name]
        for member in pool
    }
    coefficients = {names[fingerprint]: coefficient for fingerprint, coefficient in recipe.coefficients}
    build = {"linear": _linear, "slerp": _slerp}.get(recipe.method, _task_vectors)
    config = {
        "merge_method": recipe.method,
        **build(coefficients, recipe.method_params, sources),
        "dtype": "float32",
        "out_dtype": recipe.dtype,
    }
    note = _DIFFERS if recipe.method.startswith("dare") else _AGREES.format(dtype=recipe.dtype)
    return f"# The recipe of recipe.json for mergekit. {note}\n" + yaml.safe_dump(config, sort_keys=False)


def _linear(coefficients: Mapping[str, float], params: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    # mergekit wants a weight of its base_model too, whose tokenizer it takes
    weights = {BASE: 0.0} | dict(coefficients)
    return {
        "base_model": sources[BASE],
        "models": [{"model": sources[name], "parameters": {"weight": weight}} for name, weight in weights.items()],
        "parameters": {"normalize": False},
    }


def _slerp(coefficients: Mapping[str, float], params: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    first, second = coefficients
    return {
        "base_model": sources[first],
        "models": [{"model": sources[first]}, {"model": sources[second]}],
        "parameters": {"t": coefficients[second]},
    }


def _task_vectors(
    coefficients: Mapping[str, float], params: Mapping[str, Any], sources: Mapping[str, str]
) -> dict[str, Any]:
    of_models = {"density": params["density"]} if "density" in params else {}
    return {
        "base_model": sources[BASE],
        "models": [
            {"model": sources[name], "parameters": {"weight": weight, **of_models}}
            for name, weight in coefficients.items()
            if name != BASE
        ],
        "parameters": {
            "normalize": params.get("normalize", False),
            "lambda": params["lambda"],
            **({"rescale": params["rescale"]} if "rescale" in params else {}),
        },
    }
