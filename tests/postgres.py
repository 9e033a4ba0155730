"""A PostgreSQL server of one's own, from the distribution's packages: no account, no port, gone when the tests are."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE_S = 60.0


class Postgres:
    """A server that listens on a Unix socket in `folder`.

    Attributes:
        user: the database's superuser.
    """

    def __init__(self, folder: Path, user: str, *, binaries: Path, runs_as: str | None) -> None:
        self.folder = folder
        self.user = user
        self._binaries = binaries
        self._runs_as = runs_as
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begins to serve; returns when it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._binaries / "postgres", "-D", self.folder / "data", "-k", self.folder),
                    *("-c", "listen_addresses=", "-c", "fsync=off"),
                ],
                user=self._runs_as,
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        _until_ready(self._binaries, self.folder, self._process)

    def stop(self) -> None:
        """Ends it at once, as a crash does: connections break, what was committed stays."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGQUIT)
            process.wait(DEADLINE_S)

    def url(self, database: str, *, driver: str = "postgresql") -> str:
        """What store.url calls a database of it."""
        return f"{driver}://{self.user}@/{database}?host={self.folder}"


def find_binaries() -> Path | None:
    """The folder of `initdb` and `postgres`: on the path, or where Debian keeps them off it. None: not installed."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@contextmanager
def running_postgres(binaries: Path) -> Iterator[Postgres]:
    """Starts a server on an empty folder and ends it with the block.

    `initdb` refuses root: then it runs as `postgres`, which the package makes, or as `nobody`.
    """
    user = _unprivileged_user() if os.geteuid() == 0 else None
    # a Unix socket's path may have 107 bytes: pytest's own folders are longer, and closed to other users
    folder = Path(tempfile.mkdtemp(prefix="cocktail-pg-", dir="/tmp"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        superuser = "cocktail"
        data = folder / "data"
        options = ["--auth=trust", f"--username={superuser}", "--encoding=UTF8", "--no-locale", "--no-sync"]
        subprocess.run(
            [binaries / "initdb", f"--pgdata={data}", *options],
            user=user,
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=DEADLINE_S,
        )
        server = Postgres(folder, superuser, binaries=binaries, runs_as=user)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _unprivileged_user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _until_ready(binaries: Path, folder: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while subprocess.run([binaries / "pg_isready", "-q", "-h", folder], check=False).returncode != 0:
        log = (folder / "log").read_text(errors="replace")
        assert server.poll() is None, f"PostgreSQL ended while it started: {log}"
        assert time.monotonic() < deadline, f"PostgreSQL was not ready in time: {log}"
        time.sleep(0.05)
