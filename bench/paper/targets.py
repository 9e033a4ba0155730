"""Tables 1 and 2, 8 and 9, Figure 1: models tuned for a target, on the target and on everything else."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.paper.figures import Rows, difference_of, mean_of, ratio_of
from bench.paper.session import Scores, Session, System

Found = dict[str, dict[str, Scores]]
"""Scores of one system by the task it was made for, and the task it was measured on."""

BASE, ICL, MULTITASK, TUNED = "base", "in-context examples", "multitask", "fine-tuned"
TWO, TEN = "LM-Cocktail 2", "LM-Cocktail 10, tau {:g}"


def systems_of(session: Session) -> list[System]:
    """The rows of the tables: the first three do not depend on the target."""
    setting = session.setting
    rows = [
        System(BASE, "base"),
        System(ICL, "icl"),
        System(MULTITASK, "multitask"),
        System(TUNED, "fine-tuned"),
        System(TWO, "lm-cocktail-2"),
        *(
            System(TEN.format(tau), "lm-cocktail-10", {"temperature": tau})
            for tau in dict.fromkeys((5.0, setting.selective))
        ),
    ]
    return session.having(rows)


def measure_targets(session: Session) -> dict[str, Found]:
    """Scores by system, task it was made for, and task it was measured on."""
    pool, seed = session.pool, session.setting.seeds[0]
    tasks = [*pool.targets, *pool.others]
    systems = systems_of(session)
    found: dict[str, Found] = {}
    total = len(systems) * len(pool.targets)
    for number, system in enumerate(systems):
        for position, target in enumerate(pool.targets):
            session.report("targets", number * len(pool.targets) + position, total)
            of_target = found.setdefault(system.label, {}).setdefault(target, {})
            contender = None if system.name == "icl" else session.make(system, target, seed=seed)
            for task in tasks:
                # in-context examples are those of the task that is asked
                of_target[task] = session.measure(
                    contender or session.make(system, task, seed=seed), task, elsewhere=task != target
                )
    session.report("targets", total, total)
    return found


def table(session: Session) -> dict[str, Any]:
    """Tables 1 and 2: the target's score and the mean of the other tasks', each a mean over targets."""
    found = measure_targets(session)
    rows = {}
    for label, of_targets in found.items():
        rows[label] = {
            "target": mean_of(on_target(of_targets)),
            "others": mean_of(on_others(of_targets)),
            "by_target": {
                target: {
                    "target": mean_of({target: of_tasks[target].score}),
                    "others": mean_of(_others(of_tasks, target)),
                }
                for target, of_tasks in of_targets.items()
            },
        }
        if session.kind == "decoder":
            rows[label]["target_loss"] = mean_of(on_target(of_targets, "loss"), scale=1.0)
            rows[label]["others_loss"] = mean_of(on_others(of_targets, "loss"), scale=1.0)
    base, tuned = found[BASE], found[TUNED]
    claims = {}
    for label in (TWO, *(label for label in found if label.startswith("LM-Cocktail 10"))):
        claims[label] = _claims(found[label], base, tuned, "score")
        if session.kind == "decoder":
            claims[label] |= {
                f"{name}_loss": value for name, value in _claims(found[label], base, tuned, "loss").items()
            }
    for label, of_label in claims.items():
        if label != TWO:
            of_label["target_less_2"] = difference_of(on_target(found[label]), on_target(found[TWO]))
            of_label["others_less_2"] = difference_of(on_others(found[label]), on_others(found[TWO]))
    return {"rows": rows, "claims": claims, "weights": _weights(found)}


def by_task(session: Session) -> dict[str, Any]:
    """Tables 8 and 9: every model of Tables 1 and 2 on every task, in hundredths."""
    found = measure_targets(session)
    return {
        "tasks": [*session.pool.targets, *session.pool.others],
        "rows": [
            {
                "system": label,
                "target": target,
                "scores": {task: round(100 * float(np.mean(scores.score)), 1) for task, scores in of_tasks.items()},
            }
            for label, of_targets in found.items()
            for target, of_tasks in of_targets.items()
            if label not in (BASE, ICL, MULTITASK) or target == next(iter(of_targets))
        ],
    }


def on_target(of_targets: Found, what: str = "score") -> Rows:
    """Rows of each target under the system made for it."""
    return {target: getattr(of_tasks[target], what) for target, of_tasks in of_targets.items()}


def on_others(of_targets: Found, what: str = "score") -> Rows:
    """Rows of every other task under the system made for each target.

    All targets have as many other tasks, so the mean over pairs is the mean over targets of the mean over tasks.
    """
    return {
        f"{target}/{task}": getattr(scores, what)
        for target, of_tasks in of_targets.items()
        for task, scores in of_tasks.items()
        if task != target
    }


def _others(of_tasks: dict[str, Scores], target: str) -> Rows:
    return {task: scores.score for task, scores in of_tasks.items() if task != target}


def _claims(
    ours: dict[str, dict[str, Scores]],
    base: dict[str, dict[str, Scores]],
    tuned: dict[str, dict[str, Scores]],
    what: str,
) -> dict[str, Any]:
    """How much of the tuned model's gain on its target is kept, and how much of its loss elsewhere is won back."""
    target, others = (lambda of: on_target(of, what)), (lambda of: on_others(of, what))
    return {
        "gain_kept": ratio_of((target(ours), target(base)), (target(tuned), target(base))),
        "won_back": ratio_of((others(ours), others(tuned)), (others(base), others(tuned))),
    }


def _weights(found: dict[str, Found]) -> dict[str, Any]:
    return {
        label: {
            target: {name: round(weight, 4) for name, weight in of_tasks[target].about["merging_weights"].items()}
            for target, of_tasks in of_targets.items()
        }
        for label, of_targets in found.items()
        if label.startswith("LM-Cocktail 10")
    }
