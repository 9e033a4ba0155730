"""Binds a request to the row of coefficients that its recipe is. Imports neither torch nor vLLM.

What a request computes with hangs on three things that must say the same: the recipe that it names, the coefficients
that reach the worker, and the salt of its KV blocks. Here the last two are made of the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from cocktail_serve.checkpoints.finite import LARGEST
from cocktail_serve.errors import InvalidMixError
from cocktail_serve.recipe import Recipe

XARGS = "vllm_xargs"
"""The field of vLLM's request bodies that reaches the worker."""

RECIPE_ARG = "cocktail_recipe"
"""In `vllm_xargs` of a request as its sender writes it: the recipe, as JSON text."""

ROW_ARG = "cocktail_row"
"""In `vllm_xargs` as the worker reads it: fingerprint and coefficient of each expert in turn; empty for the base."""

BASE_ROW: Mapping[str, Any] = {ROW_ARG: []}
"""`vllm_xargs` of what is asked of the base alone."""

Row = tuple[str | float, ...]
"""A value of `ROW_ARG`."""


def bind(body: Mapping[str, Any], recipe_digest: str | None, *, base: Recipe) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a request, and its body as the engine takes it.

    Args:
        body: with the recipe in `vllm_xargs`.
        recipe_digest: what the request says that its recipe is; None: it does not say, and then a request without a
            recipe is one for the base.
        base: the recipe that is the base alone.

    Returns:
        The recipe; the body with the coefficients in its place, and with a salt that is the recipe's own.

    Raises:
        InvalidMixError: no recipe, one that is not `recipe_digest`, another base's or dtype's, or one that is no row of
            coefficients; code `invalid_recipe`.
    """
    xargs = body.get(XARGS) or {}
    if not isinstance(xargs, Mapping) or ROW_ARG in xargs:
        raise _invalid(f"{XARGS} must be an object without {ROW_ARG}, which is made of {RECIPE_ARG}")
    text = xargs.get(RECIPE_ARG)
    recipe: Recipe = base
    row: Row = ()
    if text is None and recipe_digest in (None, base.digest):
        pass
    elif not isinstance(text, str):
        raise _invalid(f"{XARGS}.{RECIPE_ARG} must be the recipe as JSON text")
    else:
        recipe, row = _parsed(text)
    if recipe_digest not in (None, recipe.digest):
        raise _invalid(f"the request is for recipe {recipe_digest} and brings the coefficients of {recipe.digest}")
    if (recipe.base, recipe.dtype) != (base.base, base.dtype):
        raise _invalid(
            f"the recipe is of base {recipe.base} in {recipe.dtype}, the engine runs {base.base} in {base.dtype}"
        )
    rest = {name: value for name, value in xargs.items() if name != RECIPE_ARG}
    return recipe, {**body, XARGS: {**rest, ROW_ARG: list(row)}, "cache_salt": _salt(recipe, body.get("cache_salt"))}


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[Recipe, Row]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _invalid(f"{XARGS}.{RECIPE_ARG} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _invalid(f"{XARGS}.{RECIPE_ARG} must hold an object")
    recipe = Recipe.from_json(value)
    if recipe.mode != "unmerged":
        raise _invalid(f"the recipe is of form {recipe.mode!r}, and this engine's are unmerged: it rounds otherwise")
    return recipe, row_of(recipe)


def row_of(recipe: Recipe) -> Row:
    """The coefficients of a recipe as they travel to the worker.

    Raises:
        InvalidMixError: its method is no sum of the experts' differences to the base, or a coefficient is too large.
    """
    coefficients = recipe.task_vector_coefficients
    for fingerprint, value in coefficients.items():
        if not abs(value) <= LARGEST["float32"]:
            raise _invalid(
                f"the coefficient {value:g} of {fingerprint} is beyond float32, in which rows are multiplied"
            )
    return tuple(part for item in coefficients.items() for part in item)


def coefficients_of(row: Any) -> dict[str, float]:
    """The coefficients by fingerprint that a row holds; the check where a step's rows are laid out.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(row, list | tuple) or len(row) % 2:
        raise ValueError(f"a request came without a row of coefficients: {row!r:.100}")
    coefficients = dict(zip(row[::2], row[1::2], strict=True))
    if 2 * len(coefficients) < len(row) or not all(
        isinstance(name, str) and isinstance(value, int | float) and abs(value) <= LARGEST["float32"]
        for name, value in coefficients.items()
    ):
        raise ValueError(f"a request came with what is no row of coefficients: {row!r:.100}")
    return coefficients


def _salt(recipe: Recipe, given: Any) -> str:
    """KV blocks are of one recipe, whatever salt the request brings."""
    return hashlib.sha256(json.dumps([recipe.digest, given]).encode()).hexdigest()


def _invalid(message: str) -> InvalidMixError:
    return InvalidMixError(message, param=XARGS, code="invalid_recipe")
