"""HTTP to one server over its Unix socket: as much of it as an engine's server speaks, and little per request.

A general client costs a quarter of what the gateway adds to a request. Here a connection carries one request at a
time and is kept for the next one; answers come by length or in chunks. No redirects, cookies, encodings or retries.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import cast

import httptools

KEEP_ALIVE_S = 2.0
"""How long an unused connection is used again. Less than the 5 s after which the server closes it: a request on one
that it is just closing would fail, and completions are not sent twice."""

MAX_BUFFERED_BYTES = 2**18
"""What is kept of an answer that nobody reads; beyond it the server has to wait."""


class EngineResponse:
    """An answer while it comes in. Read it to its end or close it.

    Attributes:
        status: 0 until the headers are there.
        headers: by lower-case name; several of one name are joined by commas.
    """

    __slots__ = ("_connection", "_error", "_is_complete", "_num_buffered", "_parts", "_waiter", "headers", "status")

    def __init__(self, connection: _Connection) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._connection: _Connection | None = connection
        self._parts: list[bytes] = []
        self._num_buffered = 0
        self._is_complete = False
        self._error: OSError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """The rest of the body.

        Raises:
            ConnectionError: it broke off, or was closed.
        """
        return b"".join([part async for part in self])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body as it comes, in parts of any size; raises as `read`."""
        while True:
            if self._parts:
                yield self._take()
            elif self._is_complete:
                return
            else:
                await self._change()

    def close(self) -> None:
        """Gives up what was not read: the connection ends, which tells the server to abort the request.

        Does nothing once the whole answer has come. May be called twice.
        """
        connection = self._connection
        if connection is not None:
            self._parts.clear()
            self._fail(ConnectionAbortedError("the answer was closed before its end"))
            connection.abort()

    async def _until_headers(self) -> None:
        while not self.status:
            await self._change()

    async def _change(self) -> None:
        """Returns when something has come."""
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _take(self) -> bytes:
        taken = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._num_buffered = 0
        if self._connection is not None:
            self._connection.resume()
        return taken

    def _add(self, part: bytes) -> None:
        self._parts.append(part)
        self._num_buffered += len(part)
        self._wake()

    def _complete(self) -> None:
        self._is_complete = True
        self._connection = None
        self._wake()

    def _fail(self, error: OSError) -> None:
        self._error = self._error or error
        self._connection = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One connection; what the parser reads goes to the one answer that is expected."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: EngineResponse | None = None
        self._is_paused = False
        self.idle_since = 0.0

    def request(self, head: bytes, body: bytes) -> EngineResponse:
        """Sends a request; the answer's headers are yet to come."""
        assert self._transport is not None
        answer = self._answer = EngineResponse(self)
        self._transport.writelines((head, body))
        return answer

    def resume(self) -> None:
        """Lets the server go on."""
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(ConnectionError(f"the server sent what cannot be read as HTTP: {error!r}"))
            return
        answer = self._answer
        if answer is not None and answer._num_buffered > MAX_BUFFERED_BYTES and not self._is_paused:
            assert self._transport is not None
            self._is_paused = True
            self._transport.pause_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._connections._remove(self)
        self._break(ConnectionResetError(f"the server closed the connection before its answer was complete: {error!r}"))

    def on_message_begin(self) -> None:
        if self._answer is None:
            self.abort()  # it answers what nobody asked

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is not None:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            headers = self._answer.headers
            headers[key] = f"{headers[key]},{text}" if key in headers else text

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()
            self._answer._wake()

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._answer._add(body)

    def on_message_complete(self) -> None:
        answer, self._answer = self._answer, None
        if answer is None:
            return
        answer._complete()
        transport = self._transport
        assert transport is not None
        # after an error of its own the server closes the connection, whatever its headers say: the next request on it
        # might be a mix, which would be lost, and the engine with it
        is_kept = self._parser.should_keep_alive() and answer.status < 500
        # an answer that came before the whole request had left: what is left would be read as the next one
        if is_kept and not transport.get_write_buffer_size() and not transport.is_closing():
            self.resume()
            self._connections._keep(self)
        else:
            self.abort()

    def _break(self, error: OSError) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer._fail(error)
        self.abort()


class Connections:
    """All connections to one server. Lives on one event loop.

    Args:
        socket: the server's Unix socket.
        headers: sent with every request.
    """

    def __init__(self, socket: Path, *, headers: Mapping[str, str]) -> None:
        self._socket = socket
        self._headers = {"host": "engine", **headers}
        self._open: set[_Connection] = set()
        self._idle: dict[_Connection, None] = {}
        self._is_closed = False

    async def send(self, method: str, path: str, body: bytes = b"", *, headers: Mapping[str, str]) -> EngineResponse:
        """Sends a request and returns the answer once its headers are there.

        Args:
            headers: beside those of every request, and in their place; names in lower case.

        Raises:
            OSError: the server cannot be reached, or the connection broke.
        """
        lines = [f"{name}: {value}" for name, value in (self._headers | dict(headers)).items()]
        head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, f"content-length: {len(body)}", "", ""]).encode()
        connection = self._take_idle() or await self._connect()
        answer = connection.request(head, body)
        try:
            await answer._until_headers()
        except BaseException:
            answer.close()
            raise
        return answer

    def close(self) -> None:
        """Ends all connections, and the answers on them. May be called twice."""
        self._is_closed = True
        for connection in list(self._open):
            connection.abort()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if not self._is_closed:
            _, connection = await loop.create_unix_connection(lambda: _Connection(self), str(self._socket))
            self._open.add(connection)
            if not self._is_closed:
                return connection
            connection.abort()
        raise ConnectionAbortedError("the connections to the server were closed")

    def _take_idle(self) -> _Connection | None:
        """The connection that was used last, so that a burst's others grow old and go."""
        if not self._idle:
            return None
        connection, _ = self._idle.popitem()
        if asyncio.get_running_loop().time() - connection.idle_since < KEEP_ALIVE_S:
            return connection
        for old in [connection, *self._idle]:
            old.abort()
        self._idle.clear()
        return None

    def _keep(self, connection: _Connection) -> None:
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle[connection] = None

    def _remove(self, connection: _Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)
