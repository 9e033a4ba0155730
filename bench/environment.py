"""An environment of its own for a tool we compare with, so that its requirements never meet ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def make_environment(folder: Path, packages: Sequence[str]) -> Path:
    """Installs `packages` into a virtual environment, made by uv; one that exists with the same packages stays.

    torch's CPU build comes from pip's own find-links folder (`PIP_FIND_LINKS`) where there is one, from PyTorch's
    index otherwise.

    Returns:
        Its Python.
    """
    python = folder / "bin" / "python"
    stamp = folder / "packages.txt"
    if stamp.exists() and stamp.read_text().split("\n") == list(packages):
        return python
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
    links = os.environ.get("PIP_FIND_LINKS")
    source = ("--find-links", links) if links else ("--torch-backend", "cpu")
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *source, *packages], check=True)
    stamp.write_text("\n".join(packages))
    return python
