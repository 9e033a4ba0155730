"""One thing that `doctor` looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cocktail_serve.errors import CocktailError

CheckStatus = Literal["ok", "warning", "problem"]


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
