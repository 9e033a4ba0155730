"""The demo's server: the `serve` command in a process group of its own, which ends with the demo."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import httpx
from rich.status import Status

from cocktail_serve.cli.demo.pools import DemoPools
from cocktail_serve.cli.terminal import stderr
from cocktail_serve.errors import ServerError
from vllm_cocktail.manifest import OWNER_VARIABLE

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.25


class DemoServer:
    """A server with an empty registry, so that each demo shows a cocktail in the making, or with one that is kept.

    Args:
        port: 0: a free one.
        keep: cocktails outlive the server.

    Attributes:
        url: base URL, known once it listens.
        start_seconds: how long it took until all engines were ready.
    """

    def __init__(self, pools: DemoPools, *, port: int, keep: bool) -> None:
        self._pools = pools
        self._port = port
        self._keep = keep
        self._stack = contextlib.ExitStack()
        self.start_seconds = 0.0

    def __enter__(self) -> Self:
        environment = dict(os.environ)
        if not self._keep:
            # a folder of its own: a server that was left running keeps its registry to itself
            environment["COCKTAIL_STORE__CACHE_DIR"] = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="cocktail-demo-")
            )
        environment[OWNER_VARIABLE] = str(os.getpid())  # even a SIGKILL of the demo leaves no server behind
        log = self._stack.enter_context(self._pools.log.open("w"))
        command = [sys.executable, "-m", "cocktail_serve.cli", "serve", str(self._pools.config)]
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(
            [*command, "--port", str(self._port), "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._stack.callback(self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait_until_ready(self) -> None:
        """Shows what is being waited for, until all engines answer.

        Raises:
            ServerError: the server ended, or took more than five minutes; shows the end of its log.
        """
        with _live_line("starting the server") as say:
            self.url = self._announced_url()
            for waiting_for in self._states():
                say(f"starting the engines, {time.monotonic() - self._started_at:.0f} s: {waiting_for}")
        self.start_seconds = time.monotonic() - self._started_at

    def wait(self) -> None:
        """Until the server ends by itself, which is a failure, or the demo is interrupted."""
        self._process.wait()
        raise self._failed("the server ended")

    def _announced_url(self) -> str:
        """What `serve --json` says when it listens: one JSON object."""
        assert self._process.stdout is not None
        # a line only ends with the object or with the process, so reading cannot outlast both
        giving_up = threading.Timer(START_TIMEOUT_S, self._process.kill)
        giving_up.start()
        text = ""
        try:
            for line in self._process.stdout:
                text += line
                with contextlib.suppress(ValueError):
                    return str(json.loads(text)["url"])
        finally:
            giving_up.cancel()
        raise self._failed("the server did not start")

    def _states(self) -> Iterator[str]:
        """What is not ready yet, again and again, until everything is."""
        while time.monotonic() - self._started_at < START_TIMEOUT_S:
            if self._process.poll() is not None:
                raise self._failed("the server ended while its engines started")
            answer = httpx.get(f"{self.url}/ready", timeout=30)
            pools = answer.json()["pools"]
            if answer.status_code == 200:
                return
            failed = [f"{name}: {pool['detail']}" for name, pool in pools.items() if pool["state"] == "failed"]
            if failed:
                raise self._failed(f"an engine failed ({'; '.join(failed)})")
            yield ", ".join(f"{name} {pool['state']}" for name, pool in pools.items())
            time.sleep(POLL_S)
        raise self._failed(f"the engines were not ready in {START_TIMEOUT_S:.0f} s")

    def _failed(self, what: str) -> ServerError:
        tail = "\n".join(self._pools.log.read_text(errors="replace").splitlines()[-15:])
        return ServerError(f"{what}; the end of {self._pools.log}:\n{tail}")

    def _stop(self) -> None:
        """Lets the server end its engines itself; what is still there afterwards is killed."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def _live_line(first: str) -> Iterator[Callable[[str], None]]:
    """One line that changes on a terminal; elsewhere a line for each new thing waited for."""
    console = stderr()
    if console.is_terminal:
        with Status(first, console=console) as status:
            yield status.update
        return
    console.print(first)
    said: set[str] = set()

    def say(text: str) -> None:
        what = text.partition(": ")[2]
        if what not in said:
            said.add(what)
            console.print(text, markup=False)

    yield say
