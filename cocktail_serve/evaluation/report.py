"""What a run came to: tables for a terminal and for Markdown, CSV and JSON, all from the same figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cocktail_serve.errors import StorageError
from cocktail_serve.evaluation.cells import Cell
from cocktail_serve.evaluation.intervals import Interval, macro_interval, mean_interval, paired_difference
from cocktail_serve.evaluation.metrics import (
    DECODER_METRICS,
    ENCODER_METRICS,
    SMALLER_IS_BETTER,
    TELLS_MORE,
    TIES,
    Metric,
)
from cocktail_serve.evaluation.runs import Run

REFERENCE = "base"


@dataclass(frozen=True, slots=True)
class Line:
    """One system over all tasks that were made for themselves and measured by one metric.

    Attributes:
        tasks: mean and interval by task.
        mean: over the tasks; None unless the system was measured on all of them.
        gain: by how much it is better than the reference system, as a paired difference over the tasks both have:
            that of a loss is positive where the loss is lower. None for itself.
    """

    system: str
    tasks: dict[str, Interval]
    mean: Interval | None
    gain: Interval | None


class Report:
    """Figures of a run.

    Args:
        reference: the system that the others are compared with, row by row; the first of the run where it has none of
            that name.
        seed: of the bootstrap.
    """

    def __init__(self, run: Run, *, reference: str = REFERENCE, seed: int = 0) -> None:
        self.run = run
        self._seed = seed
        systems = list(dict.fromkeys(cell.system for cell in run.cells))
        self.systems = systems
        self.tasks = list(dict.fromkeys(cell.task for cell in run.cells))
        self.reference = reference if reference in systems else next(iter(systems), reference)

    @property
    def metrics(self) -> list[Metric]:
        """All that were measured, in their order."""
        return list(dict.fromkeys(metric for cell in self.run.cells for metric in cell.metrics))

    def own_metric(self, task: str) -> Metric:
        """The metric that stands for a task where there is room for one: the first that it has."""
        return next(next(iter(cell.metrics)) for cell in self.run.cells if cell.task == task)

    @property
    def notes(self) -> list[str]:
        """What the figures of rankings rest on, in sentences: how ties are ranked, and queries that are left out."""
        notes = []
        if set(self.metrics) & set(ENCODER_METRICS):
            notes.append(f"Documents of equal scores are ranked {TIES}, for every metric, as trec_eval does.")
        for name, task in self.run.settings["tasks"].items():
            if number := task.get("num_without_relevant"):
                who = "1 query is" if number == 1 else f"{number} queries are"
                notes.append(f"{name}: {who} left out, without a relevant document in the corpus.")
        return notes

    @cached_property
    def summary(self) -> list[Line]:
        """Every system, each task by its own metric."""
        return self._lines({task: self.own_metric(task) for task in self.tasks})

    def lines(self, metric: Metric) -> list[Line]:
        """Every system, by one metric, on the tasks that have it."""
        having = {cell.task for cell in self.run.cells if metric in cell.metrics}
        return self._lines({task: metric for task in self.tasks if task in having})

    def _lines(self, metric_of: dict[str, Metric]) -> list[Line]:
        lines = []
        reference = self._own_cells(self.reference)
        for system in self.systems:
            cells = self._own_cells(system)
            values = {task: list(cells[task].metrics[metric]) for task, metric in metric_of.items() if task in cells}
            shared = [task for task in values if task in reference]
            gain = None
            if system != self.reference and shared:
                pairs = [
                    (ours, theirs)[:: -1 if metric_of[task] in SMALLER_IS_BETTER else 1]
                    for task in shared
                    for ours, theirs in [(values[task], reference[task].metrics[metric_of[task]])]
                ]
                gain = paired_difference(
                    [first for first, _ in pairs], [second for _, second in pairs], seed=self._seed
                )
            whole = len(values) == len(metric_of) and bool(values)
            lines.append(
                Line(
                    system,
                    {task: mean_interval(of_task, seed=self._seed) for task, of_task in values.items()},
                    macro_interval(list(values.values()), seed=self._seed) if whole else None,
                    gain,
                )
            )
        return lines

    def _own_cells(self, system: str) -> dict[str, Cell]:
        """A system's cells on the tasks it was made for, by task."""
        return {cell.task: cell for cell in self.run.cells if cell.system == system and cell.task == cell.made_for}

    def to_json(self) -> dict[str, Any]:
        """Everything: settings, every cell with its rows' values, and what was skipped."""
        return {
            "object": "evaluation",
            "settings": dict(self.run.settings),
            "reference": self.reference,
            "notes": self.notes,
            "summary": [
                {
                    "system": line.system,
                    "mean": None if line.mean is None else asdict(line.mean),
                    "gain": None if line.gain is None else asdict(line.gain),
                }
                for line in self.summary
            ],
            "cells": [
                {**cell.to_json(), "means": {metric: cell.mean(metric) for metric in cell.metrics}}
                for cell in self.run.cells
            ],
            "skipped": [
                {"system": system, "task": task, "why": why} for (system, task), why in self.run.skipped.items()
            ],
        }

    def csv(self) -> str:
        """A line for each system, task it was made for, task and metric."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            "system made_for task metric num_rows mean low high difference difference_low difference_high".split()
        )
        for cell in self.run.cells:
            other = next(
                (
                    c
                    for c in self.run.cells
                    if (c.system, c.task, c.made_for) == (self.reference, cell.task, cell.task) and c is not cell
                ),
                None,
            )
            for metric, values in cell.metrics.items():
                mean = mean_interval(values, seed=self._seed)
                row: list[Any] = [
                    cell.system,
                    cell.made_for,
                    cell.task,
                    metric,
                    len(values),
                    mean.mean,
                    mean.low,
                    mean.high,
                ]
                if other is not None and cell.system != self.reference:
                    difference = paired_difference([values], [other.metrics[metric]], seed=self._seed)
                    row += [difference.mean, difference.low, difference.high]
                else:
                    row += ["", "", ""]
                writer.writerow(row)
        return out.getvalue()

    def markdown(self) -> str:
        """The summary with intervals, then a table for each metric, what was made for one task and measured on others,
        and what was skipped."""
        parts = [
            f"Mean over rows, with 95 % bootstrap intervals of the means. `gain`: the mean over tasks of the paired "
            f"difference to `{self.reference}`, positive where the system is better; bold where its interval excludes "
            "0.\n",
            markdown_table(*self._table(self.summary, {task: self.own_metric(task) for task in self.tasks})),
        ]
        parts += [f"{note}\n" for note in self.notes]
        for metric in self.metrics:
            direction = ", smaller is better" if metric in SMALLER_IS_BETTER else ""
            lines = self.lines(metric)
            tasks = dict.fromkeys((task for line in lines for task in line.tasks), metric)
            parts += [f"### {metric}{direction}\n", markdown_table(*self._table(lines, tasks))]
        if any(cell.task != cell.made_for for cell in self.run.cells):
            parts += ["### Made for one task, measured on another\n", markdown_table(*self._crossed())]
        if self.run.skipped:
            parts.append("### Not made\n")
            parts.append("".join(f"- {system}, {task}: {why}\n" for (system, task), why in self.run.skipped.items()))
        return "\n".join(parts)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The summary as a terminal shows it: columns, and a row of texts for each system; an interval for the gain
        alone."""
        return self._table(self.summary, {task: self.own_metric(task) for task in self.tasks}, with_intervals=False)

    def tables_beside(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """What a terminal shows under the summary, since its metrics may tell little: title, columns and rows, as of
        `rows`, for each metric that tells more."""
        own = {self.own_metric(task) for task in self.tasks}
        more = {metric for each in own for metric in TELLS_MORE.get(each, ())} & set(self.metrics)
        for metric in DECODER_METRICS:
            if metric in more and own != {metric}:
                direction = ", smaller is better" if metric in SMALLER_IS_BETTER else ""
                lines = self.lines(metric)
                tasks = dict.fromkeys((task for line in lines for task in line.tasks), metric)
                yield f"{metric}{direction}", *self._table(lines, tasks, with_intervals=False)

    def _table(
        self, lines: Sequence[Line], metric_of: dict[str, Metric], *, with_intervals: bool = True
    ) -> tuple[list[str], list[list[str]]]:
        shown = _with_interval if with_intervals else _mean
        columns = ["system", *(f"{task} ({metric})" for task, metric in metric_of.items())]
        show_mean = len(metric_of) > 1
        columns += ["mean"] if show_mean else []
        columns.append(f"gain over {self.reference}")
        rows = []
        for line in lines:
            row = [line.system, *(shown(line.tasks.get(task)) for task in metric_of)]
            row += [shown(line.mean)] if show_mean else []
            row.append(_gain(line.gain))
            rows.append(row)
        return columns, rows

    def _crossed(self) -> tuple[list[str], list[list[str]]]:
        columns = ["system", "made for", *(f"{task} ({self.own_metric(task)})" for task in self.tasks)]
        found = {(cell.system, cell.made_for, cell.task): cell for cell in self.run.cells}
        rows = []
        for system, made_for in dict.fromkeys((cell.system, cell.made_for) for cell in self.run.cells):
            row = [system, made_for]
            for task in self.tasks:
                cell = found.get((system, made_for, task))
                row.append("" if cell is None else f"{cell.mean(self.own_metric(task)):.3f}")
            rows.append(row)
        return columns, rows

    def write(self, folder: Path) -> list[Path]:
        """Writes `results.json`, `results.csv` and `results.md` and returns their paths.

        Raises:
            StorageError: the folder cannot be written.
        """
        texts = {
            "results.json": json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n",
            "results.csv": self.csv(),
            "results.md": self.markdown(),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {folder}: {error.strerror or error}") from error
        return [folder / name for name in texts]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; figures are right-aligned."""
    return "".join(_markdown_lines(columns, rows))


def _markdown_lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |\n"
    yield f"|---|{'---:|' * (len(columns) - 1)}\n"
    for row in rows:
        yield f"| {' | '.join(row)} |\n"


def _with_interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _mean(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.mean:.3f}"


def _gain(interval: Interval | None) -> str:
    if interval is None:
        return ""
    text = f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"
    return f"**{text}**" if interval.excludes_zero else text
