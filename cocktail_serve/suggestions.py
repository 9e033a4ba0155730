"""Which name was meant: what a message says behind one that is not known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

MAX_COMPARED = 200
"""Names that are looked at. Each costs some ten microseconds, which a server's event loop waits for."""

MAX_CHARS = 200
"""A longer word is no misspelt name."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`. Did you mean 'ag-news'?`, to be put behind a message; empty where no known name is close.

    Args:
        name: what was given.
        known: the names that there are for whoever is told, those that matter most first.
    """
    if len(name) > MAX_CHARS:
        return ""
    by_folded = {each.casefold(): each for each in islice(known, MAX_COMPARED)}
    close = get_close_matches(name.casefold(), by_folded, n=1)
    return f". Did you mean {by_folded[close[0]]!r}?" if close else ""
