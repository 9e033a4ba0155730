"""Functions that import torch run in a process of their own, and as if they had run here."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cocktail_serve import library_process
from cocktail_serve.errors import IncompatibleModelsError, InvalidExamplesError, ServerError
from cocktail_serve.library_process import LibraryProcess
from tests.library_calls import end, make_pool, refuse, report, sleep, sum_up
from tests.processes import is_alive


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process without torch, which pytest's is not."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def elsewhere_unknown() -> None:
    """In a module that pytest alone finds."""


pytestmark = pytest.mark.usefixtures("elsewhere")


def test_one_process_runs_them_and_ends_with_the_block() -> None:
    with LibraryProcess() as libraries:
        results = [libraries.call(sum_up, 1, 2, more=more) for more in (3, 4)]
    (first, pid), (second, other) = results
    assert (first, second) == (6, 7)
    assert pid == other != os.getpid()
    assert not _exists(pid)


def test_where_torch_is_loaded_they_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", object())
    with LibraryProcess() as libraries:
        assert libraries.call(sum_up, 1) == (1, os.getpid())


def test_what_it_says_meanwhile_arrives(caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[Any, ...]] = []
    with caplog.at_level(logging.INFO), LibraryProcess() as libraries:
        libraries.call(report, progress=lambda *what: told.append(what))
    assert told == [("base", 1, 2), ("base", 2, 2)]
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("cocktail_serve.tests", "a line of ours")
    ]
    caplog.clear()
    logging.getLogger("cocktail_serve.tests").setLevel(logging.WARNING)
    try:
        with LibraryProcess() as libraries:
            libraries.call(report, progress=lambda *_what: None)
    finally:
        logging.getLogger("cocktail_serve.tests").setLevel(logging.NOTSET)
    assert not caplog.records, "levels of this process count"


def test_errors_are_raised_here() -> None:
    with LibraryProcess() as libraries:
        with pytest.raises(IncompatibleModelsError, match="they do not fit") as caught:
            libraries.call(refuse, "incompatible")
        assert caught.value.param == "experts"
        with pytest.raises(InvalidExamplesError, match="row 3: it is empty"):
            libraries.call(refuse, "row")
        with pytest.raises(ZeroDivisionError) as fault:
            libraries.call(refuse, "fault")
        assert 'raise ZeroDivisionError("a fault of ours")' in fault.value.__notes__[0]
        assert libraries.call(sum_up, 1)[0] == 1


def test_a_pool_travels() -> None:
    with LibraryProcess() as libraries:
        opened = libraries.call(make_pool)
    assert opened == make_pool()
    assert (opened.experts, opened.warnings) == (make_pool().experts, ("warned",))
    with pytest.raises(TypeError):
        opened.experts["other"] = opened.base  # type: ignore[index]


def test_a_process_that_ends_is_told() -> None:
    said = "ended with code 7 before it was done; is the machine short of memory"
    with LibraryProcess() as libraries, pytest.raises(ServerError, match=said):
        libraries.call(end, 7)


def test_what_it_cannot_be_told_is_raised_here() -> None:
    """Such as a function that only this process knows."""
    with LibraryProcess() as libraries, pytest.raises(ModuleNotFoundError, match="test_library_process"):
        libraries.call(elsewhere_unknown)


def test_another_thread_may_end_it(tmp_path: Path) -> None:
    libraries, file = LibraryProcess(), tmp_path / "pid"
    raised: list[BaseException] = []

    def call() -> None:
        try:
            libraries.call(sleep, str(file))
        except ServerError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    pid = _written(file)
    libraries.close()
    thread.join(10)
    assert not thread.is_alive()
    assert "by signal 9" in str(raised[0])
    assert not _exists(pid)


def test_it_ends_with_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = (
        "from cocktail_serve.library_process import LibraryProcess\n"
        "from tests.library_calls import sleep\n"
        "import sys; sys.modules.pop('torch', None)\n"
        f"LibraryProcess().call(sleep, {str(file)!r})\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code])
    pid = _written(file, timeout_s=60)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 10
    while _exists(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _exists(pid)


def _written(file: Path, *, timeout_s: float = 20) -> int:
    deadline = time.monotonic() + timeout_s
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(file.read_text())


def _exists(pid: int) -> bool:
    return psutil.pid_exists(pid) and is_alive(psutil.Process(pid))


def test_its_name_is_that_of_its_module() -> None:
    """The process is started by it."""
    assert library_process.__name__ == "cocktail_serve.library_process"
