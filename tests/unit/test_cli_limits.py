"""`limits` on the store's file: what is set holds over the configuration's, and is unset again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cocktail_serve import cli


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    pool = {"id": "flan", "kind": "decoder", "base": "b", "engine": {"type": "fake"}}
    limits = {"requests_per_minute": 600, "cocktails": 5}
    path.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "limits": limits, "pools": [pool]}))
    return path


def run(*args: object) -> int:
    try:
        cli.main(["limits", *map(str, args)])
    except SystemExit as exited:
        return int(exited.code or 0)
    return 0


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> list[dict[str, Any]]:
    assert run(*args, "--json") == 0
    data: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["data"]
    return data


def test_what_is_set_holds_until_it_is_unset(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    acme = ("--config", config, "--tenant", "acme")
    (made,) = answer(capsys, "set", *acme, "requests_per_minute=6000", "example_bytes=50MB", "cocktails=none")
    assert made["own_limits"] == ["cocktails", "example_bytes", "requests_per_minute"]
    assert made["limits"] == {
        "requests_per_minute": 6000,
        "tokens_per_minute": None,
        "concurrent_requests": None,
        "cocktails": None,
        "example_bytes": 50_000_000,
        "scoring_jobs": None,
    }
    (changed,) = answer(capsys, "set", *acme, "scoring_jobs=0")
    assert changed["own_limits"] == [*made["own_limits"], "scoring_jobs"], "the others stay"
    (unset,) = answer(capsys, "unset", *acme, "cocktails", "scoring_jobs")
    assert (unset["limits"]["cocktails"], unset["own_limits"]) == (5, ["example_bytes", "requests_per_minute"])
    assert answer(capsys, "show", *acme) == answer(capsys, "show", "--config", config) == [unset]
    (cleared,) = answer(capsys, "unset", *acme)
    assert (cleared["limits"]["requests_per_minute"], cleared["own_limits"]) == (600, [])


def test_a_tenant_that_is_not_there_has_nothing_to_unset(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("unset", "--config", config, "--tenant", "typo") != 0
    assert "there is no tenant 'typo'" in capsys.readouterr().err
    assert answer(capsys, "show", "--config", config) == []


def test_a_table_says_whose_each_limit_is(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("set", "--config", config, "--tenant", "acme", "tokens_per_minute=200000") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["tenant", "limit", "value", "said", "by"]
    assert rows[1:4] == [
        ["acme", "requests_per_minute", "600", "the", "configuration"],
        ["acme", "tokens_per_minute", "200,000", "the", "operator"],
        ["acme", "concurrent_requests", "none", "the", "configuration"],
    ]


@pytest.mark.parametrize(
    "args",
    [
        ("set", "--tenant", "acme"),
        ("set", "--tenant", "acme", "cocktails"),
        ("set", "--tenant", "acme", "cocktails=many"),
        ("set", "--tenant", "acme", "cocktails=-1"),
        ("set", "--tenant", "acme", "requests_per_minute=0"),
        ("set", "--tenant", "acme", "coktails=1"),
        ("set", "--tenant", "Acme", "cocktails=1"),
        ("set", "cocktails=1"),
        ("unset", "--tenant", "acme", "coktails"),
        ("show", "--tenant", "nobody"),
    ],
)
def test_wrong_usage_exits_2_and_writes_nothing(
    args: tuple[str, ...], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*args, "--config", config) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err
    assert answer(capsys, "show", "--config", config) == []
