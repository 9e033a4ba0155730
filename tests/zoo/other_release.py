"""transformers 4 beside the transformers 5 of this environment: another venv that shares all but what differs.

Installed from the package index once, 15 MB, and kept under the user's cache folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement

from tests.zoo import resaving

PINNED = {
    "transformers": "4.57.6",
    "tokenizers": "0.22.2",
    "huggingface-hub": "0.36.2",
    "sentence-transformers": "5.2.0",
}

_SHARED = ("torch", "transformers", "sentence-transformers", "tokenizers", "requests", "sentencepiece", "protobuf")
"""What needs nothing but these and what they need themselves; `requests` is of the older hub client."""

INSTALL_S = 180.0


class NoOtherReleaseError(RuntimeError):
    """It is not installed, and the package index does not give it; says why."""


class OtherRelease:
    """A process in which the other release re-saves what it is given."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def resave(self, kind: str, source: Path, target: Path) -> None:
        """As `resaving.resave`. Raises RuntimeError with the other process's traceback."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"kind": kind, "source": str(source), "target": str(target)}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the other release ended with {self._process.wait()}")
        if error := json.loads(line).get("error"):
            raise RuntimeError(f"transformers {PINNED['transformers']} cannot re-save {source}:\n{error}")


@contextmanager
def running_other_release() -> Iterator[OtherRelease]:
    """Starts the process, installing what it needs the first time.

    Raises:
        NoOtherReleaseError: it cannot be installed.
    """
    python = _installed()
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [str(python), "-P", resaving.__file__],  # -P: what lies beside the script is not imported
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
    )
    try:
        yield OtherRelease(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)
        if process.stdout is not None:
            process.stdout.close()


def _installed() -> Path:
    """The other environment's Python; a folder per set of versions and interpreter, made whole or not at all."""
    versions = "-".join(PINNED.values())
    name = f"{versions}-py{sys.version_info.major}{sys.version_info.minor}-{_digest(sys.prefix)}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cocktail-serve-zoo"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / name
    with FileLock(cache / f"{name}.lock"):
        if not (folder / "complete").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _install(folder)
            (folder / "complete").touch()
    return folder / "bin" / "python"


def _digest(text: str) -> str:
    """A name for a path, for what is made of it to be made anew elsewhere."""
    from cocktail_serve.digest import digest_of

    return digest_of(text)[:8]


def _install(folder: Path) -> None:
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        raise NoOtherReleaseError("no uv beside this Python or on the path")
    wanted = [f"{name}=={version}" for name, version in PINNED.items()]
    try:
        subprocess.run(
            [uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True, capture_output=True, text=True
        )
        python = folder / "bin" / "python"
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), *wanted],
            check=True,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
        )
    except subprocess.TimeoutExpired:
        raise NoOtherReleaseError(f"the package index did not give {wanted} within {INSTALL_S:g} s") from None
    except subprocess.CalledProcessError as error:
        raise NoOtherReleaseError(f"cannot install {wanted}: {error.stderr.strip()[-500:]}") from None
    _share_rest(folder)


def _share_rest(folder: Path) -> None:
    """Links what both environments have alike, torch above all; what is optional for transformers stays away."""
    (packages,) = folder.glob("lib/python*/site-packages")
    waiting, seen = list(_SHARED), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
        if name in PINNED:
            continue
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(distribution.locate_file(top)))
