"""What the pages tell a reader to type: fenced blocks of bash and Python, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)

RUN = ("bash", "python")
"""Languages of what is typed."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file, relative to the checkout.
        line: where it begins.
        language: empty: what a command prints, a formula.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """What is typed, one by one: a program of Python as a whole."""
        return [self.text] if self.language == "python" else list(_commands(self.text))


def pages() -> list[str]:
    """All that a reader is sent to."""
    found = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return sorted(str(page.relative_to(ROOT)) for page in found)


@cache
def blocks(page: str) -> tuple[Block, ...]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return tuple(
        Block(page, text.count("\n", 0, found.start()) + 1, found["language"], found["text"])
        for found in _FENCE.finditer(text)
    )


def _commands(text: str) -> Iterator[str]:
    """Lines, with those that a backslash or a quote continues."""
    command = ""
    for line in text.splitlines(keepends=True):
        command += line
        if command.strip() and not command.endswith("\\\n") and _is_whole(command):
            yield command.rstrip("\n")
            command = ""
    if command.strip():
        yield command.rstrip("\n")


def _is_whole(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:  # a quote is open
        return False
    return True
