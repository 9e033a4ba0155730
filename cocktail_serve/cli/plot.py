"""The change of an expert, layer group by layer group, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cocktail_serve.errors import ConfigError, StorageError

_ROW_INCHES = 0.22
_MAX_INCHES = 60.0


def check_plotting(file: Path) -> None:
    """Raises before anything is read where `plot_changes` would fail.

    Raises:
        ConfigError: matplotlib is not installed, or the file's name does not end in `.png`.
    """
    if file.suffix.lower() != ".png":
        raise ConfigError(f"--plot writes a PNG; name a file that ends in .png, not {file.name!r}", param="plot")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'cocktail-serve[plot]'", param="plot"
        ) from error


def plot_changes(changes: Sequence[Mapping[str, Any]], file: Path, *, title: str) -> None:
    """Draws a bar for each group, the first on top.

    Args:
        changes: groups with `group` and `relative_change`, which is None where the base is 0.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    height = min(_MAX_INCHES, 1.2 + _ROW_INCHES * len(changes))
    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([row["group"] for row in changes], [row["relative_change"] or 0.0 for row in changes], color="#4c72b0")
    axes.invert_yaxis()
    axes.set_xlabel("norm of the difference / norm of the base")
    axes.set_title(title, fontsize="medium")
    axes.tick_params(axis="y", labelsize="small")
    axes.grid(axis="x", alpha=0.3)
    try:
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror or error}") from error
