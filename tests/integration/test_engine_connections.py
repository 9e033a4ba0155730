"""HTTP over a Unix socket, against servers that answer byte by byte what a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from cocktail_serve.engines.vllm import connections
from cocktail_serve.engines.vllm.connections import MAX_BUFFERED_BYTES, Connections

DEADLINE_S = 20.0

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Counts connections and keeps what was sent to it.

    Attributes:
        asked: set by the first request.
        gone: released by each client's end of a connection.
    """

    def __init__(self) -> None:
        self.num_connections = 0
        self.requests: list[bytes] = []
        self.asked = asyncio.Event()
        self.gone = asyncio.Semaphore(0)
        self.handlers: set[asyncio.Task[None]] = set()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(length))
        self.asked.set()
        return self.requests[-1]

    async def until_gone(self, reader: asyncio.StreamReader) -> None:
        await reader.read()
        self.gone.release()


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, server: Server, serve: Serve) -> AsyncIterator[Connections]:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        server.handlers.add(task)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            await serve(reader, writer)

    listening = await asyncio.start_unix_server(connected, str(tmp_path / "s"))
    pool = Connections(tmp_path / "s", headers={"authorization": "Bearer key"})
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield pool
    finally:
        pool.close()
        listening.close()
        await asyncio.wait_for(asyncio.gather(*server.handlers), DEADLINE_S)


def answering(server: Server, *answers: bytes) -> Serve:
    """One answer after the other on each connection, then nothing more."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await server.request(reader)
            writer.write(answer)
        await server.until_gone(reader)

    return serve


async def body_of(pool: Connections, body: bytes = b"") -> bytes:
    return await (await pool.send("POST", "/x", body, headers={})).read()


async def test_a_connection_is_not_used_again_after_an_error_of_the_servers(tmp_path: Path) -> None:
    """A server of uvicorn's closes it once the answer is out: what is sent meanwhile is lost."""
    server = Server()
    broken = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\nno"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await server.request(reader)
        writer.write(broken if request.endswith(b"break") else OK)
        if not request.endswith(b"break"):
            await server.until_gone(reader)

    async with serving(tmp_path, server, serve) as pool:
        assert await body_of(pool, b"break") == b"no"
        assert await body_of(pool) == b"ok"
        assert server.num_connections == 2


async def test_what_is_sent(tmp_path: Path) -> None:
    server = Server()
    async with serving(tmp_path, server, answering(server, OK)) as pool:
        answer = await pool.send("POST", "/v1/x?y=1", b'{"a":1}', headers={"x-recipe": "r", "authorization": "other"})
        assert await answer.read() == b"ok"
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"POST /v1/x?y=1 HTTP/1.1",
        b"host: engine",
        b"authorization: other",
        b"x-recipe: r",
        b"content-length: 7",
    ]
    assert body == b'{"a":1}'


async def test_what_comes_back(tmp_path: Path) -> None:
    content = (
        b"HTTP/1.1 409 Conflict\r\nX-Recipe: a\r\nx-recipe: b\r\nContent-Type: Text/Plain\r\ncontent-length: 0\r\n\r\n"
    )
    server = Server()
    async with serving(tmp_path, server, answering(server, content)) as pool:
        answer = await pool.send("GET", "/x", headers={})
        assert answer.status == 409
        assert answer.headers == {"x-recipe": "a,b", "content-type": "Text/Plain", "content-length": "0"}
        assert await answer.read() == b""


async def test_a_connection_is_used_again(tmp_path: Path) -> None:
    server = Server()
    chunked = CHUNKED + b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n"
    async with serving(tmp_path, server, answering(server, OK, chunked, OK)) as pool:
        assert [await body_of(pool) for _ in range(3)] == [b"ok", b"abcde", b"ok"]
    assert server.num_connections == 1


async def test_requests_at_a_time_have_connections_of_their_own(tmp_path: Path) -> None:
    server = Server()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            body = (await server.request(reader)).partition(b"\r\n\r\n")[2]
            await asyncio.sleep(0.01)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async with serving(tmp_path, server, echo) as pool:
        for _ in range(3):
            bodies = [b"%d" % number for number in range(8)]
            assert await asyncio.gather(*(body_of(pool, body) for body in bodies)) == bodies
    assert server.num_connections == 8


async def test_an_old_connection_is_not_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    async with serving(tmp_path, server, answering(server, OK)) as pool:
        await asyncio.gather(body_of(pool), body_of(pool))
        monkeypatch.setattr(connections, "KEEP_ALIVE_S", 0.0)
        assert await body_of(pool) == b"ok"
        assert server.num_connections == 3
        for _ in range(2):
            await server.gone.acquire()


@pytest.mark.parametrize("how", ["says so", "just does"])
async def test_a_server_that_closes_is_connected_to_anew(tmp_path: Path, how: str) -> None:
    server = Server()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") if how == "says so" else OK)
        if how == "says so":
            await server.until_gone(reader)

    async with serving(tmp_path, server, serve) as pool:
        for _ in range(3):
            assert await body_of(pool) == b"ok"
            await asyncio.sleep(0.05)
    assert server.num_connections == 3


