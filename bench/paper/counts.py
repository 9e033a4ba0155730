"""Table 5: how many examples a unified cocktail is made from; and what one more example of a task buys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.paper.figures import averaged, difference_of, mean_of
from bench.paper.session import Session, System
from bench.paper.targets import BASE
from bench.paper.unseen import pooled
from cocktail_serve.examples import parse_examples

PER_TASK = 20
"""Examples of each task that are pooled; "all" is all of these."""

COUNTS = (1, 2, 3, 5, 10, 20)


def table(session: Session, tasks: Sequence[str]) -> dict[str, Any]:
    """Table 5: 5, 50, 100 and all of the pooled examples, for each of two temperatures, mean over draws."""
    setting = session.setting
    rows: dict[str, Any] = {}
    for tau in (5.0, setting.selective):
        system = System("unified", "unified", {"temperature": tau})
        for count in setting.table5:
            scores: dict[str, list[float]] = {}
            sizes = []
            for task in tasks:
                draws = []
                for seed in setting.seeds:
                    everything = pooled(session, tasks, seed=seed, num=PER_TASK).to_json()
                    examples = parse_examples(
                        everything, session.kind, max_examples=count or len(everything), seed=seed
                    )
                    sizes.append(len(examples))
                    contender = session.make(system, task, seed=seed, pooled=examples)
                    draws.append(session.measure(contender, task).score)
                scores[task] = averaged(draws)
            rows[f"tau {tau:g}, {count or 'all'}"] = {"num_examples": max(sizes), "score": mean_of(scores)}
    return {"tasks": list(tasks), "rows": rows}


def one_more(session: Session, tasks: Sequence[str], temperature: float) -> dict[str, Any]:
    """What a task's own cocktail is worth by how many examples it is weighed with, beside the base."""
    seeds = session.setting.seeds
    base = {task: session.measure(session.make(System(BASE, "base"), task, seed=0), task) for task in tasks}
    system = System("cocktail", "lm-cocktail", {"temperature": temperature})
    rows: dict[str, Any] = {}
    # one retrieval example without negatives has nothing to be told from
    for count in COUNTS if session.kind == "decoder" else COUNTS[1:]:
        session.report("numbers of examples", count, COUNTS[-1])
        scores: dict[str, list[float]] = {}
        losses: dict[str, list[float]] = {}
        for task in tasks:
            draws = [session.measure(session.make(system, task, seed=seed, num=count), task) for seed in seeds]
            scores[task] = averaged([draw.score for draw in draws])
            if session.kind == "decoder":
                losses[task] = averaged([draw.loss or [] for draw in draws])
        row = {"score less base": difference_of(scores, {task: base[task].score for task in tasks})}
        if losses:
            row["loss less base"] = difference_of(losses, {task: base[task].loss or [] for task in tasks}, scale=1.0)
        rows[f"tau {temperature:g}, {count}"] = row
    return {"tasks": list(tasks), "rows": rows}
