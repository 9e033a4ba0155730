"""A run: systems made for tasks, each measured, broken off and gone on with at will."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cocktail_serve.config import PoolConfig, Settings, Source
from cocktail_serve.errors import ConfigError, InvalidRequestError
from cocktail_serve.evaluation.backend import Backend
from cocktail_serve.evaluation.cells import Cell, CellStore
from cocktail_serve.evaluation.measure import Measurer, Measuring, describe
from cocktail_serve.evaluation.systems import Contender, NotMade, Occasion, System
from cocktail_serve.evaluation.tasks import EncoderTask, Task
from cocktail_serve.examples import ExampleSet
from cocktail_serve.offline.opened import open_with_progress
from cocktail_serve.pool import Pool
from cocktail_serve.progress import OnProgress, silent

CELLS = "cells"
"""Folder of finished measurements in a run's folder."""

MULTITASK = "multitask"
"""Name that a multitask model from a folder of its own has in the pool."""


@dataclass(frozen=True, slots=True)
class RunEntry:
    """A task and what systems are made for it from.

    Attributes:
        target: the pool's expert fine-tuned for this task; None: none is.
    """

    task: Task
    examples: ExampleSet | None = None
    target: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What came out.

    Attributes:
        cells: in the order of systems, then tasks.
        skipped: why a system could not be made, by its name and the task's.
        settings: what the run was asked for, for the report.
    """

    cells: tuple[Cell, ...]
    skipped: Mapping[tuple[str, str], str]
    settings: Mapping[str, Any]


class Evaluation:
    """An open pool whose systems can be made and measured. Made by `open_evaluation`.

    Attributes:
        backend: what answers.
        multitask: name in the pool of the multitask model, or None.
    """

    def __init__(
        self, settings: Settings, backend: Backend, store: CellStore, how: Measuring, multitask: str | None
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.multitask = multitask
        self.how = how
        self._meter = Measurer(backend, store, how)

    @property
    def pool(self) -> Pool:
        return self.backend.pool

    def occasion(self, entry: RunEntry, *, experts: Sequence[str] | None = None, **options: Any) -> Occasion:
        """What systems for a task are made from: of the pool's experts all but its target and the multitask model.

        Args:
            experts: limits the peers.
            options: further fields of `Occasion`.
        """
        for name in (*(experts or ()), *(() if entry.target is None else (entry.target,))):
            self.pool.member(name, param="experts")
        peers = tuple(
            name
            for name in self.pool.experts
            if name not in (entry.target, self.multitask) and (experts is None or name in experts)
        )
        return Occasion(entry.task.name, entry.examples, entry.target, peers, multitask=self.multitask, **options)

    def make(self, system: System, occasion: Occasion) -> Contender:
        """Makes a system: losses are measured and parameters mixed as far as needed.

        Raises:
            NotMade: something that this system needs is missing.
        """
        return system.make(self.backend, occasion)

    def measure(self, name: str, contender: Contender, task: Task, *, made_for: str | None = None) -> Cell:
        """Measures a contender on a task, or finds what was measured before."""
        metrics, about = self._meter.measure(contender, task)
        return Cell(name, task.name, made_for or task.name, metrics, {**contender.about, **about})


@contextmanager
def open_evaluation(
    settings: Settings,
    pool_id: str,
    *,
    out: Path | None = None,
    how: Measuring | None = None,
    multitask: str | Path | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    report: OnProgress = silent,
) -> Iterator[Evaluation]:
    """Opens a pool to be measured.

    Args:
        out: the run's folder, in which finished measurements are kept; None: nothing is kept.
        multitask: an expert of the pool, or a model folder of the pool's architecture: a row of its own, in no mixture.
        base_url: a running server of this configuration, `http://127.0.0.1:8000/v1`; None: the pool in memory.
        api_key: for the server.

    Raises:
        ClientError: a pool that is not there, cannot be read, or is neither of decoders nor of encoders.
    """
    config = settings.pool(pool_id)
    if config.kind not in ("decoder", "encoder"):
        raise InvalidRequestError(
            f"pool {pool_id!r} is of kind {config.kind}; decoder and encoder pools can be measured", param="pool"
        )
    settings, config, name = _with_multitask(settings, config, multitask, served=base_url is not None)
    store = CellStore(None if out is None else out / CELLS)
    pool = open_with_progress(settings, config, report)
    if base_url is None:
        pool = replace(pool, mode="merged")  # one model in memory at a time
    backend = _backend(settings, config, pool, store, report, base_url=base_url, api_key=api_key)
    try:
        yield Evaluation(settings, backend, store, how or Measuring(), name)
    finally:
        backend.close()


def run(
    evaluation: Evaluation,
    entries: Sequence[RunEntry],
    systems: Sequence[System],
    *,
    temperatures: Sequence[float] = (),
    experts: Sequence[str] | None = None,
    cross: bool = False,
    report: OnProgress = silent,
    **options: Any,
) -> Run:
    """Makes each system for each task and measures it.

    Args:
        temperatures: systems that read one are a row for each; none: one row, with the configuration's default.
        cross: measure what was made for a task on all tasks, not on its own alone.
        options: further fields of `Occasion` (alpha, budget, seed, method_params).

    Raises:
        CocktailError: what could not be measured for another reason than a system's own needs.
    """
    if len({entry.task.name for entry in entries}) < len(entries):
        raise InvalidRequestError("two tasks have the same name; give them names of their own", param="task")
    pooled = _pooled(entries)
    rows = list(_rows(systems, temperatures))
    cells: list[Cell] = []
    skipped: dict[tuple[str, str], str] = {}
    total = len(rows) * len(entries)
    for number, (name, system, temperature) in enumerate(rows):
        for position, entry in enumerate(entries):
            report("measuring", number * len(entries) + position, total)
            occasion = evaluation.occasion(entry, experts=experts, temperature=temperature, pooled=pooled, **options)
            try:
                contender = evaluation.make(system, occasion)
            except NotMade as error:
                skipped[name, entry.task.name] = error.message
                continue
            others = entries if cross and contender.shots is None else [entry]
            cells += [evaluation.measure(name, contender, other.task, made_for=entry.task.name) for other in others]
    report("measuring", total, total)
    asked = {
        "pool": evaluation.pool.id,
        "pool_fingerprint": evaluation.pool.fingerprint,
        "measuring": describe(evaluation.how),
        "tasks": {entry.task.name: _described(entry) for entry in entries},
        "temperatures": list(temperatures),
        **options,
    }
    return Run(tuple(cells), skipped, asked)


def _rows(systems: Sequence[System], temperatures: Sequence[float]) -> Iterator[tuple[str, System, float | None]]:
    for system in systems:
        if not system.reads_temperature or not temperatures:
            yield system.name, system, None
        elif len(temperatures) == 1:
            yield system.name, system, temperatures[0]
        else:
            for temperature in temperatures:
                yield f"{system.name} tau={temperature:g}", system, temperature


def _described(entry: RunEntry) -> dict[str, Any]:
    told = {
        "num_rows": len(entry.task),
        "num_given": entry.task.num_given,
        "num_examples": 0 if entry.examples is None else len(entry.examples),
        "target": entry.target,
    }
    if isinstance(entry.task, EncoderTask):
        told["num_without_relevant"] = entry.task.num_without_relevant
    return told


def _pooled(entries: Sequence[RunEntry]) -> ExampleSet | None:
    """The examples of all tasks, each once."""
    examples = list(dict.fromkeys(example for entry in entries for example in entry.examples or ()))
    return ExampleSet.of(examples) if examples else None


def _with_multitask(
    settings: Settings, config: PoolConfig, multitask: str | Path | None, *, served: bool
) -> tuple[Settings, PoolConfig, str | None]:
    """The pool with the multitask model in it, and the model's name."""
    if multitask is None:
        return settings, config, None
    if str(multitask) in config.experts:
        return settings, config, str(multitask)
    if served:
        raise ConfigError(
            "with --base-url the multitask model must be an expert of the served pool: name it", param="multitask"
        )
    folder = Path(multitask).absolute()
    if not folder.is_dir():
        raise ConfigError(f"{multitask} is neither an expert of pool {config.id!r} nor a folder", param="multitask")
    extended = config.model_copy(update={"experts": {**config.experts, MULTITASK: Source(path=str(folder))}})
    pools = [extended if pool.id == config.id else pool for pool in settings.pools]
    return settings.model_copy(update={"pools": pools}), extended, MULTITASK


def _backend(
    settings: Settings,
    config: PoolConfig,
    pool: Pool,
    store: CellStore,
    report: OnProgress,
    *,
    base_url: str | None,
    api_key: str | None,
) -> Backend:
    if base_url is not None:
        from cocktail_serve.evaluation.served import ServedDecoders, ServedEncoders

        served = ServedDecoders if pool.kind == "decoder" else ServedEncoders
        return served(config, pool, report, base_url=base_url, api_key=api_key)
    from cocktail_serve.evaluation.in_memory import InMemoryDecoders, InMemoryEncoders

    in_memory = InMemoryDecoders if pool.kind == "decoder" else InMemoryEncoders
    return in_memory(settings, config, pool, store, report)
