"""Runs the app on a socket: bound before anything is loaded, closed after everything has ended."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from types import FrameType
from typing import Any

import uvicorn

from cocktail_serve import logs
from cocktail_serve.config import ServerConfig, Settings
from cocktail_serve.database.database import Database
from cocktail_serve.database.registry_file import registry_url
from cocktail_serve.database.sqlite_file import NO_REGISTRY
from cocktail_serve.errors import ConfigError, ServerError, StorageError
from cocktail_serve.gateway.app import create_app
from cocktail_serve.gateway.assembly import open_pools
from cocktail_serve.gateway.lifecycle import Lifecycle
from cocktail_serve.gateway.run_dir import check_unused
from cocktail_serve.gateway.start_watch import until_all_ready
from cocktail_serve.pool import Pool

OnListening = Callable[[str], None]
"""Called once with the base URL, when the server answers; engines may still be starting, which `/ready` tells."""

OnReady = Callable[[str], object]
"""Called once with the base URL, when every engine has become ready."""

LAST_GRACE_S = 1
"""How long connections have to close once the grace is over, before what is left of answers is ended."""

KEEP_ALIVE_S = 65
"""How long an idle connection is kept. Longer than clients keep theirs (httpx 5 s, most balancers 60 s), so that it is
the client that closes, never the server while a request is on its way."""


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket on the configured address.

    Raises:
        ConfigError: the port is in use or not allowed, or the host is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"cannot resolve server.host {config.host!r}: {error.strerror}", param="server.host"
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        # lets a restart take the port over from connections of the last process that the kernel still remembers
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {_why(error)}", param="server.port"
        ) from error
    return listener


def check_start(settings: Settings) -> None:
    """Finds what would end the start later, before any model is read. Upgrades the registry where there is one.

    Raises:
        ConfigError: a port in use, a key missing.
        StorageError: the registry is damaged, another release's, or cannot be used; another server uses `cache_dir`.
    """
    bind(settings.server).close()
    settings.check_servable()
    try:
        check_unused(settings)
    except ConfigError as error:
        raise StorageError(error.message) from error
    with registry_url(settings.store) as url:
        asyncio.run(_check_registry(Database(url)))


async def _check_registry(database: Database) -> None:
    try:
        await database.open(may_make=False, is_checked=True)
    except StorageError as error:
        if error.code != NO_REGISTRY:  # one is made once the pools are known to be servable
            raise
    await database.close()


def serve(
    settings: Settings,
    *,
    pools: Mapping[str, Pool] | None = None,
    on_listening: OnListening | None = None,
    on_ready: OnReady | None = None,
) -> None:
    """Serves until a signal ends it; then open streams may finish, and engines and their processes end.

    Args:
        pools: opened already; None: opened here.

    Raises:
        As `check_start`, before any model is read.
        ClientError: a pool that cannot be opened.
        ServerError: the app did not start; the log says why.
    """
    logs.configure(settings.server.log_format, settings.server.log_level)
    if pools is None:
        check_start(settings)
    with bind(settings.server) as listener:
        lifecycle = Lifecycle()
        app = create_app(settings, pools=pools or open_pools(settings), lifecycle=lifecycle)
        config = uvicorn.Config(
            app,
            log_level="info",
            access_log=False,
            server_header=False,
            # nothing here asks where a request came from
            proxy_headers=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LAST_GRACE_S,
            log_config=None,
        )
        url = _url(settings.server.host, listener)

        async def watch_start() -> None:
            await until_all_ready(app.state.gateway.engines, url=url)
            if on_ready is not None:
                on_ready(url)

        server = _Server(
            config,
            lambda: on_listening and on_listening(url),
            watch_start,
            lifecycle=lifecycle,
            grace_s=settings.server.shutdown_grace_s,
        )
        try:
            server.run(sockets=[listener])
        finally:
            # frozen objects would outlive the interpreter, and extensions report theirs as leaks: triton, which torch
            # imports, in thirty lines
            gc.unfreeze()
        if not server.started:
            raise ServerError("the server did not start; the log above says why")


GC_ALLOCATIONS = 50_000
"""Objects allocated between two collections of the youngest. Python's 700 is about one request, and a collection in
each of them is a tenth of what it costs; requests leave few cycles behind."""


class _Server(uvicorn.Server):
    """A uvicorn server that says when it answers, and ends in two steps.

    At the first signal `/ready` turns red and nothing new begins, while the socket still listens: who asks is told to
    come again instead of being cut off. Once all answers are finished, or `grace_s` is over, uvicorn ends it; answers
    that are still open then get an error as their last event. A second signal skips the first step.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        on_started: Callable[[], object],
        watch_start: Callable[[], Coroutine[Any, Any, None]],
        *,
        lifecycle: Lifecycle,
        grace_s: float,
    ) -> None:
        super().__init__(config)
        self._on_started = on_started
        self._watch_start = watch_start
        self._watching: asyncio.Task[None] | None = None
        self._lifecycle = lifecycle
        self._grace_s = grace_s
        self._ends_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._lifecycle.is_stopping or not self.started:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)
        self._lifecycle.is_stopping = True
        self._ends_at = time.monotonic() + self._grace_s

    async def on_tick(self, counter: int) -> bool:
        is_over = self._ends_at is not None and time.monotonic() >= self._ends_at
        if self._lifecycle.is_stopping and (is_over or not self._lifecycle.num_open):
            self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            # what was imported and built so far lives as long as we do: a full collection that walked it would hold up
            # every request for a tenth of a second
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_ALLOCATIONS)
            self._on_started()
            self._watching = asyncio.create_task(self._watch_start(), name="start-watch")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await super().shutdown(sockets)


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _why(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            "the port is in use; stop what listens there, or choose another with --port or server.port (0: a free one)"
        )
    if error.errno == errno.EACCES:
        return "not allowed; ports below 1024 need privileges, choose a higher one"
    if error.errno == errno.EADDRNOTAVAIL:
        return "the address is none of this machine's"
    return str(error.strerror or error)
