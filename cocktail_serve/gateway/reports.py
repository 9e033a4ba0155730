"""The report of a cocktail: losses beside merging weights, and what the mixture bought."""

from __future__ import annotations

import math

from cocktail_serve.cocktails.cocktail import Cocktail
from cocktail_serve.gateway.schemas.cocktails import CocktailReport, ModelReport
from cocktail_serve.pool import BASE


def report_of(cocktail: Cocktail) -> CocktailReport:
    """As far as known: a report can be read while the job runs."""
    weights, found = cocktail.merging_weights or {}, cocktail.cross_validation
    names = list(dict.fromkeys([*weights, *cocktail.losses]))
    models = [
        ModelReport(model=name, loss=cocktail.losses.get(name), merging_weight=weights.get(name)) for name in names
    ]
    return CocktailReport(
        id=cocktail.id,
        status=cocktail.status,
        models=sorted(models, key=lambda model: -(model.merging_weight or 0.0)),
        entropy=cocktail.entropy,
        effective_models=None if cocktail.entropy is None else math.exp(cocktail.entropy),
        mixed_loss=cocktail.mixed_loss,
        validation_loss=cocktail.validation_loss,
        base_loss=cocktail.losses.get(BASE),
        best_single_loss=min(cocktail.losses.values(), default=None),
        report_status="ready" if found is not None and found.status == "ready" else "pending",
        held_out_loss=None if found is None else found.held_out_loss,
        best_expert=None if found is None else found.best_expert,
        best_expert_loss=None if found is None else found.best_expert_loss,
        num_folds=0 if found is None else found.num_folds,
        advice=None if found is None else found.advice,
        verdict=None if found is None else found.text,
        seconds=None if cocktail.ready_at is None else cocktail.ready_at - cocktail.created_at,
        warnings=list(cocktail.warnings),
    )
