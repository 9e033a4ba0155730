"""How often the report's verdict is right: many small cocktails, judged by their examples and then by the test rows.

A trial draws a few examples of a task, weighs a cocktail with them, asks `cocktails.findings` what its report would
say, and measures the cocktail and the base on the task's test rows. Right is a `use` whose cocktail loses less than the
base there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.paper.session import Scores, Session, System
from cocktail_serve.cocktails.cross_validation import cross_validate
from cocktail_serve.cocktails.parsing import parse_inline
from cocktail_serve.cocktails.weighting_steps import advance, recipe_of, recipe_of_trial
from cocktail_serve.evaluation.backend import EnsemblePart
from cocktail_serve.evaluation.in_memory import InMemoryDecoders, InMemoryEncoders
from cocktail_serve.evaluation.systems import Contender
from cocktail_serve.offline.weighing import weigh_by
from cocktail_serve.pool import BASE
from cocktail_serve.recipe import Recipe, one_hot
from cocktail_serve.weighting.candidates import Trial
from cocktail_serve.weighting.verdict import MIN_ERRORS, MIN_GAIN, min_gain_of

SIZES = (5, 20)

AIM = 0.9
"""Share of the mixtures said to be better than the base that should be."""

GAINS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
ERRORS = (0.0, 1.0, 2.0, 4.0)
"""Thresholds that are tried beside `MIN_GAIN` and `MIN_ERRORS` of `weighting.verdict`."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One trial.

    Attributes:
        with_own: whether the expert fine-tuned for the task was among the peers.
        fresh: whether the examples are none that it was trained on.
        advice: of the report.
        gain: share of the base's loss on the examples that the held-out mixture takes off.
        errors: that gain in standard errors of the differences example by example.
        test_gain: share of the base's loss on the test rows that the mixture takes off; of a retrieval task, what
            NDCG@10 gains, in parts of 1.
        score_gain: what the task's score gains on the test rows, in parts of 1.
        expert_lead: share of the held-out mixture's loss on the examples that the best expert takes off.
        expert_errors: that lead in standard errors.
        expert_gain: what that expert takes off the mixture's loss on the test rows, as `test_gain`; None where it has
            no lead.
    """

    task: str
    num_examples: int
    seed: int
    with_own: bool
    advice: str
    gain: float
    errors: float
    test_gain: float
    score_gain: float
    expert_lead: float = 0.0
    expert_errors: float = 0.0
    expert_gain: float | None = None
    fresh: bool = False


def judge(
    session: Session, task: str, *, num: int, seed: int, with_own: bool, options: dict[str, Any], fresh: bool = False
) -> Judged | None:
    """One trial; None where the task has not so many examples.

    Args:
        options: of the cocktail: weighting, temperature.
    """
    backend = session.evaluation.backend
    assert isinstance(backend, InMemoryDecoders | InMemoryEncoders)
    draw = session.fresh_examples if fresh else session.examples
    examples = draw(task, seed=seed, num=num)
    if examples is None or len(examples) < num:
        return None
    left_out = {session.evaluation.multitask, None if with_own else session.pool.targets.get(task)}
    peers = [name for name in backend.pool.experts if name not in left_out]
    body = {"examples": examples.to_json(), "experts": peers, "seed": seed, **options}
    request = parse_inline(body, pool=backend.pool, settings=session.evaluation.settings)
    assert request.examples is not None
    given = request.examples

    def losses_of(recipe: Recipe, rows: Sequence[int] | None) -> list[float]:
        return backend.losses_of(recipe, given, rows)

    weighing, losses = weigh_by(backend.pool, request.options, losses_of, backend.dtype, lambda *_, **__: None)
    trials = cross_validate(request.options, losses, weighing.chosen, kind=backend.pool.kind)
    held_out: dict[int, float] = {}
    step = advance(trials, None)
    while isinstance(step, Trial):
        recipe = recipe_of_trial(request.options, backend.pool, step, dtype=backend.dtype)
        answer = losses_of(recipe, step.rows)
        held_out.update(zip(step.rows, answer, strict=True))
        step = advance(trials, answer)
    recipe = recipe_of(request.options, backend.pool, weighing.merging_weights, dtype=backend.dtype)
    mixed = session.measure(Contender((EnsemblePart(recipe, 1.0),)), task)
    base = session.measure(session.make(System(BASE, BASE), task, seed=0), task)
    of_mixture = [held_out[row] for row in range(len(examples))]
    gain, errors = _lead(of_mixture, losses[BASE])
    lead, lead_errors, expert_gain = 0.0, 0.0, None
    if step.best_expert is not None:
        lead, lead_errors = _lead(losses[step.best_expert], of_mixture)
        if lead > 0.0:
            alone = one_hot(backend.pool, step.best_expert, dtype=backend.dtype)
            expert_gain = _gain(session.measure(Contender((EnsemblePart(alone, 1.0),)), task), mixed)
    return Judged(
        task,
        num,
        seed,
        with_own,
        str(step.advice),
        gain,
        errors,
        _gain(mixed, base),
        float(np.mean(mixed.score) - np.mean(base.score)),
        lead,
        lead_errors,
        expert_gain,
        fresh,
    )


def _lead(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Share of their mean loss that ours is less, and that in standard errors of the differences."""
    differences = np.array(theirs) - np.array(ours)
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / len(differences) ** 0.5
    return mean / float(np.mean(theirs)), mean / error if error else 0.0


