"""Lines of the log: their fields, their request, and what is not in them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from cocktail_serve import logs

SECRET = "the prompt of somebody"


def line_of(formatter: logging.Formatter, *, fails: bool = False, **extra: object) -> str:
    error = None
    if fails:
        try:
            try:
                {}[SECRET]
            except KeyError as inner:
                raise ValueError(SECRET) from inner
        except ValueError as outer:
            error = (type(outer), outer, outer.__traceback__)
    record = logging.getLogger("cocktail_serve.test").makeRecord(
        "cocktail_serve.test", logging.ERROR, __file__, 1, "it failed: %s", ("a reason",), error, extra=extra
    )
    return formatter.format(record)


@pytest.fixture
def of_request() -> str:
    logs.request_id.set("req_1")
    return "req_1"


def test_json_lines(of_request: str) -> None:
    line = json.loads(line_of(logs.JSONFormatter(), route="/v1/models", status=200, pool="", seconds=0.1))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "error",
        "logger": "cocktail_serve.test",
        "message": "it failed: a reason",
        "request_id": of_request,
        "route": "/v1/models",
        "status": 200,
        "pool": "",
        "seconds": 0.1,
    }


def test_text_lines_name_the_request(of_request: str) -> None:
    assert line_of(logs.TextFormatter()).endswith(f"ERROR cocktail_serve.test: it failed: a reason [{of_request}]")


def test_a_text_line_has_what_is_known_of_a_request(of_request: str) -> None:
    line = line_of(logs.TextFormatter(), route="/v1/models", status=200, pool="", tenant="acme", seconds=0.1)
    assert line.endswith("it failed: a reason route=/v1/models status=200 tenant=acme seconds=0.1 [req_1]")


@pytest.fixture
def restored() -> Iterator[None]:
    """Levels of loggers, which `configure` sets for the process."""
    before = {name: logging.getLogger(name).level for name in ("", "cocktail_serve", "uvicorn", "uvicorn.error")}
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(
    ("log_level", "told"), [("debug", ["/health", "/v1/models"]), ("info", ["/v1/models"]), ("warning", [])]
)
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_line_for_each_request_and_for_probes_where_asked(
    log_format: logs.LogFormat,
    log_level: logs.LogLevel,
    told: list[str],
    restored: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure(log_format, log_level)
    logs.log_request(route="/health", status=200, seconds=0.1, is_probe=True)
    logs.log_request(route="/v1/models", status=200, seconds=0.1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(told)
    assert all(route in line for route, line in zip(told, lines, strict=True))
    assert not any("tokens_in" in line for line in lines)  # no model has read anything


def test_handlers_of_other_libraries_are_not_closed(restored: None) -> None:
    """absl's, which rouge-score brings, closes its stream when it is closed: standard error itself."""
    closed: list[bool] = []

    class Foreign(logging.StreamHandler):  # type: ignore[type-arg]
        def close(self) -> None:
            closed.append(True)

    foreign = Foreign()
    logging.getLogger().addHandler(foreign)
    logs.configure("text")
    assert (closed, foreign in logging.getLogger().handlers) == ([], False)


@pytest.mark.parametrize("formatter", [logs.JSONFormatter(), logs.TextFormatter()], ids=["json", "text"])
def test_an_exception_is_told_by_type_and_place_and_not_by_what_it_says(formatter: logging.Formatter) -> None:
    line = line_of(formatter, fails=True)
    assert SECRET not in line
    assert "ValueError" in line
    assert "raised from" in line
    assert "KeyError" in line
    assert "test_logs.py" in line
    assert line.count("\n") == (0 if isinstance(formatter, logs.JSONFormatter) else line.count("\n"))
