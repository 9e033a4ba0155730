"""The log: as text or as one JSON object a line, each line with the request that it is about, none with what it said.

Prompts, examples and keys stay out by three rules: messages of ours name things and never quote a request; of an
exception that nobody expected only its type and where it came from are written, since its message may quote what it
choked on; and of a request itself the line at its end has route, status, times, tokens, and tenant and model as they
are known here, never its path, body or headers.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal, TextIO

import orjson

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being served; tasks it starts, jobs among them, inherit it."""

_FIELDS = ("route", "status", "error", "tenant", "pool", "model", "tokens_in", "tokens_out", "seconds")
"""Of the line at a request's end, in their order; see `log_request`."""

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

requests = logging.getLogger("cocktail_serve.requests")


def configure(log_format: LogFormat, log_level: LogLevel = "info") -> None:
    """Sends all of the process's logging to stderr in one format.

    Args:
        log_level: the least that is written of what cocktail-serve says itself; a request's line is `info`, a probe's
            `debug`.
    """
    handler = _StderrHandler()
    handler.setFormatter(JSONFormatter() if log_format == "json" else TextFormatter())
    # by hand: dictConfig closes the handlers of other libraries too, and absl's closes the stream that it writes to
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger("uvicorn").handlers[:] = []
    logging.getLogger("uvicorn").propagate = True
    levels = {"": "WARNING", "cocktail_serve": log_level.upper(), "uvicorn": "INFO", "uvicorn.error": "INFO"}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what is standard error when a line is written: whoever calls a command may have replaced it since."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def log_request(
    *,
    route: str,
    status: int,
    seconds: float,
    error: str = "",
    tenant: str = "",
    pool: str = "",
    model: str = "",
    tokens_in: int | None = None,
    tokens_out: int | None = None,
    is_probe: bool = False,
) -> None:
    """The line at a request's end.

    Args:
        error: code of the error that the answer is, or that a stream with status 200 ended in; empty: none.
        tenant, pool, model: empty: not known, as where a key is wrong or no such model is there.
        tokens_in, tokens_out: read and generated; None: no model has read anything.
    """
    level = logging.DEBUG if is_probe else logging.INFO
    if requests.isEnabledFor(level):
        fields = {
            "route": route,
            "status": status,
            "error": error or None,
            "tenant": tenant,
            "pool": pool,
            "model": model,
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "seconds": round(seconds, 4),
        }
        requests.log(level, "request", extra={name: value for name, value in fields.items() if value is not None})


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the line at a request's end has beside its id; empty for other lines."""
    return {name: record.__dict__[name] for name in _FIELDS if name in record.__dict__}


class _Formatter(logging.Formatter):
    """Keeps the messages of exceptions out."""

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802  # logging's name
        lines: list[str] = []
        error, seen = ei[1], set[int]()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            frames = traceback.format_tb(error.__traceback__)
            lines.append("".join(frames) + type(error).__qualname__)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "\nraised from\n".join(lines)


class TextFormatter(_Formatter):
    """One line for people: time, level, where, message, what is known of a request at its end, and the request's id if
    there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        of_request = request_id.get()
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items() if value != "")
        return super().formatMessage(record) + fields + (f" [{of_request}]" if of_request else "")


class JSONFormatter(_Formatter):
    """One object a line: `time` (UTC, ISO 8601), `level`, `logger`, `message`; `request_id`, `exception` where there is
    one; and at the end of a request what `log_request` is told."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if of_request := request_id.get():
            line["request_id"] = of_request
        line |= _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()
