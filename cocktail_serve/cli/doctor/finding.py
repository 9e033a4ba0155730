"""One thing that `doctor` looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cocktail_serve.errors import CocktailError

if TYPE_CHECKING:
    from rich.console import Console

CheckStatus = Literal["ok", "warning", "problem"]


_MARKS: dict[CheckStatus, tuple[str, str]] = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Attributes:
        detail: what was found.
        fix: what to do about it; empty where nothing is wrong, or the detail says it.
    """

    name: str
    status: CheckStatus
    detail: str
    fix: str = ""


def tried(name: str, look: Callable[[], str], *, status: CheckStatus = "problem") -> Check:
    """What a look found, or the error that it ended in, with that status."""
    try:
        return Check(name, "ok", look())
    except CocktailError as error:
        return Check(name, status, error.message)


def show(console: Console, check: Check) -> None:
    """A line for what was found, and one for what to do about it."""
    mark, color = _MARKS[check.status]
    console.print(f"[{color}]{mark}[/] [bold]{check.name}[/]", end=" ")
    console.print(check.detail, markup=False)
    if check.fix:
        console.print(f"    {check.fix}", markup=False)
