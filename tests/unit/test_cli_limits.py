"""`limits` on the store's file: what is set holds over the configuration's, and is unset again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import answer, exit_code, refusal, run, write_config


@pytest.fixture
def config(tmp_path: Path, empty_registry: Path) -> Path:
    (tmp_path / "cache").mkdir()
    shutil.copy(empty_registry, tmp_path / "cache")
    return write_config(tmp_path, limits={"requests_per_minute": 600, "cocktails": 5})


def limits(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    tenants: list[dict[str, Any]] = answer(capsys, "limits", *words)["data"]
    return tenants


def test_what_is_set_holds_until_it_is_unset(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    acme = ("--config", config, "--tenant", "acme")
    (made,) = limits(capsys, "set", *acme, "--new", "requests_per_minute=6000", "example_bytes=50MB", "cocktails=none")
    assert made["own_limits"] == ["cocktails", "example_bytes", "requests_per_minute"]
    assert made["limits"] == {
        "requests_per_minute": 6000,
        "tokens_per_minute": None,
        "concurrent_requests": None,
        "cocktails": None,
        "example_bytes": 50_000_000,
        "scoring_jobs": None,
    }
    (changed,) = limits(capsys, "set", *acme, "scoring_jobs=0")
    assert changed["own_limits"] == [*made["own_limits"], "scoring_jobs"], "the others stay"
    (unset,) = limits(capsys, "unset", *acme, "cocktails", "scoring_jobs")
    assert (unset["limits"]["cocktails"], unset["own_limits"]) == (5, ["example_bytes", "requests_per_minute"])
    assert limits(capsys, "show", *acme) == limits(capsys, "show", "--config", config) == [unset]
    (cleared,) = limits(capsys, "unset", *acme)
    assert (cleared["limits"]["requests_per_minute"], cleared["own_limits"]) == (600, [])


def test_a_tenant_that_is_not_there_has_nothing_to_unset(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("limits", "unset", "--config", config, "--tenant", "typo") != 0
    assert "there is no tenant 'typo'" in capsys.readouterr().err
    assert limits(capsys, "show", "--config", config) == []


def test_everybody_without_a_key_is_a_tenant_that_nobody_has_to_make(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "limits", "set", "--config", config, "--tenant", "default", "cocktails=1")
    assert (code, err) == (0, ""), "it holds on an open server too"
    (default,) = limits(capsys, "show", "--config", config)
    assert (default["name"], default["limits"]["cocktails"]) == ("default", 1)


@pytest.mark.parametrize(("auth", "is_told"), [("auto", True), ("off", True), ("required", False)])
def test_it_says_where_nobody_needs_a_key(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], auth: str, is_told: bool
) -> None:
    config = write_config(tmp_path, server={"auth": auth})
    code, _, err = run(capsys, "limits", "set", "--config", config, "--tenant", "acme", "--new", "cocktails=1")
    assert code == 0
    assert ("answered too, as 'default'; set server.auth: required" in err) is is_told


def test_a_table_says_whose_each_limit_is(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("limits", "set", "--config", config, "--tenant", "acme", "--new", "tokens_per_minute=200000") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["tenant", "limit", "value", "said", "by"]
    assert rows[1:4] == [
        ["acme", "requests_per_minute", "600", "the", "configuration"],
        ["acme", "tokens_per_minute", "200,000", "the", "operator"],
        ["acme", "concurrent_requests", "none", "the", "configuration"],
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("set", "--tenant", "acme"), "Missing argument 'LIMIT=NUMBER'"),
        (("set", "--tenant", "acme", "cocktails"), "'cocktails' is not LIMIT=NUMBER, as in cocktails=10"),
        (("set", "--tenant", "acme", "cocktails=many"), "cocktails: Input should be a valid integer"),
        (
            ("set", "--tenant", "acme", "cocktails=-1"),
            "cocktails: Input should be greater than or equal to 0, got",
        ),
        (("set", "--tenant", "acme", "requests_per_minute=0"), "greater than or equal to 1, got '0'"),
        (("set", "--tenant", "acme", "coktails=1"), "'coktails' is none of requests_per_minute, tokens_per_minute"),
        (("set", "--tenant", "Acme", "cocktails=1"), "'Acme' is not a tenant's name: use [a-z0-9]"),
        (("set", "cocktails=1"), "Missing option '--tenant'"),
        (("set", "--tenant", "typo", "cocktails=1"), "there is no tenant 'typo'; its first key or limit makes it"),
        (("unset", "--tenant", "acme", "coktails"), "'coktails' is none of requests_per_minute, tokens_per_minute"),
        (("show", "--tenant", "nobody"), "there is no tenant 'nobody'; its first key or limit makes it"),
    ],
)
def test_wrong_usage_exits_2_says_why_and_writes_nothing(
    args: tuple[str, ...], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, "limits", *args, "--config", config)
    assert limits(capsys, "show", "--config", config) == []
