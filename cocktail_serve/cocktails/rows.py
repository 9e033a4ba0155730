"""A cocktail as the row of a table, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy.engine import RowMapping

from cocktail_serve.cocktails.cocktail import Cocktail, CrossValidation, Failure
from cocktail_serve.cocktails.options import CocktailOptions
from cocktail_serve.recipe import Recipe
from cocktail_serve.weighting.candidates import Candidate


def to_row(cocktail: Cocktail) -> dict[str, Any]:
    """The columns of a cocktail."""
    return {
        "uid": cocktail.uid,
        "tenant": cocktail.tenant,
        "name": cocktail.name,
        "pool_id": cocktail.pool_id,
        "kind": cocktail.kind,
        "digest": cocktail.digest,
        "request": cocktail.request.to_json(),
        "created_at": cocktail.created_at,
        "ready_at": cocktail.ready_at,
        "used_at": cocktail.used_at,
        "sequence": cocktail.sequence,
        "status": cocktail.status,
        "progress": cocktail.progress,
        "losses": dict(cocktail.losses),
        "merging_weights": None if cocktail.merging_weights is None else dict(cocktail.merging_weights),
        "entropy": cocktail.entropy,
        "mixed_loss": cocktail.mixed_loss,
        "validation_loss": cocktail.validation_loss,
        "recipe": None if cocktail.recipe is None else cocktail.recipe.to_json(),
        "error": None if cocktail.error is None else cocktail.error.to_json(),
        "warnings": list(cocktail.warnings),
        "candidates": [asdict(candidate) for candidate in cocktail.candidates],
        "owner": cocktail.owner,
        "epoch": cocktail.epoch,
        "change": cocktail.change,
        "findings": None if cocktail.cross_validation is None else cocktail.cross_validation.to_json(),
        "key_id": cocktail.key_id,
        "example_bytes": cocktail.example_bytes,
    }


def from_row(row: RowMapping) -> Cocktail:
    """The cocktail that `to_row` wrote."""
    values = dict(row)
    found = values.pop("findings")
    return Cocktail(
        **{
            **values,
            "request": CocktailOptions.from_json(values["request"]),
            "recipe": None if values["recipe"] is None else Recipe.from_json(values["recipe"]),
            "error": None if values["error"] is None else Failure(**values["error"]),
            "warnings": tuple(values["warnings"]),
            "candidates": tuple(Candidate(**candidate) for candidate in values["candidates"] or ()),
            "cross_validation": None if found is None else CrossValidation(**found),
        }
    )
