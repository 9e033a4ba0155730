"""Packages that are tested with beside this environment: newer releases than the pinned ones, tools of other projects.

OpenAI's newest client is one: LlamaIndex's chat class keeps the pinned one below 3. They are installed from the package
index once, a few MB, and kept under the user's cache folder; what they need beside is here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

OPENAI = ("openai==3.57.0",)
"""The newest."""

LANGCHAIN_TESTS = ("langchain-tests==1.1.9", "vcrpy==8.5.0", *OPENAI)

INSTALL_S = 180.0

ROOT = Path(__file__).parents[1]


def environment(wanted: Sequence[str]) -> Mapping[str, str]:
    """Variables of a process that finds these first; skips the test where they cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cocktail-serve-packages"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / "+".join(wanted)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _install(wanted, folder)
            (folder / "complete").touch()
    own = filter(None, [os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *own, str(ROOT)])}


def run(wanted: Sequence[str], arguments: Sequence[str], *, environ: Mapping[str, str] | None = None) -> str:
    """What Python prints with these; fails the test with what it says where it fails."""
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        env={**environment(wanted), **(environ or {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"with {', '.join(wanted)}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def _install(wanted: Sequence[str], folder: Path) -> None:
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        pytest.skip("no uv beside this Python or on the path")
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(folder)]
    try:
        subprocess.run([*command, *wanted], check=True, capture_output=True, text=True, timeout=INSTALL_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the package index did not give {', '.join(wanted)}: {error.stderr or error}")
