"""How long work tells whoever shows it how far it is."""

from __future__ import annotations

from typing import Protocol


class OnProgress(Protocol):
    """Is told what is worked on, how much of it is done, how much there is, and whether that counts bytes."""

    def __call__(self, what: str, done: int, total: int, *, is_bytes: bool = False) -> None: ...


def silent(what: str, done: int, total: int, *, is_bytes: bool = False) -> None:
    """An `OnProgress` that nobody looks at."""
