"""`usage` on the store's file: tables, CSV and JSON."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from cocktail_serve import cli
from cocktail_serve.database.database import Database
from cocktail_serve.usage.account import Use
from cocktail_serve.usage.ledger import Ledger
from cocktail_serve.usage.store import UsageStore

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
RANGE = ("--start", "2026-03-01", "--end", "2026-03-31")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    pool = {"id": "flan", "kind": "decoder", "base": "b", "engine": {"type": "fake"}}
    url = f"sqlite:///{tmp_path / 'registry.sqlite'}"
    path.write_text(yaml.safe_dump({"store": {"url": url}, "pools": [pool]}))

    async def fill() -> None:
        database = Database(url)
        await database.open()
        ledger = Ledger(UsageStore(database), clock=lambda: NOW)
        for tenant, key_id, num_out in (("acme", "k1", 3), ("acme", "k2", 4), ("other", None, 5)):
            ledger.add(tenant, key_id, "films@1a2b3c4d", "flan", Use(requests=1, tokens_in=1000, tokens_out=num_out))
        await ledger.stop()
        await database.close()

    asyncio.run(fill())
    return path


def run(*args: object) -> int:
    try:
        cli.main(["usage", *map(str, args)])
    except SystemExit as exited:
        return int(exited.code or 0)
    return 0


def test_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", config, *RANGE, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["data"]
    assert [(row["day"], row["tenant"], row["requests"], row["tokens_out"]) for row in rows] == [
        ("2026-03-01", "acme", 2, 7),
        ("2026-03-01", "other", 1, 5),
    ]


def test_csv(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", config, *RANGE, "--csv", "--group-by", "key,model", "--tenant", "acme") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["key"], row["model"], row["tokens_in"], row["tokens_out"]) for row in rows] == [
        ("k1", "films@1a2b3c4d", "1000", "3"),
        ("k2", "films@1a2b3c4d", "1000", "4"),
    ]


def test_a_table(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", config, *RANGE) == 0
    out = capsys.readouterr().out
    assert "acme" in out
    assert "2,000" in out


def test_other_days(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", config, "--end", "2026-02-28", "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"] == []


@pytest.mark.parametrize(
    "words", [("--group-by", "colour"), ("--csv", "--json"), ("--start", "2026-04-01", "--end", "2026-03-01")]
)
def test_wrong_usage_exits_2(config: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    assert run("--config", config, *words) == 2
    assert capsys.readouterr().out == ""
