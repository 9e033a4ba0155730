"""Chooses tau, and alpha where there is a target, by what the mixture loses on examples it was not weighed with."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from cocktail_serve.weighting.candidates import Candidate, Trial, Trials, foreseen, mean
from cocktail_serve.weighting.softmax import weights_from_losses

TEMPERATURES = (5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05)
"""tau, the nearest to equal weights first: of candidates that lose the same the first wins."""

ALPHAS = (0.5, 0.3, 0.7)
"""Shares of a target, the paper's first."""

MAX_FOLDS = 5

SAME_WEIGHTS = 1e-3
"""Candidates no weight of which differs by more are one: a percent of a percent of a model changes no answer."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """tau and alpha, the weights they give without each fold, and those they give with all examples."""

    temperature: float
    alpha: float | None
    held_out: tuple[Mapping[str, float], ...]
    final: Mapping[str, float]

    def is_like(self, other: _Setting) -> bool:
        ours, theirs = (*self.held_out, self.final), (*other.held_out, other.final)
        return all(
            abs(one[name] - another[name]) <= SAME_WEIGHTS
            for one, another in zip(ours, theirs, strict=True)
            for name in one
        )


def search(
    losses: Mapping[str, Sequence[float]],
    *,
    target: str | None,
    alpha: float | None,
    seed: int,
    max_experts: int | None = None,
) -> Trials[tuple[Candidate, ...]]:
    """Cross-validation over a small grid of tau (and alpha).

    The examples are dealt into at most five folds. For each fold and setting, the weights are those of Eq. 1 and 2 of
    LM-Cocktail (arXiv 2311.13534) from the models' losses on the other folds, and the mixture is asked for its loss on
    the fold. The setting with the least mean over all examples wins, of equals the larger tau; the weights returned
    are its weights with all examples. Settings of practically the same weights are tried once.

    A single example leaves nothing to hold out: nothing is tried, and the first setting, the paper's, is taken.

    Args:
        losses: loss (nats) of each example by peer, the base among them and the target not; all of one length.
        target: the model fine-tuned for the task, or None.
        alpha: its share where it is given; None: searched.
        seed: of the dealing.
        max_experts: as of `weights_from_losses`.

    Returns:
        Generator of at most `5 * 7 * 3` trials (`5 * 7` without a target, or with alpha given) that returns the
        candidates, judged by mean held-out loss, in the order of the grid.
    """
    num_examples = len(next(iter(losses.values())))
    folds = deal(num_examples, seed=seed)
    alphas = (None,) if target is None else ALPHAS if alpha is None else (alpha,)
    settings: list[_Setting] = []
    for temperature in TEMPERATURES:
        for share in alphas:
            setting = _setting(
                losses, folds, temperature=temperature, target=target, alpha=share, max_experts=max_experts
            )
            if not any(map(setting.is_like, settings)):
                settings.append(setting)
    asked = [(weights, fold) for setting in settings for fold, weights in zip(folds, setting.held_out, strict=True)]
    trials = foreseen([Trial(*each, progress=index / len(asked)) for index, each in enumerate(asked)])
    candidates = []
    for setting in settings:
        held_out: list[float] = []
        for _ in folds:
            held_out += yield next(trials)
        candidates.append(
            Candidate(
                merging_weights=setting.final,
                temperature=setting.temperature,
                alpha=setting.alpha,
                loss=mean(held_out) if held_out and all(map(math.isfinite, held_out)) else None,
            )
        )
    best = min(range(len(candidates)), key=lambda index: _judged(candidates[index]))
    return tuple(replace(candidate, chosen=index == best) for index, candidate in enumerate(candidates))


def deal(num_examples: int, *, seed: int) -> tuple[tuple[int, ...], ...]:
    """Indices of the examples in at most five folds of like size; none for one example."""
    if num_examples < 2:
        return ()
    order = random.Random(seed).sample(range(num_examples), num_examples)
    num_folds = min(MAX_FOLDS, num_examples)
    return tuple(tuple(sorted(order[fold::num_folds])) for fold in range(num_folds))


def _setting(
    losses: Mapping[str, Sequence[float]],
    folds: Sequence[tuple[int, ...]],
    *,
    temperature: float,
    target: str | None,
    alpha: float | None,
    max_experts: int | None,
) -> _Setting:
    def weights(rows: Sequence[int]) -> Mapping[str, float]:
        return weights_from_losses(
            losses, rows=rows, temperature=temperature, target=target, alpha=alpha, max_experts=max_experts
        )

    everything = sorted(chain(*folds)) or range(len(next(iter(losses.values()))))
    return _Setting(
        temperature=temperature,
        alpha=alpha,
        held_out=tuple(weights([row for row in everything if row not in fold]) for fold in folds),
        final=weights(everything),
    )


def _judged(candidate: Candidate) -> float:
    return math.inf if candidate.loss is None else candidate.loss
