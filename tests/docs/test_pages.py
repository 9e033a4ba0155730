"""Every command of every page is typed, in a fresh home and environment, or it is said why not: a page cannot rot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.journeys import _FUNCTIONS, JOURNEYS, Journey
from tests.docs.pages import RUN, blocks
from tests.docs.shell import Shell, install

pytestmark = [pytest.mark.full, pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("installed"))


@pytest.mark.parametrize("name", JOURNEYS)
def test_a_reader_gets_through(name: str, environment: Path, tmp_path: Path) -> None:
    journey = JOURNEYS[name]
    journey_prepare(journey, shell := Shell(tmp_path, environment))
    with shell:
        typed(shell, f"{_FUNCTIONS}\nexport SERVER=http://127.0.0.1:8000", "the setup")
        for command in journey.first:
            typed(shell, command, "the setup")
        for page in journey.pages:
            for block in blocks(page):
                if block.language in RUN:
                    for command in block.commands:
                        walk(shell, journey, command, f"{page}:{block.line}", is_python=block.language == "python")
        for command, expected in journey.last.items():
            assert expected in typed(shell, command, "the end")


def journey_prepare(journey: Journey, shell: Shell) -> None:
    journey.prepare(shell)


def walk(shell: Shell, journey: Journey, command: str, where: str, *, is_python: bool) -> None:
    if any(text in command for text in journey.not_run):
        return
    for text, more in journey.before.items():
        if text in command:
            typed(shell, more, f"before {where}")
    expected = [said for text, said in journey.prints.items() if text in command]
    for text, instead in journey.changes.items():
        command = command.replace(text, instead)
    if is_python:
        (shell.folder / "program.py").write_text(re.sub(r"(127\.0\.0\.1|localhost):8000", rf"\1:{shell.port}", command))
        command = "python program.py"
    printed = typed(shell, command, where)
    for said in expected:
        assert said in printed, where


def typed(shell: Shell, command: str, where: str) -> str:
    """What a command printed, which must succeed."""
    status, printed = shell.run(re.sub(r"(127\.0\.0\.1|localhost):8000", rf"\1:{shell.port}", command))
    print(f"[{where}] $ {command}\n{printed}")
    assert status == 0, f"{where}: {command}\nended with {status}:\n{printed[-6000:]}"
    return printed
