"""`cocktail-serve demo` as a newcomer runs it: real vLLM, real sentence-transformers, nothing made before."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@dataclass(frozen=True)
class Finished:
    """One run of the demo.

    Attributes:
        started: every process that was seen under it while it ran.
    """

    code: int
    out: str
    err: str
    started: set[psutil.Process]


@pytest.fixture(scope="module")
def finished(folder):
    """With --json: the story goes to stderr then, the object to stdout."""
    out, err = folder / "out.txt", folder / "err.txt"
    with (
        out.open("w") as stdout,
        err.open("w") as stderr,
        _demo(folder, "--json", stdout=stdout, stderr=stderr) as demo,
    ):
        started = set()
        _wait_until(lambda: started.update(_descendants(demo)) or demo.poll() is not None, 480)
    return Finished(demo.returncode, out.read_text(), err.read_text(), started)


@pytest.fixture(scope="module")
def result(finished):
    assert finished.code == 0, finished.err
    return json.loads(finished.out)


def test_the_decoder_cocktail_answers_what_the_base_cannot(result):
    decoder = result["decoder"]
    weights = decoder["cocktail"]["merging_weights"]
    assert sorted(weights, key=weights.__getitem__)[-2:] in (["capitals", "languages"], ["languages", "capitals"])
    assert decoder["cocktail"]["mixed_loss"] < decoder["cocktail"]["losses"]["base"]
    assert decoder["cocktail_accuracy"] >= decoder["base_accuracy"] + 0.2
    assert decoder["cocktail_accuracy"] > max(decoder["expert_accuracy"].values())


def test_the_encoder_cocktail_finds_what_the_base_cannot(result):
    encoder = result["encoder"]
    assert encoder["cocktail"]["mixed_loss"] < encoder["cocktail"]["losses"]["base"]
    assert encoder["cocktail_right_first"] >= encoder["base_right_first"] + 0.2


def test_a_decoder_cocktail_is_ready_within_ten_seconds(result):
    assert result["decoder"]["seconds"] <= 10


def test_the_story_shows_losses_answers_rankings_and_how_to_go_on(finished, result):
    story = finished.err
    for part in ("merging weight", "█", "✓", "✗", "search:", "curl http://127.0.0.1:", "OpenAI(base_url="):
        assert part in story
    assert all(name in story for name in result["decoder"]["cocktail"]["losses"])


def test_nothing_is_left_running(finished):
    assert len(finished.started) >= 4  # the server, and vLLM's three
    _wait_until(lambda: not _running(finished.started), 30)


def test_an_interrupt_ends_the_server_and_its_engines(result, folder):
    """In the middle of the start, when there are most processes to forget."""
    with _demo(folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
        started = set()
        _wait_until(lambda: started.update(_descendants(demo)) or len(started) >= 3, 120)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 130
    _wait_until(lambda: not _running(started), 30)


@contextlib.contextmanager
def _demo(folder, *args, **streams):
    demo = subprocess.Popen(
        [sys.executable, "-m", "cocktail_serve.cli", "demo", *args],
        env=os.environ | {"COCKTAIL_DEMO_DIR": str(folder), "COLUMNS": "160"},
        stdin=subprocess.DEVNULL,
        **streams,
    )
    try:
        yield demo
    finally:
        demo.kill()
        demo.wait()


def _descendants(demo) -> list[psutil.Process]:
    try:
        return psutil.Process(demo.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _running(processes) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def _wait_until(happened, timeout_s):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):  # a process ended while it was looked at
            if happened():
                return
        time.sleep(0.2)
    pytest.fail(f"did not happen within {timeout_s} s")
