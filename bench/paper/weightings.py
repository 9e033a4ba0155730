"""Which weighting to take: all of them, and tuning on the same examples, on tasks that no expert was tuned for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.paper.figures import averaged, difference_of, mean_of
from bench.paper.session import Session, System
from bench.paper.targets import BASE
from bench.paper.unmerged import NotKept
from bench.paper.unseen import BEST, COCKTAIL, SOUP

GRADIENT, TUNE = "gradient", "tune"
LEAST = 1e-6
"""Nats: what is less by no more is the same model."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One draw of examples of a task.

    Attributes:
        losses: token cross-entropy (nats) of each row's answer, by system.
        about: what each system came to.
    """

    task: str
    num_examples: int
    seed: int
    losses: Mapping[str, Sequence[float]]
    about: Mapping[str, Mapping[str, Any]]

    def mean(self, label: str) -> float:
        return float(np.mean(self.losses[label]))

    def is_below(self, label: str, other: str) -> bool:
        return self.mean(label) < self.mean(other) - LEAST


def systems_of(session: Session) -> list[System]:
    """What is compared."""
    setting = session.setting
    return [
        System(BASE, "base"),
        System(BEST, "best-single"),
        System(SOUP, "soup"),
        *(System(COCKTAIL.format(tau), "lm-cocktail", {"temperature": tau}) for tau in setting.temperatures),
        System(GRADIENT, "gradient", {"temperature": setting.selective}),
        System(TUNE, "tune"),
    ]


def measure(session: Session, tasks: Sequence[str]) -> list[Trial]:
    """Every trial, draw by draw; where nothing is computed, those that were measured before."""
    setting = session.setting
    wanted = [(num, seed, task) for num in setting.example_counts for seed in setting.seeds for task in tasks]
    trials = []
    for number, (num, seed, task) in enumerate(wanted):
        session.report("weightings", number, len(wanted))
        try:
            trials.append(_trial(session, task, num=num, seed=seed))
        except NotKept:
            continue
    session.report("weightings", len(wanted), len(wanted))
    return trials


def table(trials: Sequence[Trial]) -> dict[str, Any]:
    """By number of examples: losses, differences, and in how many trials a system is below the base or an expert."""
    by_count: dict[str, Any] = {}
    for num in sorted({trial.num_examples for trial in trials}):
        chosen = [trial for trial in trials if trial.num_examples == num]
        by_count[str(num)] = {
            "trials": [[trial.task, trial.seed] for trial in chosen],
            "rows": compared(chosen),
            "rules": rules(chosen),
        }
    return by_count


def compared(trials: Sequence[Trial]) -> dict[str, Any]:
    """Mean over tasks of every system, each a mean over draws row by row, less that of others."""
    labels = list(trials[0].losses)
    losses = {label: _by_task(trials, label) for label in labels}
    references = [BASE, BEST, best_softmax(trials), TUNE]
    return {
        label: {
            "loss": mean_of(losses[label], scale=1.0),
            **{
                f"less {reference}": difference_of(losses[label], losses[reference], scale=1.0)
                for reference in references
                if reference != label
            },
            "below base": sum(trial.is_below(label, BASE) for trial in trials),
            "below best single": sum(trial.is_below(label, BEST) for trial in trials),
            "tasks": {task: round(float(np.mean(values)), 4) for task, values in losses[label].items()},
        }
        for label in labels
    }


def best_softmax(trials: Sequence[Trial]) -> str:
    """The softmax of the temperature that loses least."""
    labels = [label for label in trials[0].losses if label.startswith(COCKTAIL.format(0.0)[:-1])]
    return min(labels, key=lambda label: _mean_over_tasks(trials, label))


def rules(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The weighting that loses least on one half of the tasks, and what it comes to on the other; then the reverse."""
    tasks = sorted({trial.task for trial in trials})
    halves = (tasks[::2], tasks[1::2])
    found = []
    for chosen_on, reported_on in (halves, halves[::-1]):
        known = [trial for trial in trials if trial.task in chosen_on]
        new = [trial for trial in trials if trial.task in reported_on]
        if not known or not new:
            continue
        candidates = [label for label in known[0].losses if label not in (BASE, BEST, TUNE)]
        rule = min(candidates, key=lambda label: _mean_over_tasks(known, label))
        ours = _by_task(new, rule)
        found.append(
            {
                "chosen on": chosen_on,
                "rule": rule,
                "reported on": reported_on,
                "loss": mean_of(ours, scale=1.0),
                **{
                    f"less {name}": difference_of(ours, _by_task(new, label), scale=1.0)
                    for name, label in (
                        (BASE, BASE),
                        (BEST, BEST),
                        (f"softmax at its best ({best_softmax(new)})", best_softmax(new)),
                        (TUNE, TUNE),
                    )
                },
                "trials": len(new),
                "below base": sum(trial.is_below(rule, BASE) for trial in new),
                "below best single": sum(trial.is_below(rule, BEST) for trial in new),
            }
        )
    return found


def summaries(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Each trial's means, and what its systems came to."""
    return [
        {
            "task": trial.task,
            "num_examples": trial.num_examples,
            "seed": trial.seed,
            "loss": {label: round(trial.mean(label), 4) for label in trial.losses},
            "about": trial.about,
        }
        for trial in trials
    ]


def _trial(session: Session, task: str, *, num: int, seed: int) -> Trial:
    losses: dict[str, list[float]] = {}
    about: dict[str, dict[str, Any]] = {}
    for system in systems_of(session):
        scores = session.measure(session.make(system, task, seed=seed, num=num), task)
        assert scores.loss is not None
        losses[system.label] = scores.loss
        about[system.label] = {
            name: _rounded(scores.about[name])
            for name in ("merging_weights", "num_steps", "held_out")
            if name in scores.about
        }
    return Trial(task, num, seed, losses, about)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: round(number, 3) for name, number in value.items() if abs(number) > 0.01}
    return value if isinstance(value, int) else [round(number, 3) for number in value]


def _by_task(trials: Sequence[Trial], label: str) -> dict[str, list[float]]:
    tasks = dict.fromkeys(trial.task for trial in trials)
    return {task: averaged([trial.losses[label] for trial in trials if trial.task == task]) for task in tasks}


def _mean_over_tasks(trials: Sequence[Trial], label: str) -> float:
    return float(np.mean([np.mean(values) for values in _by_task(trials, label).values()]))
