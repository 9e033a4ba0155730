"""What all commands show and how: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, OverflowMethod, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cocktail_serve.progress import OnProgress
from cocktail_serve.weighting.candidates import Candidate

BAR_WIDTH = 24
SAY_EVERY_S = 30.0
"""Where there is no terminal: how often a line says how long something will take."""

UNLIMITED = 10_000
"""Columns of what is no terminal: whoever reads a file or a pipe breaks lines as they like."""


def stdout() -> Console:
    """Where results go; made when used, since tests and callers replace `sys.stdout`."""
    return _console(sys.stdout)


def stderr() -> Console:
    """Where progress and errors go."""
    return _console(sys.stderr)


def _console(file: TextIO) -> Console:
    is_terminal = file.isatty()
    return Console(file=file, highlight=False, soft_wrap=not is_terminal, width=None if is_terminal else UNLIMITED)


class ResultTable(Table):
    """A table without lines, of which a narrow terminal cuts nothing: what does not fit goes on in the next line."""

    def __init__(self, *headers: str, title: str | None = None, show_header: bool = True) -> None:
        super().__init__(title=title, title_justify="left", show_header=show_header, box=None, pad_edge=False)
        for header in headers:
            self.add_column(header)

    def add_column(
        self, header: RenderableType = "", *args: Any, overflow: OverflowMethod = "fold", **how: Any
    ) -> None:
        super().add_column(header, *args, overflow=overflow, **how)

    def fits(self, console: Console) -> bool:
        """Whether nothing has to go on in a next line."""
        return console.measure(self, options=console.options.update(width=UNLIMITED)).maximum <= console.width


def print_json(value: Any) -> None:
    """The one JSON object of a command under `--json`."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()  # a program that starts a server reads this while it runs


def print_error(message: str) -> None:
    stderr().print(f"error: {message}", style="red", markup=False)


def print_warnings(console: Console, warnings: Iterable[str]) -> None:
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)


@contextlib.contextmanager
def progress() -> Iterator[OnProgress]:
    """Shows work as bars on a terminal; elsewhere a line says that a thing begins, how long it will take, its end."""
    console = stderr()
    if console.is_terminal:
        with _bars(console) as report:
            yield report
    else:
        yield _plain_lines(console)


@contextlib.contextmanager
def _bars(console: Console) -> Iterator[OnProgress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(BAR_WIDTH),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as shown:
        tasks: dict[str, Any] = {}
        begun: dict[str, float] = {}

        def report(what: str, done: int, total: int, *, is_bytes: bool = False) -> None:
            if what not in tasks:
                tasks[what], begun[what] = shown.add_task(what, total=total, amount=""), time.monotonic()
            amount = _amount(done, total, time.monotonic() - begun[what]) if is_bytes else ""
            shown.update(tasks[what], completed=done, total=total, amount=amount)

        yield report


def _plain_lines(console: Console) -> OnProgress:
    begun: dict[str, float] = {}
    ended: set[str] = set()
    said_at: dict[str, float] = {}

    def report(what: str, done: int, total: int, *, is_bytes: bool = False) -> None:
        now = time.monotonic()
        if what not in begun:
            begun[what] = said_at[what] = now
            console.print(f"{what} ...", markup=False)
        if 0 < done < total and now - said_at[what] >= SAY_EVERY_S:
            said_at[what] = now
            left_s = (now - begun[what]) * (total - done) / done
            console.print(f"{what}: {done / total:.0%}, about {_duration(left_s)} left", markup=False)
        if done >= total and what not in ended:
            ended.add(what)
            amount = f", {_amount(done, total, now - begun[what])}" if is_bytes else ""
            console.print(f"{what}: done{amount}", markup=False)

    return report


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _amount(done: int, total: int, seconds: float) -> str:
    """Bytes done of all, and how many in a second."""
    return f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {done / 1e6 / max(seconds, 1e-3):,.0f} MB/s"


def bar(share: float, *, width: int = BAR_WIDTH) -> str:
    """A share from 0 to 1 as a bar of block characters."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")


def weighing_table(losses: Mapping[str, float], merging_weights: Mapping[str, float], *, title: str = "") -> Table:
    """Losses and merging weights by model, with bars."""
    table = ResultTable(title=title or None)
    table.add_column("model", style="bold")
    table.add_column("loss (nats)", justify="right")
    table.add_column("merging weight", justify="right")
    table.add_column("")
    for name in dict.fromkeys([*losses, *merging_weights]):
        loss, weight = losses.get(name), merging_weights.get(name, 0.0)
        table.add_row(name, "" if loss is None else f"{loss:.3f}", f"{weight:.3f}", bar(weight))
    return table


def candidates_table(candidates: Sequence[Candidate]) -> Table:
    """What a search tried and how it was judged, the chosen one marked."""
    names = list(candidates[0].merging_weights)
    table = ResultTable(title="candidates")
    table.add_column("")
    settings = {"temperature": "tau", "alpha": "alpha"}
    shown = [field for field in settings if any(getattr(candidate, field) is not None for candidate in candidates)]
    for column in (*(settings[field] for field in shown), "loss (nats)", *names):
        table.add_column(column, justify="right")
    for candidate in candidates:
        values = [getattr(candidate, field) for field in shown]
        table.add_row(
            "*" if candidate.chosen else "",
            *("" if value is None else f"{value:g}" for value in values),
            "" if candidate.loss is None else f"{candidate.loss:.3f}",
            *(f"{candidate.merging_weights.get(name, 0.0):.3f}" for name in names),
            style="bold" if candidate.chosen else None,
        )
    return table
