"""Processes that die with the one above them: real processes, no vLLM."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import psutil
import pytest

from vllm_cocktail.lifetime import die_with_owner
from vllm_cocktail.manifest import OWNER_VARIABLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")

CHILD = """
    import sys, time
    from vllm_cocktail.lifetime import die_with_owner
    die_with_owner()
    print("armed", flush=True)
    {then}
    time.sleep(60)
"""
GRANDCHILD = "import subprocess; subprocess.Popen([sys.executable, '-c', {code!r}])"
OWNER = """
    import os, subprocess, sys, time
    subprocess.Popen([sys.executable, "-c", {code!r}], env=dict(os.environ, VLLM_COCKTAIL_OWNER_PID=str(os.getpid())))
    time.sleep(60)
"""


def child_code(then: str = "") -> str:
    return textwrap.dedent(CHILD).format(then=then)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_the_tree_below_a_killed_owner_goes_with_it(processes: list[subprocess.Popen[str]]) -> None:
    code = child_code(GRANDCHILD.format(code=child_code()))
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER).format(code=code)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    processes.append(owner)
    assert owner.stdout is not None
    assert [owner.stdout.readline(), owner.stdout.readline()] == ["armed\n", "armed\n"]
    below = psutil.Process(owner.pid).children(recursive=True)
    assert len(below) == 2
    owner.kill()
    assert all(gone(process.pid) for process in below)


def test_a_process_whose_owner_is_dead_already_ends() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    done = subprocess.run(
        [sys.executable, "-c", child_code()],
        env={**os.environ, OWNER_VARIABLE: str(dead.pid)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "armed" not in done.stdout
    assert str(dead.pid) in done.stderr


def test_without_an_owner_nothing_happens() -> None:
    environ: dict[str, str] = {}
    die_with_owner(environ)
    assert environ == {}


def test_a_second_call_changes_nothing() -> None:
    environ = {OWNER_VARIABLE: str(os.getpid())}
    die_with_owner(environ)
    assert environ == {OWNER_VARIABLE: str(os.getpid())}


def test_registering_in_a_plain_process_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM loads general plugins in its command-line process too, whoever installed the package."""
    from vllm_cocktail import register

    monkeypatch.delenv(OWNER_VARIABLE, raising=False)
    register()
    register()
    assert OWNER_VARIABLE not in os.environ


def test_every_process_asks_for_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it vLLM's attention dies of SIGILL on a CPU with AMX, at a first prompt that is short."""
    import torch

    from vllm_cocktail import register

    asked: list[bool] = []
    monkeypatch.delenv(OWNER_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True))
    register()
    assert asked == [True]
