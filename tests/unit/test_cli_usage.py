"""`usage` on the store's file: tables, CSV and JSON."""

from __future__ import annotations

import asyncio
import csv
import io
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from cocktail_serve.cli import usage
from cocktail_serve.database.database import Database
from cocktail_serve.usage.amounts import UsageAmount
from cocktail_serve.usage.ledger import Ledger
from cocktail_serve.usage.store import UsageStore
from tests.command_line import answer, exit_code, refusal, write_config

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
RANGE = ("--start", "2026-03-01", "--end", "2026-03-31")


@pytest.fixture
def config(tmp_path: Path, empty_registry: Path) -> Path:
    url = f"sqlite:///{shutil.copy(empty_registry, tmp_path)}"

    async def fill() -> None:
        database = Database(url)
        await database.open()
        ledger = Ledger(UsageStore(database), clock=lambda: NOW)
        for tenant, key_id, num_out in (("acme", "k1", 3), ("acme", "k2", 4), ("other", None, 5)):
            ledger.add(
                tenant, key_id, "films@1a2b3c4d", "flan", UsageAmount(requests=1, tokens_in=1000, tokens_out=num_out)
            )
        await ledger.stop()
        await database.close()

    asyncio.run(fill())
    return write_config(tmp_path, store={"url": url})


def test_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "usage", "--config", config, *RANGE)["data"]
    assert [(row["day"], row["tenant"], row["requests"], row["tokens_out"]) for row in rows] == [
        ("2026-03-01", "acme", 2, 7),
        ("2026-03-01", "other", 1, 5),
    ]


def test_csv(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("usage", "--config", config, *RANGE, "--csv", "--group-by", "key,model", "--tenant", "acme") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["key"], row["model"], row["tokens_in"], row["tokens_out"]) for row in rows] == [
        ("k1", "films@1a2b3c4d", "1000", "3"),
        ("k2", "films@1a2b3c4d", "1000", "4"),
    ]


def test_a_table(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("usage", "--config", config, *RANGE) == 0
    out = capsys.readouterr().out
    assert "acme" in out
    assert "2,000" in out


@pytest.mark.parametrize("group_by", ["day,tenant", "day,tenant,key,model,pool"])
def test_a_narrow_terminal_cuts_nothing(config: Path, group_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(usage, "stdout", lambda: console)
    assert exit_code("usage", "--config", config, *RANGE, "--group-by", group_by) == 0
    lines = screen.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    if group_by == "day,tenant":
        assert lines[1].split() == ["2026-03-01", "acme", "2", "2,000", "7", "0.0", "0.0"]
    else:
        assert lines[:2] == [
            "2026-03-01  acme  k1  films@1a2b3c4d  flan",
            "    requests 1  tokens_in 1,000  tokens_out 3  scoring_s 0.0  mixing_s 0.0",
        ]


def test_a_pipe_gets_whole_lines(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("usage", "--config", config, *RANGE, "--group-by", "day,tenant,key,model,pool") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "day tenant key model pool requests tokens_in tokens_out scoring_s mixing_s".split()
    assert lines[1][:6] == ["2026-03-01", "acme", "k1", "films@1a2b3c4d", "flan", "1"]


def test_other_days(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "usage", "--config", config, "--end", "2026-02-28")["data"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--group-by", "colour"), "--group-by: 'colour' is none of day, tenant, key, model, pool"),
        (("--csv", "--json"), "give one of --csv and --json"),
        (("--start", "2026-04-01", "--end", "2026-03-01"), "start 2026-04-01 comes after end 2026-03-01"),
    ],
)
def test_wrong_usage_exits_2_and_says_why(
    config: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert message in refusal(capsys, "usage", "--config", config, *words)
