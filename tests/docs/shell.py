"""A reader's shell: a home of its own, nothing on the path but the tools that the pages name, a second terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.docs.pages import ROOT

COMMAND_S = 600.0
INSTALL_S = 900.0
STOP_S = 30.0

_IN_A_SECOND_TERMINAL = """'''`cocktail-serve`; ends when what stays in the foreground, left running, answers.'''
import os, subprocess, sys, time
import httpx

words, walk, port = sys.argv[1:], os.environ["WALK"], os.environ["WALK_PORT"]
command = [sys.executable, "-m", "cocktail_serve.cli", *words]
is_demo = words[:1] == ["demo"] and "--serve" in words
if words[:1] != ["serve"] and not is_demo:
    os.execv(sys.executable, command)
subprocess.run([f"{walk}/bin/stop-server"], check=True)
with open(f"{walk}/server.log", "wb") as log:
    server = subprocess.Popen(
        [*command, "--port", port], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
    )
with open(f"{walk}/server.pid", "w") as file:
    file.write(str(server.pid))
end = time.monotonic() + 540
while server.poll() is None and time.monotonic() < end:
    time.sleep(0.2)
    log = open(f"{walk}/server.log", errors="replace").read()
    try:
        if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200 and (not is_demo or "; Ctrl-C ends" in log):
            print(log)
            sys.exit()
    except httpx.TransportError:
        pass
sys.exit("it did not become ready:\\n" + open(f"{walk}/server.log", errors="replace").read()[-5000:])
"""

_STOP = """#!/bin/bash
# ends the server of the second terminal, as Ctrl-C does, and waits until it has
pid=$(cat "$WALK/server.pid" 2>/dev/null) || exit 0
kill -INT "$pid" 2>/dev/null
while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
rm -f "$WALK/server.pid"
"""

_CURL = """#!/bin/bash
# an answer that is an error is one
exec /usr/bin/env -i PATH=/usr/local/bin:/usr/bin:/bin curl --fail-with-body --show-error "$@"
"""


def install(folder: Path) -> Path:
    """A virtual environment in an empty folder, made as a reader's first command makes it, in a home of its own."""
    environment, home = folder / "environment", folder / "home"
    home.mkdir()
    command = ["make", "install", f"VENV={environment}", f"PYTHON={sys.executable}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "HOME": str(home)}, check=True, timeout=INSTALL_S)
    return environment


class Shell:
    """One bash for the commands of a journey, in the folder of a checkout.

    Args:
        folder: empty; the checkout is linked into it, so that what commands write is not written into the checkout.
        environment: a virtual environment, as `install` makes one.
    """

    def __init__(self, folder: Path, environment: Path) -> None:
        python = environment / "bin" / "python"
        self.folder = folder / "checkout"
        self.walk = folder / "walk"
        home, binaries = folder / "home", self.walk / "bin"
        for each in (self.folder, home, binaries):
            each.mkdir(parents=True)
        for path in ROOT.iterdir():
            if path.name not in (".git", ".venv", "dist"):
                (self.folder / path.name).symlink_to(path)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        for name, text in (
            ("cocktail-serve", f"#!{python}\n{_IN_A_SECOND_TERMINAL}"),
            ("stop-server", _STOP),
            ("curl", _CURL),
            *((name, f'#!/bin/bash\nexec {python} "$@"\n') for name in ("python", "python3")),
        ):
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
        virtual = self.folder / ".venv"  # as `make install` leaves it
        (virtual / "bin").mkdir(parents=True)
        for name in ("cocktail-serve", "python", "python3"):
            (virtual / "bin" / name).symlink_to(binaries / name)
        (virtual / ".installed").touch()
        self.environment = {
            "HOME": str(home),
            "PATH": f"{binaries}:/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "passive",
            "WALK": str(self.walk),
            "WALK_PORT": str(self.port),
            "COCKTAIL_BASE_URL": f"http://127.0.0.1:{self.port}",  # of commands that name no server
        }

    def __enter__(self) -> Self:
        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=self.environment,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pid = self.walk / "server.pid"
        if pid.exists():
            try:
                subprocess.run([self.walk / "bin" / "stop-server"], env=self.environment, timeout=STOP_S, check=False)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):  # of a server without a group of its own
                    os.killpg(int(pid.read_text()), signal.SIGKILL)
        self._kill()
        with contextlib.suppress(BrokenPipeError):
            self._bash.communicate()  # waits, and closes its pipes

    def run(self, command: str, *, timeout_s: float = COMMAND_S) -> tuple[int, str]:
        """Types a command; its exit status, and what it printed on both streams."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        mark = "end-of-command"
        giving_up = threading.Timer(timeout_s, self._kill)
        giving_up.start()
        printed = []
        try:
            self._bash.stdin.write(f"{command}\nprintf '\\n%s %s\\n' {mark} $?\n")
            self._bash.stdin.flush()
            for line in self._bash.stdout:
                if line.startswith(f"{mark} "):
                    return int(line.split()[1]), "".join(printed)
                printed.append(line)
        finally:
            giving_up.cancel()
        return -1, "".join(printed)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGKILL)
