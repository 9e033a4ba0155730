"""A recipe that comes from elsewhere, another server's or a folder's: read, and held against the pool that takes it.

A mixture travels as its recipe. It is taken where the same bits come of it, and refused with what to do where not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cocktail_serve.dtypes import DType
from cocktail_serve.errors import InvalidMixError, params_named
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe, check_mode, make_recipe

_FIELDS = frozenset({"version", "base", "coefficients", "method", "method_params", "dtype", "form"})
_FIELDS_BESIDE = frozenset({"object", "digest", "names"})
_FOLDERS_FIELDS = frozenset({"digest", "recipe", "pool", "merging_weights", "fingerprints", "generation"})

SHOWN = 12
"""Digits of a fingerprint in a message."""

MAX_TOLD = 5
"""Models that a message names."""


@dataclass(frozen=True, slots=True)
class ImportedRecipe:
    """A recipe, and what its models are called where it comes from.

    Attributes:
        names: by fingerprint, as far as told; they decide nothing.
    """

    recipe: Recipe
    names: Mapping[str, str]

    def weights_in(self, pool: Pool, *, dtype: DType) -> dict[str, float]:
        """The merging weights, by the names of a pool, of which the pool makes this very recipe.

        Args:
            dtype: what the pool's mixtures round to.

        Raises:
            InvalidMixError: the recipe is of another base, dtype or mode, of a model that the pool lacks, or in an
                order that no release wrote.
            MethodNotServedError: its method needs merged parameters, and the pool is served unmerged.
        """
        recipe, members = self.recipe, pool.by_fingerprint
        if recipe.base != pool.base.fingerprint:
            raise InvalidMixError(
                f"the recipe is of the base {recipe.base[:SHOWN]}, and that of pool {pool.id!r} is "
                f"{pool.base.fingerprint[:SHOWN]}: name a pool of the recipe's base (GET /v1/pools shows "
                "fingerprints), or have the operator serve one",
                param="recipe.base",
            )
        missing = [fingerprint for fingerprint, _ in recipe.coefficients if fingerprint not in members]
        if missing:
            told = [*map(self._told, missing[:MAX_TOLD]), *([f"{len(missing)} in all"] if missing[MAX_TOLD:] else [])]
            raise InvalidMixError(
                f"pool {pool.id!r} lacks what the recipe mixes: {', '.join(told)}; have the operator add the same "
                f"files as an expert (POST /admin/pools/{pool.id}/experts, or 'experts' of the configuration)",
                param="recipe.coefficients",
            )
        weights = {members[fingerprint].name: coefficient for fingerprint, coefficient in recipe.coefficients}
        if recipe.dtype != dtype:
            raise InvalidMixError(
                f"the recipe rounds to {recipe.dtype}, and pool {pool.id!r} runs in {dtype}: have the operator set "
                f"engine.dtype: {recipe.dtype}, or {self._made_anew(weights)}",
                param="recipe.dtype",
            )
        with params_named(lambda _: "recipe.method"):
            check_mode(recipe.method, pool.mode)
        if recipe.mode != pool.mode:
            raise InvalidMixError(
                f"the recipe is {recipe.mode}, and pool {pool.id!r} is served {pool.mode}, which rounds otherwise: "
                f"have the operator set engine.mode: {recipe.mode}, or {self._made_anew(weights)}",
                param="recipe.form",
            )
        if self._as_made(pool, weights) != recipe:
            raise InvalidMixError(
                "the recipe's coefficients are not in the order that recipes are written in (the base, then by "
                "fingerprint, without zeros), and the order decides bits: export it again",
                param="recipe.coefficients",
            )
        return weights

    def merged_json(self) -> dict[str, Any]:
        """The recipe of the same coefficients with parameters merged, as `read_recipe` takes it."""
        return {**replace(self.recipe, mode="merged").to_json(), "names": dict(self.names)}

    def _told(self, fingerprint: str) -> str:
        """A model as messages name it."""
        name = self.names.get(fingerprint)
        return fingerprint[:SHOWN] if name is None else f"{name[:64]!r} ({fingerprint[:SHOWN]})"

    def _made_anew(self, weights: Mapping[str, float]) -> str:
        """How to ask for a mixture of the same coefficients and other bits."""
        fields: dict[str, Any] = {"merging_weights": weights}
        if self.recipe.method != "linear":
            fields |= {"method": self.recipe.method, "method_params": dict(self.recipe.method_params)}
        return f"give its coefficients in place of the recipe, for a mixture with other bits: {json.dumps(fields)}"

    def _as_made(self, pool: Pool, weights: Mapping[str, float]) -> Recipe:
        recipe = self.recipe
        return make_recipe(
            pool,
            weights,
            dtype=recipe.dtype,
            method=recipe.method,
            method_params=recipe.method_params,
            mode=recipe.mode,
        )


def read_recipe(value: Any) -> ImportedRecipe:
    """A recipe as `GET /v1/cocktails/{ref}/recipe` answers it, or as the `recipe.json` of a folder holds it.

    Raises:
        InvalidMixError: it is none, or its digest is another's: it was changed on its way.
    """
    if not isinstance(value, Mapping):
        raise InvalidMixError(
            f"a recipe is a JSON object, as GET /v1/cocktails/NAME/recipe answers; got {type(value).__name__}",
            param="recipe",
        )
    is_folders = "recipe" in value
    inner = value["recipe"] if is_folders else value
    if not isinstance(inner, Mapping):
        raise InvalidMixError(f"recipe: expected a JSON object, got {type(inner).__name__}", param="recipe.recipe")
    known = _FIELDS if is_folders else _FIELDS | _FIELDS_BESIDE
    unknown = sorted({str(key) for key in inner} - known)
    if is_folders:
        unknown += sorted({str(key) for key in value} - _FOLDERS_FIELDS)
    if unknown and "digest" not in value:  # which tells that nothing which counts is left out
        raise InvalidMixError(
            f"unknown field {unknown[0]!r} in a recipe; known are {', '.join(sorted(_FIELDS))}", param="recipe"
        )
    with params_named(_param):
        recipe = Recipe.from_json(inner)
    digest = value.get("digest", recipe.digest)
    if digest != recipe.digest:
        raise InvalidMixError(
            f"the recipe says that its digest is {digest!r:.20}, and its content's is {recipe.digest[:SHOWN]}: it was "
            "changed on its way; export it again, or leave 'digest' out if it was changed on purpose",
            param="recipe.digest",
        )
    return ImportedRecipe(recipe, _names(value))


def _names(value: Mapping[str, Any]) -> dict[str, str]:
    """Model names by fingerprint; the folder's file has them the other way round."""
    names, fingerprints = value.get("names"), value.get("fingerprints")
    pairs = list(names.items()) if isinstance(names, Mapping) else []
    if isinstance(fingerprints, Mapping):
        pairs += [(fingerprint, name) for name, fingerprint in fingerprints.items()]
    return {fingerprint: name for fingerprint, name in pairs if isinstance(fingerprint, str) and isinstance(name, str)}


def _param(param: str | None) -> str:
    """A field of a recipe in a request's own words."""
    if param is None or param.startswith("recipe"):
        return param or "recipe"
    return "recipe.coefficients" if param.startswith("merging_weights") else f"recipe.{param}"