def _gain(ours: Scores, theirs: Scores) -> float:
    """Share of their loss that ours is less; of a retrieval task, by how much NDCG@10 is more, in parts of 1."""
    if ours.loss is None or theirs.loss is None:
        return float(np.mean(ours.score) - np.mean(theirs.score))
    return 1.0 - float(np.mean(ours.loss)) / float(np.mean(theirs.loss))


def trials(session: Session, seeds: Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
    """All trials of a pool: unseen tasks, tasks whose own expert is left out, and the same with their own expert.

    Examples are drawn from what the own expert was trained on, as everywhere; those of decoders from test rows as well.
    """
    targets = session.pool.targets
    kinds = [
        *((task, False, False) for task in (*session.pool.unseen, *targets)),
        *((task, True, False) for task in targets),
        *((task, True, True) for task in targets if session.kind == "decoder"),
    ]
    wanted = [(*kind, num, seed) for num in SIZES for seed in seeds for kind in kinds]
    judged = []
    for number, (task, own, fresh, num, seed) in enumerate(wanted):
        session.report("trials of the verdict", number, len(wanted))
        one = judge(session, task, num=num, seed=seed, with_own=own, options=options, fresh=fresh)
        judged += [] if one is None else [one]
    session.report("trials of the verdict", len(wanted), len(wanted))
    return {
        "options": options,
        "summary": summary(judged),
        "thresholds": {
            "by loss or NDCG@10": thresholds(judged, _is_better, min_gain=min_gain_of(session.kind)),
            "by score": thresholds(judged, _is_no_worse, min_gain=min_gain_of(session.kind)),
        },
        "trials": [_rounded(one) for one in judged],
    }


def summary(judged: Sequence[Judged]) -> dict[str, Any]:
    """How often each advice was given, and how often the mixture was better than the base on the test rows then."""
    groups = {
        "all": judged,
        "own expert among the peers": [one for one in judged if one.with_own and not one.fresh],
        "the same, examples it was not trained on": [one for one in judged if one.fresh],
        "no expert of the task": [one for one in judged if not one.with_own],
        **{f"{num} examples": [one for one in judged if one.num_examples == num] for num in SIZES},
    }
    return {name: _counted(group) for name, group in groups.items() if group}


def thresholds(
    judged: Sequence[Judged], is_right: Callable[[Judged], bool], *, min_gain: float = MIN_GAIN
) -> dict[str, Any]:
    """How often a mixture said to be better than the base is: as shipped, and with thresholds picked on other tasks.

    For each task the thresholds are those that let most trials of all other tasks through with at least `AIM` of them
    right, the smallest of equals; then they are tried on the task. Where none reach the aim nothing is let through.
    """
    grid = [(gain, errors) for gain in GAINS for errors in ERRORS]
    let_through: list[Judged] = []
    picked: dict[str, tuple[float, float] | None] = {}
    for task in dict.fromkeys(one.task for one in judged):
        others = [one for one in judged if one.task != task]
        found = {pair: _passing(others, *pair) for pair in grid}
        good = [pair for pair, passing in found.items() if passing and np.mean([*map(is_right, passing)]) >= AIM]
        best = picked[task] = max(good, key=lambda pair: len(found[pair]), default=None)
        if best is not None:
            let_through += _passing([one for one in judged if one.task == task], *best)
    shipped = _passing(judged, min_gain, MIN_ERRORS)
    return {
        "shipped": {"given": len(shipped), "right": sum(map(is_right, shipped))},
        "picked on the other tasks": {"given": len(let_through), "right": sum(map(is_right, let_through))},
        "picked": picked,
    }


def _passing(judged: Sequence[Judged], min_gain: float, min_errors: float) -> list[Judged]:
    return [one for one in judged if 0.0 < one.gain >= min_gain and one.errors >= min_errors]


def _is_better(one: Judged) -> bool:
    return one.test_gain > 0.0


def _is_no_worse(one: Judged) -> bool:
    return one.score_gain >= 0.0


def _is_expert_better(one: Judged) -> bool:
    return one.expert_gain is not None and one.expert_gain > 0.0


def _counted(judged: Sequence[Judged]) -> dict[str, Any]:
    by_advice = {}
    for advice in ("use", "use_expert", "unsure", "no_gain"):
        group = [one for one in judged if one.advice == advice]
        by_advice[advice] = {
            "given": len(group),
            "better": sum(map(_is_better, group)),
            "not_worse_by_score": sum(map(_is_no_worse, group)),
        }
    by_advice["use_expert"]["expert_better"] = sum(
        _is_expert_better(one) for one in judged if one.advice == "use_expert"
    )
    return {"trials": len(judged), "better": sum(map(_is_better, judged)), "advice": by_advice}


def _rounded(one: Judged) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(one).items()}
