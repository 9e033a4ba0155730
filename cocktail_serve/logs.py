"""The log: as text or as one JSON object a line, each line with the request that it is about, none with what it said.

Prompts, examples and keys stay out by three rules: messages of ours name things and never quote a request; of an
exception that nobody expected only its type and where it came from are written, since its message may quote what it
choked on; and of a request itself the line at its end has route, status and times, never its path, body or headers.
"""

from __future__ import annotations

import logging
import logging.config
import time
import traceback
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal

import orjson

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being served; tasks it starts, jobs among them, inherit it."""

_FIELDS = ("route", "status", "pool", "seconds")
"""What the line at a request's end has beside its id; see `log_request`."""

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

requests = logging.getLogger("cocktail_serve.requests")


def configure(log_format: LogFormat) -> None:
    """Sends all of the process's logging to stderr in one format; requests get a line each in JSON only."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"ours": {"()": JSONFormatter if log_format == "json" else TextFormatter}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "ours"}},
            "root": {"level": "WARNING", "handlers": ["stderr"]},
            "loggers": {
                "cocktail_serve": {"level": "INFO"},
                "cocktail_serve.requests": {"level": "INFO" if log_format == "json" else "WARNING"},
                "uvicorn": {"level": "INFO", "handlers": [], "propagate": True},
                "uvicorn.error": {"level": "INFO"},
            },
        }
    )


def log_request(*, route: str, status: int, pool: str, seconds: float) -> None:
    """The line at a request's end."""
    if requests.isEnabledFor(logging.INFO):
        fields = {"route": route, "status": status, "pool": pool, "seconds": round(seconds, 4)}
        requests.info("request", extra=fields)


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
    """One line for people: time, level, where, message, and the request's id if there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        of_request = request_id.get()
        return super().formatMessage(record) + (f" [{of_request}]" if of_request else "")


class JSONFormatter(_Formatter):
    """One object a line: `time` (UTC, ISO 8601), `level`, `logger`, `message`; `request_id`, `exception` where there is
    one; and at the end of a request `route`, `status`, `pool`, `seconds`."""

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
        line |= {name: record.__dict__[name] for name in _FIELDS if name in record.__dict__}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()
