"""From losses to merging weights: Eq. 2 over the peers, then Eq. 1 or 3 with the target; or a search over both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from cocktail_serve.cocktails.cocktail import WeightingResult
from cocktail_serve.cocktails.options import CocktailOptions
from cocktail_serve.dtypes import DType
from cocktail_serve.methods import find_method
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe, make_recipe
from cocktail_serve.weighting.blackbox import BUDGET, blackbox
from cocktail_serve.weighting.candidates import Candidate, Trial, Trials, mean
from cocktail_serve.weighting.search import search
from cocktail_serve.weighting.softmax import entropy, weights_from_losses, with_target

_T = TypeVar("_T")


def weighting_steps(options: CocktailOptions, losses: Mapping[str, Sequence[float]]) -> Trials[WeightingResult]:
    """Merging weights of a request.

    Where the method adds task vectors, the base's share is left out and the base counts 1 (`Method.coefficients`); the
    entropy is that of the shares.

    Args:
        losses: loss (nats) of each example by model in `options.scored`; not read where nothing is weighed.

    Returns:
        Generator of the trials that the weighting needs, none for those that follow from the losses alone.
    """
    method = find_method(options.method)
    if options.merging_weights is not None:
        weights = dict(options.merging_weights)
        are_shares = not method.adds_task_vectors and min(weights.values()) >= 0.0
        return WeightingResult({}, method.coefficients(weights), entropy(weights) if are_shares else None)
    if not options.peers:
        weights = with_target(None, target=options.target, alpha=options.alpha or 0.0)
        return WeightingResult({}, method.coefficients(weights), entropy(weights))
    candidates = yield from _candidates(options, losses)
    shares = next(candidate.merging_weights for candidate in candidates if candidate.chosen)
    return WeightingResult(
        losses={name: mean(losses[name]) for name in options.scored},
        merging_weights=method.coefficients(shares),
        entropy=entropy(shares) if min(shares.values()) >= 0.0 else None,
        candidates=tuple(
            replace(candidate, merging_weights=method.coefficients(candidate.merging_weights))
            for candidate in candidates
        ),
    )


def advance(weighting: Trials[_T], losses: Sequence[float] | None) -> Trial | _T:
    """The next question of a weighting or a cross-validation, or its result.

    Args:
        losses: the answer to the previous question; None to begin.
    """
    try:
        return next(weighting) if losses is None else weighting.send(losses)
    except StopIteration as ended:
        result: _T = ended.value
        return result


def recipe_of(options: CocktailOptions, pool: Pool, merging_weights: Mapping[str, float], *, dtype: DType) -> Recipe:
    """The recipe of the merging weights of a `WeightingResult`, under the request's method.

    Raises:
        As `make_recipe`.
    """
    return make_recipe(pool, merging_weights, dtype=dtype, method=options.method, method_params=options.method_params)


def recipe_of_trial(options: CocktailOptions, pool: Pool, trial: Trial, *, dtype: DType) -> Recipe:
    """The recipe to be tried: a trial's weights are shares, whatever the method.

    Raises:
        As `make_recipe`.
    """
    coefficients = find_method(options.method).coefficients(trial.shares)
    return recipe_of(options, pool, coefficients, dtype=dtype)


def _candidates(options: CocktailOptions, losses: Mapping[str, Sequence[float]]) -> Trials[tuple[Candidate, ...]]:
    peer_losses = {name: losses[name] for name in options.peers}
    if options.weighting == "search":
        return (
            yield from search(
                peer_losses,
                target=options.target,
                alpha=options.alpha,
                seed=options.seed,
                max_experts=options.max_experts,
            )
        )
    if options.weighting == "blackbox":
        everything = {name: losses[name] for name in options.scored}
        return (yield from blackbox(everything, budget=options.budget or BUDGET, seed=options.seed))
    # uniform weights are those without a temperature
    weights = weights_from_losses(
        peer_losses,
        rows=None,
        temperature=options.temperature,
        target=options.target,
        alpha=options.alpha,
        max_experts=options.max_experts,
    )
    return (Candidate(weights, options.temperature, options.alpha, chosen=True),)
