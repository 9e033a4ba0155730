"""An engine's server, life after life: started, watched until it is lost or hangs, ended whole, and started again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from cocktail_serve.engines.snapshot import EngineState
from cocktail_serve.engines.start_failures import REMEDY, Exit, backoff_s
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.engines.turns.base import Turns
from cocktail_serve.engines.vllm.errors import error_message
from cocktail_serve.engines.vllm.launcher import Launcher
from cocktail_serve.engines.vllm.server import EngineServer
from cocktail_serve.engines.vllm.server_mixer import ServerMixer
from cocktail_serve.errors import CocktailError, EngineError, EngineTimeoutError, ModelNotReadyError
from vllm_cocktail.replies import STATUS_PATH

logger = logging.getLogger(__name__)

STABLE_S = 60.0
"""An engine that lived this long has not failed in a row."""

MAX_FAILED_STARTS = 3
"""Starts in a row that never became ready, after which those in line are sent away. Starts go on, unless the server
gave the same reason every time, and it lies in what the server was given.

An engine that becomes ready and dies soon is another matter: who waits for it has a good chance to be served.
"""

_RENEWED_S = 0.1
"""Between two looks for whether a server that was started again is ready."""

HEARTBEAT_S = 10.0
HANG_S = 120.0
"""An engine that has not answered through its workers for so long, outside of a mix, is killed."""


class Supervisor:
    """Keeps one server alive, and gives turns on it while it is ready.

    Args:
        pool_id: names the engine in errors.
        turns: given during each life of the server.
        mixer: what a turn of another recipe begins with.
        max_model_len: the configured context length; None: known once the server was ready.
        stats: its restarts are counted here.
        name: names the engine in logs.

    Attributes:
        failure: why the last life ended; empty while the server is ready.
        failed_start_log: the last lines of a server that did not become ready, from before any request reached it.
        is_given_up: whether no other start will be tried.
        max_model_len: tokens of a context, as the server last said.
        server: the server while it is ready.
    """

    def __init__(
        self,
        pool_id: str,
        launcher: Launcher,
        turns: Turns,
        mixer: ServerMixer,
        *,
        start_timeout_s: float,
        max_model_len: int | None,
        stats: EngineStats,
        name: str,
    ) -> None:
        self.state: EngineState = "starting"
        self.failure = ""
        self.failed_start_log: Sequence[str] = ()
        self.is_given_up = False
        self.max_model_len = max_model_len
        self.server: EngineServer | None = None
        self._pool_id = pool_id
        self._name = name
        self._launcher = launcher
        self._turns = turns
        self._mixer = mixer
        self._start_timeout_s = start_timeout_s
        self._stats = stats
        self._lost: asyncio.Future[NoReturn] | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_renewed = False

    @property
    def is_started(self) -> bool:
        """Whether `start` was called; true after `stop` too."""
        return self._task is not None

    def require_server(self) -> EngineServer:
        """The server.

        Raises:
            EngineError: it is not ready now.
        """
        if self.server is None:
            raise EngineError("the engine has just gone; it is being restarted")
        return self.server

    def start(self) -> None:
        """Begins the first life in the background."""
        self._task = asyncio.create_task(self._supervise(), name=f"engine-{self._name}")

    async def stop(self) -> None:
        """Sends those in line away and ends the server. May be called twice, and before the start."""
        self.state = "stopped"
        self._turns.fail_waiting(lambda: ModelNotReadyError("the server is shutting down"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def lose(self, reason: str) -> None:
        """Ends the server's life: it is not what we think it is, or not there."""
        if self._lost is not None and not self._lost.done():
            self.state = "restarting" if self.state == "ready" else self.state
            self._lost.set_exception(EngineError(reason))

    async def renew(self) -> None:
        """Ends the server's life, begins the next at once and waits until it is ready; it counts as no loss.

        One that is down is waited for as it is, and one that was given up is started.

        Raises:
            EngineError: it did not become ready in several starts, or was stopped.
        """
        if self.is_given_up:
            self.is_given_up, self.state = False, "restarting"
            self.start()
        elif self.server is not None:
            self._is_renewed = True
            self.lose("the operator restarts it")
        while self.state in ("starting", "restarting"):  # noqa: ASYNC110  # minutes: nobody is told of each change
            await asyncio.sleep(_RENEWED_S)
        if self.state != "ready":
            raise EngineError(f"the engine of pool {self._pool_id!r} did not come back ({self.state}): {self.failure}")

    def check_available(self) -> None:
        """Says that nobody should wait for the server.

        Raises:
            ModelNotReadyError: it was stopped, or has not become ready in many starts.
            EngineError: it will not be started again; says why.
        """
        if self.is_given_up and self.state == "failed":
            raise self._given_up()
        if self.state in ("failed", "stopped"):
            raise ModelNotReadyError(f"the engine of pool {self._pool_id!r} is not available ({self.state})")

    async def _supervise(self) -> None:
        """Life after life, until cancelled or given up: whatever ends one, its processes are gone before the next."""
        loop = asyncio.get_running_loop()
        num_failures = 0
        failed_starts: list[Exit | None] = []  # the last in a row
        while True:
            ready_at: float | None = None
            server = EngineServer(
                self._launcher.command_and_env, log=self._launcher.log, start_timeout_s=self._start_timeout_s
            )
            try:
                await asyncio.to_thread(self._launcher.check_base)
                async with server:
                    ready_at = loop.time()
                    for warning in server.warnings:
                        logger.warning("%s: %s", self._name, warning)
                    await self._live(server)
            except CocktailError as error:
                self.failure = error.message
            except Exception:
                self.failure = "an error in cocktail-serve itself; see its log"
                logger.exception("%s: the engine's supervisor failed", self._name)
            if self._is_renewed:
                self._is_renewed, num_failures, failed_starts = False, 0, []
                logger.info("%s: the engine is started again", self._name)
                continue
            self.failed_start_log = () if ready_at is not None else server.last_lines()
            was_stable = ready_at is not None and loop.time() - ready_at > STABLE_S
            num_failures = 1 if was_stable else num_failures + 1
            failed_starts = [*failed_starts, server.failed_start][-MAX_FAILED_STARTS:] if ready_at is None else []
            if (hopeless := _hopeless(failed_starts)) is not None:
                self._give_up(hopeless)
                return
            pause_s = backoff_s(num_failures)
            logger.error("%s: engine lost, next start in %g s: %s", self._name, pause_s, self.failure)
            self._stats.num_restarts += 1
            self.state = "restarting"
            if len(failed_starts) == MAX_FAILED_STARTS:
                self.state = "failed"
                self._turns.fail_waiting(
                    lambda: ModelNotReadyError(f"the engine of pool {self._pool_id!r} keeps failing", retry_after_s=30)
                )
            await asyncio.sleep(pause_s)

    def _give_up(self, last: Exit) -> None:
        logger.error("%s: the engine cannot start, and is given up: %s", self._name, self.failure)
        self.is_given_up = True
        self.state = "failed"
        self.failure = f"{last.reason}; {REMEDY}"
        self._turns.fail_waiting(self._given_up)

    def _given_up(self) -> EngineError:
        return EngineError(f"the engine of pool {self._pool_id!r} cannot start: {self.failure}")

    async def _live(self, server: EngineServer) -> NoReturn:
        """One life of a server that is ready. Ends in the error that ended it."""
        _, models = await server.call("GET", "/v1/models", timeout_s=HANG_S)
        self.max_model_len = int(models["data"][0]["max_model_len"])
        self._lost = asyncio.get_running_loop().create_future()
        self.server = server
        tasks: list[asyncio.Future[NoReturn]] = [
            asyncio.create_task(self._turns.run(self._launcher.resident, partial(self._mixer.mix, server))),
            asyncio.create_task(_until_exit(server)),
            asyncio.create_task(self._until_hung(server)),
            self._lost,
        ]
        self.state, self.failure, self.failed_start_log = "ready", "", ()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await done.pop()
            raise AssertionError("what watches an engine only ends by raising")
        finally:
            if self.state == "ready":
                self.state = "restarting"
            self.server = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_hung(self, server: EngineServer) -> NoReturn:
        loop = asyncio.get_running_loop()
        answered = loop.time()
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                status, body = await server.call("GET", STATUS_PATH, timeout_s=HANG_S)
            except EngineTimeoutError:
                if not self._turns.is_mixing and loop.time() - answered > HANG_S:
                    raise
                continue
            if status != 200 or body["state"] == "poisoned":
                raise EngineError(f"the engine is lost: {status} {error_message(body)}")
            answered = loop.time()


def _hopeless(failed_starts: Sequence[Exit | None]) -> Exit | None:
    """How the last of failed starts ended, where the next will end so too."""
    last = failed_starts[-1] if failed_starts else None
    if last is None or not last.is_of_its_input:
        return None
    return last if last.is_refusal or failed_starts == [last] * MAX_FAILED_STARTS else None


async def _until_exit(server: EngineServer) -> NoReturn:
    raise EngineError(await server.exited())
