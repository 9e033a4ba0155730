"""A server process group of our own and the HTTP connections to it, over a Unix socket that only we can open."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from cocktail_serve.engines.engine_gone import EngineGoneError
from cocktail_serve.engines.start_failures import Exit, reason_in
from cocktail_serve.engines.vllm.connections import Connections, EngineResponse
from cocktail_serve.engines.vllm.process import ProcessGroup
from cocktail_serve.errors import EngineError, EngineTimeoutError
from vllm_cocktail.replies import STATUS_PATH

logger = logging.getLogger(__name__)

_SOCKET_PREFIX = "cocktail-"
_POLL_S = 0.1
_POLL_TIMEOUT_S = 10.0
_STOP_GRACE_S = 5.0
_SHOWN_LINES = 30
"""Of a log's end, in the errors of an operator."""

Launch = Callable[[Path, str], tuple[list[str], dict[str, str]]]
"""Command line and whole environment of a server that listens on this Unix socket and is guarded by this key."""


def _engine_error(message: str, error: OSError) -> EngineError:
    is_gone = isinstance(error, ConnectionRefusedError | FileNotFoundError)
    return EngineGoneError(message) if is_gone else EngineError(message)


def sweep_sockets(run_dir: Path) -> None:
    """Removes the folders of sockets that a killed process left behind, and its notes of them in `run_dir`."""
    # those of replicas lie in folders of their own
    for link in [*run_dir.glob(f"{_SOCKET_PREFIX}*"), *run_dir.glob(f"*/{_SOCKET_PREFIX}*")]:
        if link.is_symlink():
            shutil.rmtree(link.readlink(), ignore_errors=True)
            link.unlink()


