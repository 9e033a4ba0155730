"""An open pool of a setting, and the cells that tables are made of: each measured once and kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.paper.pools import multitask_folder, prepare, task_rows
from bench.paper.setting import PoolKind, PoolSetting, Setting
from cocktail_serve.config import TEMPERATURES, load_settings
from cocktail_serve.evaluation.measure import Measuring
from cocktail_serve.evaluation.metrics import Metric
from cocktail_serve.evaluation.runs import Evaluation, RunEntry, open_evaluation
from cocktail_serve.evaluation.systems import SYSTEMS, Contender
from cocktail_serve.evaluation.tasks import DecoderTask, Task, load_task, sample_examples
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.progress import OnProgress

TASK_SEED = 0
"""Of the rows that are measured: the same for all systems and draws of examples."""


@dataclass(frozen=True, slots=True)
class System:
    """A row of a table: a system of `cocktail_serve.evaluation` with its options.

    Attributes:
        options: fields of `Occasion`: temperature, alpha.
    """

    label: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scores:
    """One system on one task.

    Attributes:
        score: accuracy, exact match, F1, ROUGE-L or NDCG@10 of each row, 0 to 1: the metric that stands for the task.
        loss: token cross-entropy (nats) of each row's output; None for encoders.
        about: merging weights, losses, temperature of what was measured.
    """

    score: list[float]
    loss: list[float] | None
    about: Mapping[str, Any]


class Session:
    """Measures systems of one pool; everything that was measured is found again in `work`.

    Attributes:
        pool: of the setting.
        evaluation: of the library.
        default_temperature: the server's, where a request to a pool of this kind names none.

    Args:
        data: folder of the tasks.
    """

    def __init__(
        self, setting: Setting, kind: PoolKind, evaluation: Evaluation, data: Path, report: OnProgress
    ) -> None:
        self.setting = setting
        self.kind = kind
        self.pool: PoolSetting = setting.pool(kind)
        self.evaluation = evaluation
        self.default_temperature = TEMPERATURES[kind]
        self.report = report
        self._data = data
        self._tasks: dict[tuple[str, bool], Task] = {}
        self._examples: dict[tuple[str, int, int], ExampleSet] = {}

    def task(self, name: str, *, elsewhere: bool = False) -> Task:
        """The rows of a task that are measured; fewer where it is one of the other tasks of a target."""
        if (name, elsewhere) not in self._tasks:
            self._tasks[name, elsewhere] = load_task(
                self._data / name,
                self.kind,
                name=name,
                limit=self.pool.max_rows_elsewhere if elsewhere else self.pool.max_rows,
                max_documents=self.pool.max_documents,
                seed=TASK_SEED,
            )
        return self._tasks[name, elsewhere]

    def examples(self, task: str, *, seed: int, num: int | None = None) -> ExampleSet:
        """A draw of a task's few-shot examples, `setting.num_examples` unless said."""
        key = (task, seed, num or self.setting.num_examples)
        if key not in self._examples:
            self._examples[key] = sample_examples(self._data / task, self.kind, num=key[2], seed=seed)
        return self._examples[key]

    def fresh_examples(self, task: str, *, seed: int, num: int) -> ExampleSet | None:
        """Examples from a decoder task's test rows that are not measured: no expert was trained on them.

        None where there are not so many.
        """
        measured, everything = self.task(task), load_task(self._data / task, "decoder", name=task)
        assert isinstance(measured, DecoderTask)
        assert isinstance(everything, DecoderTask)
        taken = {row.input for row in measured.rows}
        rows = [{"input": row.input, "output": row.output} for row in everything.rows if row.input not in taken]
        return None if len(rows) < num else parse_examples(rows, "decoder", max_examples=num, seed=seed)

    def make(
        self,
        system: System,
        task: str,
        *,
        seed: int,
        num: int | None = None,
        pooled: ExampleSet | None = None,
    ) -> Contender:
        """A system made for a task; the expert that was fine-tuned for the task is its target, and no peer."""
        entry = RunEntry(self.task(task), self.examples(task, seed=seed, num=num), self.pool.targets.get(task))
        occasion = self.evaluation.occasion(entry, pooled=pooled, **system.options)
        return self.evaluation.make(SYSTEMS[system.name], occasion)

    def measure(self, contender: Contender, task: str, *, elsewhere: bool = False) -> Scores:
        """The contender on the task's rows."""
        cell = self.evaluation.measure("", contender, self.task(task, elsewhere=elsewhere))
        metric = self.metric(task)
        loss = cell.metrics.get("loss")
        return Scores(list(cell.metrics[metric]), None if loss is None else list(loss), cell.about)

    def metric(self, task: str) -> Metric:
        """What stands for a task in a mean."""
        usual: Metric = "accuracy" if self.kind == "decoder" else "ndcg@10"
        return self.pool.metrics.get(task, self.pool.measured[0] if self.pool.measured else usual)

    def having(self, systems: Sequence[System]) -> list[System]:
        """Those of the systems that the pool has: no in-context examples for encoders, multitask where there is one."""
        return [
            system
            for system in systems
            if self.kind in SYSTEMS[system.name].kinds
            and (system.name != "multitask" or self.evaluation.multitask is not None)
        ]

    def describe(self) -> dict[str, Any]:
        """What figures were measured on, for their file."""
        return {
            "pool": {member.name: member.fingerprint[:12] for member in self.evaluation.pool},
            "num_examples": self.setting.num_examples,
            "seeds": self.setting.seeds,
            "rows": {
                f"{name}, elsewhere" if elsewhere else name: len(task)
                for (name, elsewhere), task in self._tasks.items()
            },
            "metrics": {name: self.metric(name) for name, _ in self._tasks},
        }


@contextmanager
def open_session(
    setting: Setting,
    kind: PoolKind,
    *,
    pools: Path,
    data: Path,
    work: Path,
    is_kept_only: bool = False,
    report: OnProgress,
) -> Iterator[Session]:
    """Prepares the pool where it is not, and opens it."""
    config = prepare(setting, kind, pools=pools, data=data, work=work, report=report)
    pool = setting.pool(kind)
    how = Measuring(metrics=pool.measured, max_new_tokens=pool.max_new_tokens)
    settings = load_settings(config, environ={})
    rows = task_rows(setting, kind, data=data, work=work)
    if pool.unmerged:
        from bench.paper.unmerged import open_unmerged

        opened = open_unmerged(settings, kind, out=work / kind, how=how, is_kept_only=is_kept_only, report=report)
    else:
        multitask = multitask_folder(setting, kind, work)
        opened = open_evaluation(settings, kind, out=work / kind, how=how, multitask=multitask, report=report)
    with opened as evaluation:
        yield Session(setting, kind, evaluation, rows, report)