async def test_a_stream_comes_as_it_is_sent(tmp_path: Path) -> None:
    server, go = Server(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(CHUNKED + b"1\r\na\r\n")
        await go.wait()
        writer.write(b"1\r\nb\r\n0\r\n\r\n")
        await server.until_gone(reader)

    async with serving(tmp_path, server, serve) as pool:
        parts = aiter(await pool.send("GET", "/x", headers={}))
        assert await anext(parts) == b"a"
        go.set()
        assert [part async for part in parts] == [b"b"]


async def test_a_server_waits_for_who_does_not_read(tmp_path: Path) -> None:
    size = 20 * MAX_BUFFERED_BYTES
    server, num_sent = Server(), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_sent
        await server.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while num_sent < size:
            writer.write(b"x" * 2**16)
            await writer.drain()
            num_sent += 2**16
        assert (await server.request(reader)).startswith(b"GET /again")
        writer.write(OK)
        await server.until_gone(reader)

    async with serving(tmp_path, server, serve) as pool:
        answer = await pool.send("GET", "/x", headers={})
        seen = -1
        while num_sent != seen:
            seen = num_sent
            await asyncio.sleep(0.1)
        assert 0 < num_sent < size / 2
        assert len(await answer.read()) == size
        assert await (await pool.send("GET", "/again", headers={})).read() == b"ok"
    assert server.num_connections == 1


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"SSH-2.0-OpenSSH_9.6\r\n\r\n"])
async def test_a_server_that_ends_before_its_headers(tmp_path: Path, sent: bytes) -> None:
    server = Server()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(sent)

    async with serving(tmp_path, server, serve) as pool:
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await pool.send("POST", "/x", headers={})
    assert server.num_connections == 2


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab",
        CHUNKED + b"2\r\nab\r\n",
        CHUNKED + b"2\r\nab\r\nno number\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nab",
    ],
    ids=["short", "cut", "garbled", "without length"],
)
async def test_what_came_before_a_break_is_read_first(tmp_path: Path, start: bytes) -> None:
    server = Server()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(start)

    async with serving(tmp_path, server, serve) as pool:
        answer = await pool.send("GET", "/x", headers={})
        parts = aiter(answer)
        assert await anext(parts) == b"ab"
        with pytest.raises(ConnectionError):
            await anext(parts)
        with pytest.raises(ConnectionError):
            await answer.read()


async def test_an_answer_that_is_closed_ends_its_connection(tmp_path: Path) -> None:
    server = Server()
    async with serving(tmp_path, server, answering(server, CHUNKED + b"1\r\na\r\n")) as pool:
        answer = await pool.send("GET", "/x", headers={})
        waiting = asyncio.create_task(answer.read())
        await asyncio.sleep(0.05)
        answer.close()
        answer.close()
        with pytest.raises(ConnectionAbortedError):
            await waiting
        await server.gone.acquire()


async def test_closing_what_has_come_whole_keeps_the_connection(tmp_path: Path) -> None:
    server = Server()
    async with serving(tmp_path, server, answering(server, OK, OK)) as pool:
        answer = await pool.send("GET", "/x", headers={})
        while not answer._is_complete:
            await answer._change()
        answer.close()
        assert await answer.read() == b"ok"
        assert await body_of(pool) == b"ok"
    assert server.num_connections == 1


async def test_a_cancelled_request_ends_its_connection(tmp_path: Path) -> None:
    server = Server()
    async with serving(tmp_path, server, answering(server, b"")) as pool:
        sending = asyncio.create_task(pool.send("GET", "/x", headers={}))
        await server.asked.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await server.gone.acquire()


async def test_an_answer_before_the_whole_request_ends_the_connection(tmp_path: Path) -> None:
    server = Server()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await writer.drain()
        await asyncio.sleep(0.05)

    async with serving(tmp_path, server, serve) as pool:
        for _ in range(2):
            assert await body_of(pool, b"x" * 2**24) == b"ok"
    assert server.num_connections == 2


async def test_an_answer_that_nobody_asked_for(tmp_path: Path) -> None:
    server = Server()
    async with serving(tmp_path, server, answering(server, OK + OK.replace(b"ok", b"no"))) as pool:
        assert await body_of(pool) == b"ok"
        await asyncio.sleep(0.05)
        assert await body_of(pool) == b"ok"
    assert server.num_connections == 2


async def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await Connections(tmp_path / "none", headers={}).send("GET", "/x", headers={})


async def test_closing_ends_all(tmp_path: Path) -> None:
    server = Server()
    async with serving(tmp_path, server, answering(server, CHUNKED)) as pool:
        answer = await pool.send("GET", "/x", headers={})
        pool.close()
        with pytest.raises(ConnectionError):
            await answer.read()
        await server.gone.acquire()
        with pytest.raises(ConnectionError):
            await pool.send("GET", "/x", headers={})