class EngineServer:
    """One life of an engine's server. Enter it to start it, leave it to end every process it started.

    Each life has a socket path of its own (a server does not unlink the one it left behind), in a folder that only this
    user can enter, and a key of its own.

    Args:
        launch: how to start the server.
        log: file for the server's output, kept over lives, bounded in size. Beside it lies a link to the folder of the
            socket, for `sweep_sockets`.
        start_timeout_s: how long the server may take until it answers through its engine.

    Attributes:
        failed_start: how the server ended, where it did before it was ready.
        warnings: what the server, once it is ready, says that it was started with and does not heed.
    """

    def __init__(self, launch: Launch, *, log: Path, start_timeout_s: float) -> None:
        self._launch = launch
        self._log = log
        self._start_timeout_s = start_timeout_s
        self.failed_start: Exit | None = None
        self.warnings: list[str] = []
        self._folder: Path | None = None
        self._group: ProcessGroup | None = None
        self._connections: Connections | None = None

    async def __aenter__(self) -> Self:
        """Starts the server and waits until it answers through its engine.

        Raises:
            EngineError: it cannot be run, exited, or came up without the plugin; carries the end of its log.
            EngineTimeoutError: it was not ready in time.
        """
        key = secrets.token_hex(32)
        try:
            # a short path: a socket's is limited to 107 bytes
            self._folder = Path(tempfile.mkdtemp(prefix=_SOCKET_PREFIX))
            # if this process is killed, its successor finds the folder by this
            (self._log.parent / self._folder.name).symlink_to(self._folder)
            socket = self._folder / "engine.sock"
            command, env = self._launch(socket, key)
            self._group = await ProcessGroup.start(command, env=env, log=self._log)
            self._connections = Connections(
                socket, headers={"authorization": f"Bearer {key}", "content-type": "application/json"}
            )
            async with asyncio.timeout(self._start_timeout_s):
                await self._until_ready(self._group)
            await self._group.remember()
        except TimeoutError as error:
            await self._end()
            raise EngineTimeoutError(
                f"the engine was not ready within start_timeout_s={self._start_timeout_s:g} s; {self._log_end()}"
            ) from error
        except OSError as error:
            await self._end()
            raise EngineError(f"cannot start the engine: {error}") from error
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._end()

    @property
    def pid(self) -> int:
        """The leader's process id."""
        return self._running_group.pid

    def last_lines(self) -> list[str]:
        """The end of what this life wrote to the log, also once it is over; empty where nothing was started."""
        return [] if self._group is None else self._group.log_tail()[-_SHOWN_LINES:]

    async def exited(self) -> str:
        """Waits until the server is gone, for whatever reason, and says how: any exit is a failure."""
        return f"{await self._exit()}; {self._log_end()}"

    async def post(self, path: str, content: bytes, *, headers: Mapping[str, str]) -> EngineResponse:
        """Sends a JSON body and returns the answer once its headers are there; an answer may take as long as it takes.

        Closing the answer before its end tells the server to abort the request.

        Args:
            headers: names in lower case.

        Raises:
            EngineError: the connection failed; an `EngineGoneError` where there was none.
        """
        try:
            return await self._running_connections.send("POST", path, content, headers=headers)
        except OSError as error:
            raise _engine_error(f"the engine did not answer: {error!r}", error) from error

    async def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any]:
        """A control request: status and parsed JSON.

        Raises:
            EngineError: the connection failed, or the answer is no JSON.
            EngineTimeoutError: no answer in time.
        """
        content = b"" if body is None else orjson.dumps(body)
        status, answer = await self._exchange(method, path, content, timeout_s=timeout_s, headers=headers or {})
        try:
            return status, orjson.loads(answer)
        except orjson.JSONDecodeError as error:
            raise EngineError(f"the engine answered {method} {path} with something that is not JSON") from error

    async def read(self, path: str, *, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of what is no JSON; raises as `call`."""
        return await self._exchange("GET", path, b"", timeout_s=timeout_s, headers={})

    async def _exchange(
        self, method: str, path: str, content: bytes, *, timeout_s: float | None, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._running_connections.send(method, path, content, headers=headers)
                with closing(answer):
                    return answer.status, await answer.read()
        except TimeoutError as error:
            raise EngineTimeoutError(f"the engine did not answer {method} {path} within {timeout_s:g} s") from error
        except OSError as error:
            raise _engine_error(f"the engine did not answer {method} {path}: {error!r}", error) from error

    async def _until_ready(self, group: ProcessGroup) -> None:
        exited = asyncio.ensure_future(group.wait())
        try:
            while True:
                await asyncio.wait({exited}, timeout=_POLL_S)
                if exited.done():
                    # no request was answered yet: what the log says of the end is nobody's text
                    self.failed_start = await self._exit()
                    why = f": {self.failed_start.reason}" if self.failed_start.reason else ""
                    raise EngineError(f"{self.failed_start}{why}; {self._log_end()}")
                if await self._is_ready():
                    return
        finally:
            exited.cancel()

    async def _is_ready(self) -> bool:
        try:
            status, body = await self.call("GET", STATUS_PATH, timeout_s=_POLL_TIMEOUT_S)
        except (EngineError, EngineTimeoutError):
            return False  # not listening yet, or still loading; an exit is seen by the caller
        if status == 200:
            self.warnings = body.get("warnings", [])
            return True
        if status == 404:
            why = "came up without the cocktail plugin: is cocktail-serve installed in the environment that runs it?"
        else:
            why = f"answered {STATUS_PATH} with {status}: {body}"
        raise EngineError(f"the engine's server {why}; {self._log_end()}")

    async def _end(self) -> None:
        # shielded, and waited for: whoever cancels us wants the processes gone, not the killing stopped half-way
        ending = asyncio.ensure_future(self._end_all())
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending
            raise

    async def _end_all(self) -> None:
        connections, self._connections = self._connections, None
        if connections is not None:
            connections.close()
        if self._group is not None:
            await self._group.kill(grace_s=_STOP_GRACE_S)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            (self._log.parent / self._folder.name).unlink(missing_ok=True)

    async def _exit(self) -> Exit:
        group = self._running_group
        returncode = await group.wait()
        return Exit(returncode, reason_in(group.log_tail()))

    def _log_end(self) -> str:
        return "\n".join([f"the end of {self._log}:", *(self.last_lines() or ["(it never started)"])])

    @property
    def _running_connections(self) -> Connections:
        if self._connections is None:
            raise EngineError("the engine's server is not running")
        return self._connections

    @property
    def _running_group(self) -> ProcessGroup:
        if self._group is None:
            raise EngineError("the engine's server is not running")
        return self._group
