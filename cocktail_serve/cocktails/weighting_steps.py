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
from cocktail_serve.weighting.gradient import gradient
from cocktail_serve.weighting.search import search
from cocktail_serve.weighting.softmax import entropy, weights_from_losses, with_target

_T = TypeVar("_T")


def weigh_by_losses(options: CocktailOptions, losses: Mapping[str, Sequence[float]]) -> WeightingResult:
    """Merging weights of a request whose weighting tries no mixtures.

    Where the method adds task vectors, the base's share is left out and the base counts 1 (`Method.coefficients`); the
    entropy is that of the shares.

    Args:
        losses: loss (nats) of each example by model in `options.scored`; not read where nothing is weighed.
    """
    method = find_method(options.method)
    if options.merging_weights is not None:
        weights = dict(options.merging_weights)
        are_shares = not method.adds_task_vectors and min(weights.values()) >= 0.0
        return WeightingResult({}, method.coefficients(weights), entropy(weights) if are_shares else None)
    if not options.peers:
        weights = with_target(None, target=options.target, alpha=options.alpha or 0.0)
        return WeightingResult({}, method.coefficients(weights), entropy(weights))
    # uniform weights are those without a temperature
    shares = weights_from_losses(
        {name: losses[name] for name in options.peers},
        rows=None,
        temperature=options.temperature,
        target=options.target,
        alpha=options.alpha,
        max_experts=options.max_experts,
    )
    return _result(options, losses, (Candidate(shares, options.temperature, options.alpha, chosen=True),))


def weighting_steps(options: CocktailOptions, losses: Mapping[str, Sequence[float]]) -> Trials[WeightingResult]:
    """As `weigh_by_losses`, of any request.

    Returns:
        Generator of the trials that the weighting needs, none for those that follow from the losses alone.
    """
    if not options.searches:
        return weigh_by_losses(options, losses)
    if options.weighting == "blackbox":
        everything = {name: losses[name] for name in options.scored}
        candidates = yield from blackbox(everything, budget=options.budget or BUDGET, seed=options.seed)
    elif options.weighting == "gradient":
        assert options.temperature is not None
        everything = {name: losses[name] for name in options.scored}
        candidates = yield from gradient(everything, temperature=options.temperature, seed=options.seed)
    else:
        candidates = yield from search(
            {name: losses[name] for name in options.peers},
            target=options.target,
            alpha=options.alpha,
            seed=options.seed,
            max_experts=options.max_experts,
        )
    return _result(options, losses, candidates)


def _result(
    options: CocktailOptions, losses: Mapping[str, Sequence[float]], candidates: Sequence[Candidate]
) -> WeightingResult:
    """What came of candidates, whose weights are shares, under the request's method."""
    method = find_method(options.method)
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
