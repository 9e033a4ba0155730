"""From losses to merging weights: Eq. 2 over the peers, then Eq. 1 or 3 with the target."""

from __future__ import annotations

from collections.abc import Mapping

from cocktail_serve.cocktails.cocktail import Weighing
from cocktail_serve.cocktails.request import CocktailOptions
from cocktail_serve.merging.methods import find_method
from cocktail_serve.recipe import with_target
from cocktail_serve.weighting.softmax import entropy, softmax_weights, uniform_weights


def weigh(options: CocktailOptions, losses: Mapping[str, float]) -> Weighing:
    """Merging weights of a request.

    Where the method adds task vectors, the base's share is left out and the base counts 1 (`Method.coefficients`); the
    entropy is that of the shares.

    Args:
        losses: loss (nats) of each model in `options.scored`; not read where nothing is weighed.
    """
    method = find_method(options.method)
    if options.merging_weights is not None:
        weights = dict(options.merging_weights)
        are_shares = not method.adds_task_vectors and min(weights.values()) >= 0.0
    else:
        alpha = 0.0 if options.alpha is None else options.alpha
        weights = with_target(_peer_weights(options, losses), target=options.target, alpha=alpha)
        are_shares = True
    return Weighing(
        losses={name: losses[name] for name in options.scored},
        merging_weights=method.coefficients(weights),
        entropy=entropy(weights) if are_shares else None,
    )


def _peer_weights(options: CocktailOptions, losses: Mapping[str, float]) -> dict[str, float] | None:
    if not options.peers:
        return None
    if options.temperature is None:
        return uniform_weights(options.peers)
    return softmax_weights({name: losses[name] for name in options.peers}, temperature=options.temperature)
