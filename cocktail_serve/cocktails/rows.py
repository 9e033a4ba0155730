"""A cocktail as the row of a table, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy.engine import RowMapping

from cocktail_serve.cocktails.cocktail import Cocktail, CrossValidation, Failure
from cocktail_serve.cocktails.options import CocktailOptions
from cocktail_serve.recipe import Recipe
from cocktail_serve.weighting.candidates import Candidate


def to_row(cocktail: Cocktail) -> dict[str, Any]:
    """The columns of a cocktail."""
    values = {field.name: getattr(cocktail, field.name) for field in fields(cocktail)}
    # settled by the catalog, which knows the others
    del values["current"]
    # the columns are the fields, but for two of other names
    options, found = values.pop("options"), values.pop("cross_validation")
    return {
        **values,
        "request": options.to_json(),
        "losses": dict(cocktail.losses),
        "merging_weights": None if cocktail.merging_weights is None else dict(cocktail.merging_weights),
        "recipe": None if cocktail.recipe is None else cocktail.recipe.to_json(),
        "error": None if cocktail.error is None else cocktail.error.to_json(),
        "warnings": list(cocktail.warnings),
        "candidates": [asdict(candidate) for candidate in cocktail.candidates],
        "findings": None if found is None else found.to_json(),
    }


def from_row(row: RowMapping) -> Cocktail:
    """The cocktail that `to_row` wrote."""
    values = dict(row)
    options, found = values.pop("request"), values.pop("findings")
    return Cocktail(
        **{
            **values,
            "options": CocktailOptions.from_json(options),
            "recipe": None if values["recipe"] is None else Recipe.from_json(values["recipe"]),
            "error": None if values["error"] is None else Failure(**values["error"]),
            "warnings": tuple(values["warnings"]),
            "candidates": tuple(_candidate(candidate) for candidate in values["candidates"] or ()),
            "cross_validation": None if found is None else CrossValidation(**found),
        }
    )


def _candidate(value: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**value, "held_out": tuple(value.get("held_out", ()))})
