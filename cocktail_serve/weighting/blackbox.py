"""Searches coefficients without gradients, as LoraHub does and LM-Cocktail compares itself with."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cocktail_serve.errors import InvalidMixError
from cocktail_serve.pool import BASE
from cocktail_serve.weighting.candidates import Candidate, Trial, Trials, mean

BUDGET = 40
"""Candidates tried, the base among them, where the request says nothing; LoraHub's `max_inference_step`."""

MAX_BUDGET = 400

BOUND = 1.5
"""No coefficient is larger, nor below its negative."""

L1 = 0.05
"""Nats that a mean absolute coefficient of 1 costs."""

_WORST = 1e6
"""What an optimizer is told of a mixture that overflows."""


def check_available() -> None:
    """Raises InvalidMixError where the optimizers are not installed."""
    if importlib.util.find_spec("nevergrad") is None:
        raise InvalidMixError(
            "weighting 'blackbox' needs the package nevergrad, which is not installed here; "
            "install it with: pip install 'cocktail-serve[blackbox]'",
            param="weighting",
        )


def blackbox(losses: Mapping[str, Sequence[float]], *, budget: int, seed: int) -> Trials[tuple[Candidate, ...]]:
    """Minimises the mixture's loss plus an L1 term by nevergrad's NGOpt (LoraHub, arXiv 2307.13269).

    `theta = theta_base + sum_i w_i (theta_i - theta_base)` over experts and target, every `w_i` within +-1.5, which is
    the linear mixture in which the base takes the rest, `1 - sum_i w_i`, below 0 if need be. What is minimised is the
    mean loss on all examples plus `0.05 * mean_i |w_i|`, the terms of `lorahub/algorithm.py`. The search begins at the
    base alone. Of all that was tried the least is taken, so the result is never worse than the base by that measure;
    LoraHub takes the optimizer's recommendation, which need not have been tried.

    Args:
        losses: loss (nats) of each example by model, the base among them.
        budget: candidates, the base among them; at least 1.
        seed: of the optimizer: the same losses and seed give the same candidates.

    Returns:
        Generator of at most `budget - 1` trials of all examples, since the base's loss is known. It returns the
        candidates in the order tried; their loss is the mixture's, without the L1 term.

    Raises:
        InvalidMixError: nevergrad is not installed.
    """
    check_available()
    names = [name for name in losses if name != BASE]
    rows = tuple(range(len(losses[BASE])))
    if not names:
        return (Candidate({BASE: 1.0}, loss=mean(losses[BASE]), chosen=True),)
    import nevergrad
    import numpy as np

    # of the options that nevergrad gives scipy, which sets them right itself
    warnings.filterwarnings("ignore", message="COBYLA: Invalid", category=UserWarning)
    space = nevergrad.p.Array(init=np.zeros(len(names)), lower=-BOUND, upper=BOUND)
    space.random_state = np.random.RandomState(seed % 2**32)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget)
    optimizer.suggest(np.zeros(len(names)))
    candidates: list[Candidate] = []
    objectives: list[float] = []
    for number in range(budget):
        asked = optimizer.ask()
        coefficients = [float(value) for value in asked.value]
        weights = {BASE: 1.0 - math.fsum(coefficients)} | dict(zip(names, coefficients, strict=True))
        # the base alone was measured with the other models
        known = None if any(coefficients) else losses[BASE]
        loss = mean(known or (yield Trial(weights, rows, progress=number / budget)))
        objective = loss + L1 * math.fsum(map(abs, coefficients)) / len(coefficients)
        optimizer.tell(asked, min(objective, _WORST))
        candidates.append(Candidate(weights, loss=loss if math.isfinite(loss) else None))
        objectives.append(objective)
    best = objectives.index(min(objectives))
    return tuple(replace(candidate, chosen=index == best) for index, candidate in enumerate(candidates))
