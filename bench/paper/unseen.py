"""Tables 3 and 4: tasks that no expert was fine-tuned for, and those whose own expert is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.paper.figures import averaged, difference_of, mean_of
from bench.paper.session import Session, System
from bench.paper.targets import BASE, ICL, MULTITASK
from cocktail_serve.examples import ExampleSet

BEST, SOUP = "best single expert", "uniform soup"
COCKTAIL, UNIFIED = "LM-Cocktail, tau {:g}", "LM-Cocktail unified, tau {:g}"
PAPERS = COCKTAIL.format(5.0)

REFERENCES = (BASE, BEST, SOUP, PAPERS)
"""What every row is compared with, where the table has it."""

DRAWN_ONCE = frozenset({"blackbox", "ensemble", "ties", "dare", "unified"})
"""Systems measured for the first draw of examples alone: dear, or beside the question."""


def systems_of(session: Session) -> list[System]:
    """The rows: LM-Cocktail and unified for each temperature, further merging methods at the selective one."""
    setting = session.setting
    at = {"temperature": setting.selective}
    rows = [
        System(BASE, "base"),
        System(ICL, "icl"),
        System(MULTITASK, "multitask"),
        System(BEST, "best-single"),
        System(SOUP, "soup"),
        *(System(COCKTAIL.format(tau), "lm-cocktail", {"temperature": tau}) for tau in setting.temperatures),
        System("search", "search"),
        System("LM-Cocktail blackbox", "blackbox"),
        *(System(UNIFIED.format(tau), "unified", {"temperature": tau}) for tau in (5.0, setting.selective)),
        System(f"TIES, tau {setting.selective:g}", "ties", at),
        System(f"DARE, tau {setting.selective:g}", "dare", at),
        System(f"logit ensemble, tau {setting.selective:g}", "ensemble", at),
    ]
    return session.having(rows)


def pooled(session: Session, tasks: Sequence[str], *, seed: int, num: int | None = None) -> ExampleSet:
    """The examples of all tasks together, each once."""
    return ExampleSet.of(
        dict.fromkeys(example for task in tasks for example in session.examples(task, seed=seed, num=num))
    )


def table(session: Session, tasks: Sequence[str], systems: Sequence[System], *, seeds: Sequence[int]) -> dict[str, Any]:
    """Mean over tasks of every system, less the base's, the best single expert's, the soup's, and the paper's tau's.

    Systems made from examples are a mean over draws of them (`seeds`), row by row, unless `DRAWN_ONCE`.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    losses: dict[str, dict[str, list[float]]] = {}
    about: dict[str, dict[str, Any]] = {}
    total = len(systems) * len(tasks)
    for number, system in enumerate(systems):
        for position, task in enumerate(tasks):
            session.report(f"unseen tasks of {session.kind}", number * len(tasks) + position, total)
            draws = []
            for seed in seeds[:1] if system.name in DRAWN_ONCE else seeds:
                examples = pooled(session, tasks, seed=seed) if system.name == "unified" else None
                draws.append(session.measure(session.make(system, task, seed=seed, pooled=examples), task))
            scores.setdefault(system.label, {})[task] = averaged([draw.score for draw in draws])
            if session.kind == "decoder":
                losses.setdefault(system.label, {})[task] = averaged([draw.loss or [] for draw in draws])
            about.setdefault(system.label, {})[task] = _about([dict(draw.about) for draw in draws])
    session.report(f"unseen tasks of {session.kind}", total, total)
    rows: dict[str, Any] = {}
    for label, of_tasks in scores.items():
        row: dict[str, Any] = {
            "score": mean_of(of_tasks),
            "tasks": {task: round(100 * float(np.mean(values)), 2) for task, values in of_tasks.items()},
        }
        row |= {
            f"less {reference}": difference_of(of_tasks, scores[reference])
            for reference in REFERENCES
            if reference != label and reference in scores
        }
        if label in losses:
            row["loss"] = mean_of(losses[label], scale=1.0)
            row["task_losses"] = {task: round(float(np.mean(values)), 4) for task, values in losses[label].items()}
            row |= {
                f"loss less {reference}": difference_of(losses[label], losses[reference], scale=1.0)
                for reference in REFERENCES
                if reference in losses
            }
        rows[label] = row
    return {"tasks": list(tasks), "rows": rows, "about": about}


def _about(draws: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a cocktail came to, by draw: the weights above a hundredth, and tau where it was searched."""
    return {
        "weights": [
            {
                name: round(weight, 3)
                for name, weight in (draw.get("merging_weights") or {}).items()
                if abs(weight) > 0.01
            }
            for draw in draws
        ],
        "temperature": [draw.get("temperature") for draw in draws],
    }
