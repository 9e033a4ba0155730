"""Merging weights from losses: Eq. 2 of LM-Cocktail (arXiv 2311.13534), and Eq. 1 with a target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from cocktail_serve.errors import InvalidMixError
from cocktail_serve.pool import BASE
from cocktail_serve.weighting.candidates import mean


def softmax_weights(losses: Mapping[str, float], *, temperature: float) -> dict[str, float]:
    """`w = softmax(-L(M_i, E_t) / tau)`: the better a model predicts the examples, the more of it.

    Args:
        losses: mean loss on the examples by model name, in nats; any finite size.
        temperature: tau > 0. Above the spread of the losses the weights are nearly uniform, far below it the best
            model takes all. The reference uses 5.

    Returns:
        Weights by name in the order of `losses`, none negative, sum 1 within float64 rounding.

    Raises:
        InvalidMixError: no losses, one that is not finite (names the model), or a temperature that is not positive
            and finite.
    """
    check_temperature(temperature)
    if not losses:
        raise InvalidMixError("there are no losses to weigh: the pool has no model to mix", param="examples")
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise InvalidMixError(
                f"the loss of {name!r} on the examples is {loss}: its parameters, or this engine's dtype, cannot "
                "express them; leave the model out with 'experts', or use float32",
                param="examples",
            )
    least = min(losses.values())
    # halved before the difference, which may itself be larger than the largest float64
    scores = {name: math.exp(max(-2.0 * ((loss / 2 - least / 2) / temperature), -1e4)) for name, loss in losses.items()}
    total = math.fsum(scores.values())
    return {name: score / total for name, score in scores.items()}


def weights_from_losses(
    losses: Mapping[str, Sequence[float]],
    *,
    rows: Sequence[int] | None,
    temperature: float | None,
    target: str | None,
    alpha: float | None,
    max_experts: int | None = None,
) -> dict[str, float]:
    """Weights by Eq. 2 over the peers and Eq. 1 with the target.

    Args:
        losses: loss (nats) of each example by peer.
        rows: examples that are weighed with; None: all.
        temperature: tau; None: all peers weigh the same.
        target: the model fine-tuned for the task, or None.
        alpha: its share.
        max_experts: as of `keep_largest`, of the peers; None: all.
    """
    if temperature is None:
        shares = uniform_weights(losses)
    else:
        means = {
            name: mean(of_model if rows is None else [of_model[row] for row in rows])
            for name, of_model in losses.items()
        }
        shares = softmax_weights(means, temperature=temperature)
    if max_experts is not None:
        shares = keep_largest(shares, max_experts)
    return with_target(shares, target=target, alpha=alpha or 0.0)


def keep_largest(shares: Mapping[str, float], max_experts: int) -> dict[str, float]:
    """The base and the experts that weigh most, scaled to the sum that all had; the others at 0.

    What is kept is what the softmax over the kept models alone would give. Of equals, the first is kept.

    Args:
        shares: weight by name, none negative.
        max_experts: experts beside the base, at least 1.
    """
    experts = sorted((name for name in shares if name != BASE), key=lambda name: -shares[name])
    kept = {BASE, *experts[:max_experts]} & shares.keys()
    scale = math.fsum(shares.values()) / math.fsum(shares[name] for name in kept)
    return {name: share * scale if name in kept else 0.0 for name, share in shares.items()}


def check_alpha(alpha: float) -> None:
    """Raises InvalidMixError unless `alpha` is a number from 0 to 1."""
    if isinstance(alpha, bool) or not (isinstance(alpha, int | float) and 0.0 <= alpha <= 1.0):
        raise InvalidMixError(f"alpha must lie between 0 and 1, got {alpha!r}", param="alpha")


def with_target(weights: Mapping[str, float] | None, *, target: str | None, alpha: float = 0.5) -> dict[str, float]:
    """Joins a fine-tuned target with the mixture of the others.

    Eq. 1 of LM-Cocktail (arXiv 2311.13534): `alpha * M_t + (1 - alpha) * sum_i w_i M_i`, the sum over base and peers.
    Eq. 3, the mono-specialist, is the same with no examples: the base alone stands for the sum. With no target,
    `alpha` is 0 and the sum is the mixture.

    Args:
        weights: merging weights over base and peers, sum 1, or None where there are no examples.
        target: name of the target, which must not be among `weights`.
        alpha: share of the target, 0 to 1.

    Returns:
        Merging weights over base, peers and target.

    Raises:
        InvalidMixError: neither target nor weights, alpha outside 0 to 1, or the target among the peers.
    """
    if target is None:
        if weights is None:
            raise InvalidMixError(
                "give examples, merging_weights or a target: there is nothing to mix", param="examples"
            )
        return dict(weights)
    check_alpha(alpha)
    peers = {BASE: 1.0} if weights is None else weights
    if target in peers and not (target == BASE and weights is None):
        raise InvalidMixError(f"target {target!r} is among the peers it is mixed with", param="target")
    mixed = {name: (1.0 - alpha) * weight for name, weight in peers.items()}
    mixed[target] = mixed.get(target, 0.0) + alpha
    return mixed


def check_temperature(temperature: float) -> None:
    """Raises InvalidMixError unless `temperature` is a finite number above 0."""
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (is_number and 0.0 < temperature < math.inf):
        raise InvalidMixError(f"temperature must be a finite number above 0, got {temperature!r}", param="temperature")


def uniform_weights(names: Iterable[str]) -> dict[str, float]:
    """The same weight for every name, sum 1.

    Raises:
        InvalidMixError: there are no names.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise InvalidMixError("there is no model to mix")
    return {name: 1.0 / len(names) for name in names}


def entropy(merging_weights: Mapping[str, float]) -> float:
    """Shannon entropy in nats, `-sum w ln w`: 0 where one model takes all, `ln N` where N models weigh the same.

    Args:
        merging_weights: weights that sum to 1, none negative; a mixture with a negative weight has no entropy.

    Raises:
        InvalidMixError: a weight is negative or not finite.
    """
    for name, weight in merging_weights.items():
        if not (math.isfinite(weight) and weight >= 0.0):
            raise InvalidMixError(f"entropy needs weights of 0 and above, {name!r} has {weight}")
    return max(0.0, -math.fsum(weight * math.log(weight) for weight in merging_weights.values() if weight > 0.0))
