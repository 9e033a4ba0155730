"""Gateways as processes of their own, to be killed, stopped and started again; each life starts in about a second.

They are forked from a server that has imported everything, so each is a real process with real engines below it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from bench.server import free_port
from cocktail_serve.config import Settings
from cocktail_serve.database.database import Database
from cocktail_serve.engines.vllm.server import EngineServer
from cocktail_serve.gateway.app import create_app
from tests.fakes import make_fake_pool
from tests.processes import is_alive

DEADLINE_S = 60.0
ADMIN_KEY = "operator"

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload([__name__, "tests.gateway_imports"])


@dataclass(frozen=True)
class Strike:
    """The moment at which a gateway kills itself, once the file `armed` is in its folder.

    Attributes:
        at: `commit`: a transaction of the store; `engine`: a mix or a scoring.
        number: which of them, from 1.
        when: before it is done, or after it is and before anybody hears of it.
    """

    at: Literal["commit", "engine"]
    number: int
    when: Literal["before", "after"]


class GatewayProcess:
    """One gateway with a pool `flan` on the fake engine, over all its lives.

    Args:
        folder: its cache_dir, log and fault files.
        store: what its configuration says of the store.
        engine: what it says of the engine, besides `args`.
        args: of the fake engine.
    """

    def __init__(
        self,
        folder: Path,
        *,
        store: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.cache_dir = folder / "cache"
        self.faults = folder / "faults"
        self.faults.mkdir(parents=True, exist_ok=True)
        (folder / "decoder").mkdir(exist_ok=True)
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.settings = {
            "admin_key": ADMIN_KEY,
            "store": {"cache_dir": str(self.cache_dir), **(store or {})},
            "pools": [
                {
                    "id": "flan",
                    "kind": "decoder",
                    "base": str(folder / "decoder"),
                    "experts": {name: str(folder / "decoder") for name in ("ag-news", "nq")},
                    "engine": {
                        "type": "fake",
                        "max_model_len": 100_000,
                        "slice_s": 0.05,
                        "args": {"faults": str(self.faults), **(args or {})},
                        **(engine or {}),
                    },
                }
            ],
        }
        self._process: ForkServerProcess | None = None
        self.http = httpx.Client(base_url=self.url, timeout=DEADLINE_S)

    @property
    def pid(self) -> int:
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    def start(self, *, strike: Strike | None = None) -> None:
        """Begins a life; returns when its engine is ready."""
        (self.folder / "armed").unlink(missing_ok=True)
        self._process = _forkserver.Process(target=_live, args=(self, strike), daemon=True)
        self._process.start()
        self.until(lambda: self.http.get("/ready").status_code == 200, "a ready engine")

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends this life as `kill -9` does, or another signal, and waits for its end."""
        assert self._process is not None
        os.kill(self.pid, number)
        self.join()

    def join(self) -> None:
        """Waits for this life to end by itself."""
        assert self._process is not None
        self._process.join(DEADLINE_S)
        assert not self._process.is_alive(), "the gateway did not end"

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def engine(self) -> dict[str, Any]:
        """What the operator is told of its engine."""
        answer = self.http.get("/admin/engines/flan", headers={"authorization": f"Bearer {ADMIN_KEY}"})
        answer.raise_for_status()
        told: dict[str, Any] = answer.json()
        return told

    def below(self) -> list[psutil.Process]:
        """Every process that it has started."""
        return psutil.Process(self.pid).children(recursive=True)

    def until(self, condition: Any, what: str, *, timeout_s: float = DEADLINE_S) -> None:
        """Waits for something, asking again while the connection fails."""
        deadline = time.monotonic() + timeout_s
        while True:
            assert self.is_alive, f"the gateway ended before {what}: {self.log()}"
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, f"{what} did not happen in time: {self.log()}"
            time.sleep(0.02)

    def arm(self) -> None:
        """From here on a `Strike` counts."""
        (self.folder / "armed").touch()

    def log(self) -> str:
        return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-40:])

    def close(self) -> None:
        self.http.close()
        if self.is_alive:
            self.kill()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "settings": self.settings, "_port": self._port}


@contextmanager
def gateway_process(folder: Path, **options: Any) -> Iterator[GatewayProcess]:
    """A gateway that is not started yet; what of it still lives at the end of the block is killed."""
    gateway = GatewayProcess(folder, **options)
    try:
        yield gateway
    finally:
        gateway.close()


def until_gone(processes: list[psutil.Process], *, timeout_s: float = 10.0) -> list[psutil.Process]:
    """Those that are still alive after that time."""
    deadline = time.monotonic() + timeout_s
    while (alive := [process for process in processes if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def _live(gateway: GatewayProcess, strike: Strike | None) -> None:
    """In the new process."""
    import uvicorn

    with (gateway.folder / "log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if strike is not None:
        _prepare(strike, gateway.folder / "armed")
    settings = Settings.model_validate(gateway.settings)
    app = create_app(settings, pools={"flan": make_fake_pool(gateway.folder / "decoder")})
    uvicorn.run(app, host="127.0.0.1", port=gateway._port, log_level="warning", lifespan="on")


def _prepare(strike: Strike, armed: Path) -> None:
    numbers = itertools.count(1)
    is_armed = armed.exists
    write, call = Database.write, EngineServer.call

    def strikes(when: str, number: int) -> None:
        if (number, when) == (strike.number, strike.when):
            os.kill(os.getpid(), signal.SIGKILL)

    @asynccontextmanager
    async def struck_write(self: Database) -> AsyncIterator[Any]:
        number = 0
        async with write(self) as connection:
            yield connection
            if is_armed():
                number = next(numbers)
            strikes("before", number)
        strikes("after", number)

    async def struck_call(self: EngineServer, method: str, path: str, *args: Any, **options: Any) -> Any:
        number = next(numbers) if is_armed() and path.endswith(("/mix", "/score")) else 0
        strikes("before", number)
        answer = await call(self, method, path, *args, **options)
        strikes("after", number)
        return answer

    if strike.at == "commit":
        Database.write = struck_write  # type: ignore[method-assign]
    else:
        EngineServer.call = struck_call  # type: ignore[method-assign]
