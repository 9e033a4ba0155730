"""A run as a picture: systems side by side, with their intervals."""

from __future__ import annotations

from pathlib import Path

from cocktail_serve.errors import ConfigError, StorageError
from cocktail_serve.evaluation.intervals import Interval
from cocktail_serve.evaluation.report import Report

PLOT_FILE = "results.png"

_PANEL_INCHES = 3.2
_ROW_INCHES = 0.3
_MAX_PANELS = 8


def check_plotting() -> None:
    """Raises ConfigError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("matplotlib is not installed: pip install 'cocktail-serve[eval]'") from error


def plot_summary(report: Report, file: Path) -> None:
    """Draws the mean over tasks, the gain over the reference, and up to six tasks, a dot and an interval a system.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    lines = report.summary
    panels: dict[str, list[Interval | None]] = {}
    if len(report.tasks) > 1:
        panels["mean of the tasks"] = [line.mean for line in lines]
    panels[f"gain over {report.reference}"] = [line.gain for line in lines]
    for task in report.tasks[: _MAX_PANELS - len(panels)]:
        panels[f"{task}\n({report.own_metric(task)})"] = [line.tasks.get(task) for line in lines]
    height = 1.4 + _ROW_INCHES * len(lines)
    figure = Figure(figsize=(1.5 + _PANEL_INCHES * len(panels), height), layout="constrained")
    places = list(range(len(lines)))
    for axes, (title, intervals) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for place, interval in zip(places, intervals, strict=True):
            if interval is not None:
                axes.plot([interval.low, interval.high], [place, place], color="#4c72b0", linewidth=2)
                axes.plot([interval.mean], [place], "o", color="#4c72b0", markersize=5)
        if title.startswith("gain"):
            axes.axvline(0.0, color="#888888", linewidth=1)
        axes.set_title(title, fontsize="small")
        axes.set_yticks(places, [line.system for line in lines])
        axes.tick_params(labelsize="small")
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    try:
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror or error}") from error
