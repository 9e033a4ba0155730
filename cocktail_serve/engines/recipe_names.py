"""Recipes as people know them, for the log of engines, which know recipes by their digests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

NamesOf = Callable[[str], Sequence[str]]
"""What a recipe is served as, by its digest: for people, so with whose it is."""

MAX_LOGGED_NAMES = 3
"""Of what a recipe is served as, in a line of the log: tenants with the same examples have the same mixture."""


def no_names(_digest: str) -> Sequence[str]:
    """`NamesOf` where nobody has told any."""
    return ()


def named_recipe(digest: str, names_of: NamesOf) -> str:
    """A recipe for the log: the beginning of its digest, and what it is served as."""
    names = sorted(names_of(digest))
    shown = [*names[:MAX_LOGGED_NAMES], *(["..."] if len(names) > MAX_LOGGED_NAMES else [])]
    return f"{digest[:8]} ({', '.join(shown)})" if shown else digest[:8]
