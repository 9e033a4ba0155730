"""`limits` on the store's file: what is set holds over the configuration's, and is unset again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.command_line import answer, exit_code, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, limits={"requests_per_minute": 600, "cocktails": 5})


def limits(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    tenants: list[dict[str, Any]] = answer(capsys, "limits", *words)["data"]
    return tenants


def test_what_is_set_holds_until_it_is_unset(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    acme = ("--config", config, "--tenant", "acme")
    (made,) = limits(capsys, "set", *acme, "requests_per_minute=6000", "example_bytes=50MB", "cocktails=none")
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


def test_a_table_says_whose_each_limit_is(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("limits", "set", "--config", config, "--tenant", "acme", "tokens_per_minute=200000") == 0
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
    assert exit_code("limits", *args, "--config", config) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err
    assert limits(capsys, "show", "--config", config) == []
