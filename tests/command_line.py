"""Commands, run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cocktail_serve import cli


def exit_code(*words: object) -> int:
    """Runs a command; what it ends with."""
    with pytest.raises(SystemExit) as exited:
        cli.main([str(word) for word in words])
    return int(exited.value.code or 0)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Runs a command; what it ends with, and what it wrote to stdout and stderr."""
    code = exit_code(*words)
    out, err = capsys.readouterr()
    return code, out, err


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """Runs a command that must succeed, with `--json`; what it wrote, parsed."""
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Runs a command that must be refused as wrong usage; what it wrote to stderr, in one line and without a frame."""
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, ""), err
    return " ".join(err.replace("│", " ").split())


def write_config(folder: Path, **sections: Any) -> Path:
    """A configuration of a pool whose models are not there, for commands that open nothing but the store."""
    pool = {"id": "flan", "kind": "decoder", "base": "b", "engine": {"type": "fake"}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": [pool]} | sections))
    return path
