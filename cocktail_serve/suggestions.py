"""Which name was meant: what a message says behind one that is not known."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

MAX_COMPARED = 200
"""Names that are looked at. Each costs some ten microseconds, which a server's event loop waits for."""

MAX_CHARS = 200
"""A longer word is no misspelt name."""


def did_you_mean(name: str, known: Iterable[str], *, max_compared: int | None = MAX_COMPARED) -> str:
    """`. Did you mean 'ag-news'?`, to be put behind a message; empty where no known name is close.

    Args:
        name: what was given.
        known: the names that there are for whoever is told, those that matter most first.
        max_compared: how many of them are looked at; None: all.
    """
    close = _nearest(name, islice(known, max_compared))
    return "" if close is None else f". Did you mean {close!r}?"


def with_options_meant(message: str, usage: str) -> str:
    """What an argument parser says of options that it does not know, each with the nearest of those that it has.

    Args:
        message: as `unrecognized arguments: --max-lenght 5`; others come back as they are.
        usage: the parser's own, or a text that holds it.
    """
    if not message.startswith(_UNRECOGNISED):
        return message
    known = dict.fromkeys(_OPTION.findall(usage))
    return " ".join(_with_option_meant(word, known) for word in message.split(" "))


_UNRECOGNISED = "unrecognized arguments: "
"""How Python's argument parsers begin."""

_OPTION = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


def _with_option_meant(word: str, known: Iterable[str]) -> str:
    option = _OPTION.match(word)
    close = None if option is None else _nearest(option[0].replace("_", "-"), known)
    return word if close is None else f"{word} (did you mean {close}?)"


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of these names that is most like this one; None: none is close."""
    if len(name) > MAX_CHARS:
        return None
    by_folded = {each.casefold(): each for each in known}
    close = get_close_matches(name.casefold(), by_folded, n=1)
    return by_folded[close[0]] if close else None
