"""What whoever makes a cocktail should hear although nothing failed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cocktail_serve.cocktails.options import CocktailOptions, CocktailRequest
from cocktail_serve.pool import BASE, Pool
from cocktail_serve.weighting.gradient import BOUND, at_bounds

LEVEL = 1.1
"""Weights are level where the largest is less than this times the smallest."""


def warnings_of_request(request: CocktailRequest, pool: Pool) -> tuple[str, ...]:
    """What the request itself gives cause for."""
    options = request.options
    warnings = []
    if options.num_examples < options.num_examples_given:
        warnings.append(
            f"{options.num_examples} of {options.num_examples_given} examples were sampled with seed {options.seed}; "
            "more do not fit the pool's max_examples"
        )
    if request.validation is not None and len(request.validation) < request.validation.num_given:
        warnings.append(
            f"{len(request.validation)} of {request.validation.num_given} validation examples were sampled with seed "
            f"{options.seed}; more do not fit the pool's max_examples"
        )
    names_of: dict[str, list[str]] = {}
    for name in options.scored:
        names_of.setdefault(pool.member(name).fingerprint, []).append(name)
    warnings.extend(
        f"{' and '.join(map(repr, same))} have the same parameters, which therefore count {len(same)} times"
        for same in names_of.values()
        if len(same) > 1
    )
    return tuple(warnings)


def warnings_of_losses(
    options: CocktailOptions,
    losses: Mapping[str, float],
    merging_weights: Mapping[str, float],
    mixed_loss: float | None,
) -> tuple[str, ...]:
    """What the measured losses, and the weights that came of them, give cause for.

    Args:
        losses: mean loss (nats) by model.
        mixed_loss: of the mixture; None: there were no examples.
    """
    if mixed_loss is None or not losses:
        return ()
    of_mixture = _of_mixture(options, losses, mixed_loss)
    if options.weighting == "gradient":
        return (*_of_gradient(options, losses, merging_weights), *of_mixture)
    if (level := _level_weights(options, losses)) is not None:
        return (level, *of_mixture)
    return of_mixture


def _of_mixture(options: CocktailOptions, losses: Mapping[str, float], mixed_loss: float) -> tuple[str, ...]:
    if options.weighting == "search" and options.num_examples == 1:
        return ("one example cannot be held out, so nothing was searched: temperature and alpha are the paper's",)
    best = min(losses, key=losses.__getitem__)
    if mixed_loss <= losses[best]:
        return ()
    return (
        f"the mixture's loss {mixed_loss:.4g} on the examples is above that of {best!r} alone, {losses[best]:.4g}: "
        "try a lower temperature, or that model itself",
    )


def _level_weights(options: CocktailOptions, losses: Mapping[str, float]) -> str | None:
    """Where a temperature leaves nothing of how much the losses differ; None elsewhere, and where it was searched."""
    of_peers = [losses[name] for name in options.peers]
    spread = max(of_peers, default=0.0) - min(of_peers, default=0.0)
    if options.searches or options.temperature is None or not 0.0 < spread < options.temperature * math.log(LEVEL):
        return None
    return (
        f"the weights are level: losses that differ by {spread:.3g} nats at temperature {options.temperature:g} differ "
        f"by {math.expm1(spread / options.temperature):.1%} of a weight; try a lower temperature, or weighting search"
    )


def _of_gradient(
    options: CocktailOptions, losses: Mapping[str, float], merging_weights: Mapping[str, float]
) -> tuple[str, ...]:
    warnings = []
    if options.num_examples == 1:
        warnings.append("one example cannot be held out, so nothing was learned: the weights are those of the softmax")
    idle = [name for name, loss in losses.items() if name != BASE and loss == losses[BASE]]
    if idle:
        warnings.append(
            f"{' and '.join(map(repr, idle))} and the base lose the same on these examples to the last digit: there is "
            "nothing to learn of it; is it the base itself?"
        )
    if bound := at_bounds(merging_weights):
        warnings.append(
            f"the coefficient of {' and '.join(map(repr, bound))} went as far as it may, {BOUND:g}: the examples want "
            "more of it than there is"
        )
    return tuple(warnings)
