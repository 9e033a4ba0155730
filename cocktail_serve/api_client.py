"""A client of the server's HTTP API: errors become ours, what the server says will pass may be waited for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from cocktail_serve.errors import (
    AuthenticationError,
    CapacityError,
    CocktailError,
    EngineError,
    EngineTimeoutError,
    InvalidRequestError,
)

if TYPE_CHECKING:
    from types import TracebackType

    import httpx

DEFAULT_SERVER = "http://127.0.0.1:8000"

CONNECT_S = 10.0
READ_S = 600.0
"""How long a server may say nothing: as long as a request may wait for its turn, and more."""

FOLLOW_S = 30.0
"""How long one call waits for a job to change."""

FINAL = frozenset({"ready", "failed", "cancelled"})


class ServerClient:
    """Calls a running server, from any thread.

    Args:
        server: its address, with `/v1` at the end or without, as OpenAI's clients take it.
        key: a tenant's; None where the server asks for none.
        patience_s: how long calls that the server has no room for are sent again.
    """

    def __init__(self, server: str, key: str | None = None, *, patience_s: float = 0.0) -> None:
        import httpx

        self.url = server.rstrip("/").removesuffix("/v1")
        self._patience_s = patience_s
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        try:
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=httpx.Timeout(READ_S, connect=CONNECT_S)
            )
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise InvalidRequestError(f"{server!r} or its key cannot be sent to a server: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def call(
        self, method: str, path: str, body: Any = None, *, params: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The JSON of an answer.

        Raises:
            ClientError: the server refuses the request, or the address is none.
            CapacityError: it has no room for it now.
            EngineError: it fails, answers no JSON object, or cannot be reached.
        """
        deadline = time.monotonic() + self._patience_s
        while True:
            with self._reaching():
                response = self._http.request(method, path, json=body, params=params)
            if response.status_code in (429, 503) and time.monotonic() < deadline:
                time.sleep(_retry_after_s(response))
                continue
            if not response.is_success:
                raise self._error(response)
            try:
                answer = response.json()
            except ValueError:
                answer = None
            if not isinstance(answer, dict):
                raise EngineError(f"{self.url} is no server of cocktails: its answer to {path} is no JSON object")
            return answer

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer, as they come.

        Raises:
            As `call`; and EngineError: the stream broke off.
        """
        with self._reaching(), self._http.stream("POST", path, json={**body, "stream": True}) as response:
            if not response.is_success:
                response.read()
                raise self._error(response)
            for line in _lines(response):
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:"):
                    continue
                if data == "[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise EngineError(f"{self.url} broke the answer off: {chunk['error']['message']}")
                yield chunk
        raise EngineError(f"{self.url} broke the answer off")

    def follow(
        self,
        cocktail: Mapping[str, Any],
        on_change: Callable[[Mapping[str, Any]], None],
        *,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """A cocktail once it is ready.

        Args:
            cocktail: as the server showed it.
            on_change: told of each change.
            timeout_s: how long that may take; None: as long as it takes.

        Raises:
            ClientError, EngineError: as its job failed, or as `call`.
            EngineTimeoutError: it is not ready by then.
        """
        started = time.monotonic()
        now = dict(cocktail)
        while now["status"] not in FINAL:
            if timeout_s is not None and time.monotonic() - started > timeout_s:
                raise EngineTimeoutError(f"the cocktail {now['id']} was not ready in {timeout_s:g} s")
            on_change(now)
            now = self.call("GET", f"/v1/cocktails/{now['id']}", params={"wait": FOLLOW_S})
        if now["status"] == "ready":
            on_change(now)
            return now
        why = now["error"] or {"message": "it was cancelled", "type": "invalid_request_error"}
        kind = InvalidRequestError if why["type"] == "invalid_request_error" else EngineError
        raise kind(f"the cocktail {now['id']} {now['status']}: {why['message']}")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise InvalidRequestError(
                f"{self.url!r} is no address of a server, such as {DEFAULT_SERVER}: {error}"
            ) from error
        except httpx.HTTPError as error:
            told = str(error) or type(error).__name__
            raise EngineError(
                f"cannot reach {self.url}: {told}; is the server running, and is this its address?"
            ) from error

    def _error(self, response: httpx.Response) -> CocktailError:
        """What an answer that is none says."""
        status = response.status_code
        try:
            told, code = response.json()["error"]["message"], response.json()["error"]["code"]
        except (ValueError, KeyError, TypeError):
            told, code = response.text[:200], None
        message = f"{self.url} answered {status}: {told}"
        if status == 401:
            return AuthenticationError(f"{message}; give the tenant's key, as COCKTAIL_API_KEY for one")
        if status in (429, 503):
            return CapacityError(message, retry_after_s=_retry_after_s(response))
        if status >= 500:
            return EngineError(message)
        return InvalidRequestError(message, code=code)


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return 1.0


def _lines(response: httpx.Response) -> Iterator[str]:
    """The whole lines of an event stream, as they come.

    Only a line feed ends one here: a model's text may hold the other characters that httpx's `iter_lines` cuts at.
    """
    rest = b""
    for part in response.iter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        yield from (line.decode() for line in whole)
