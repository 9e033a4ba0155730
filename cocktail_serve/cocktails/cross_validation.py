"""What a cocktail can be expected to do, found on its own examples: the verdict of its report.

The mixture was weighed with all examples, so its loss on them flatters it. Here the examples are dealt into at most
five folds, each is predicted by a mixture weighed with the others, and by the expert that is the best on the others,
and `weighting.verdict` compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cocktail_serve.cocktails.cocktail import CrossValidation
from cocktail_serve.cocktails.options import CocktailOptions
from cocktail_serve.pool import Kind
from cocktail_serve.weighting.candidates import Candidate, Trial, Trials, foreseen
from cocktail_serve.weighting.search import deal
from cocktail_serve.weighting.softmax import weights_from_losses
from cocktail_serve.weighting.verdict import verdict

PENDING = CrossValidation("pending")


def cross_validate(
    options: CocktailOptions, losses: Mapping[str, Sequence[float]], chosen: Candidate | None, *, kind: Kind
) -> Trials[CrossValidation]:
    """Cross-validates a mixture that is weighed already, by the setting it was weighed with.

    What a search chose (tau, alpha, steps) was chosen on the same folds, so its held-out loss is a little too good; the
    mixtures are those that the search tried, whose losses a decoder's engine need not measure again. What `gradient`
    measured itself is not asked for anew.

    Args:
        losses: loss (nats) of each example by model in `options.scored`; empty without examples.
        chosen: the candidate that the mixture is; None where nothing was weighed.
        kind: of the pool.

    Returns:
        Generator of at most five trials.
    """
    if not losses or chosen is None:
        return no_findings("there are no examples to measure it on")
    if options.weighting == "blackbox":
        return no_findings("what blackbox makes of fewer examples would have to be searched anew")
    num_examples = len(next(iter(losses.values())))
    folds = deal(num_examples, seed=options.seed)
    if not folds:
        return no_findings("one example cannot be held out; give more")
    if chosen.held_out:
        return _found(chosen.held_out, losses, folds, kind)
    peer_losses = {name: losses[name] for name in options.peers}
    trials = []
    for number, fold in enumerate(folds):
        others = [row for row in range(num_examples) if row not in fold]
        weights = weights_from_losses(
            peer_losses,
            rows=others,
            temperature=chosen.temperature,
            target=options.target,
            alpha=chosen.alpha,
            max_experts=options.max_experts,
        )
        trials.append(Trial(weights, fold, progress=number / len(folds)))
    held_out: dict[int, float] = {}
    for trial in foreseen(trials):
        fold_losses = yield trial
        held_out.update(zip(trial.rows, fold_losses, strict=True))
    return _found([held_out[row] for row in range(num_examples)], losses, folds, kind)


def _found(
    held_out: Sequence[float], losses: Mapping[str, Sequence[float]], folds: Sequence[Sequence[int]], kind: Kind
) -> CrossValidation:
    told = verdict(held_out, losses, folds, kind=kind)
    return CrossValidation(
        "ready",
        told.advice,
        told.text,
        held_out_loss=told.mixed,
        best_expert=told.best_expert,
        best_expert_loss=told.best_expert_loss,
        best_expert_held_out_loss=told.best_expert_held_out,
        num_folds=len(folds),
    )


def no_findings(why: str) -> CrossValidation:
    """Nothing can be told; says why."""
    return CrossValidation("ready", text=f"no verdict: {why}")
