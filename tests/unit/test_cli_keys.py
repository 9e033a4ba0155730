"""`keys` on the store's file, and beside a server that has it open."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.database.database import Database
from cocktail_serve.tenants.store import TenantStore
from tests.command_line import answer, exit_code, refusal, run, write_config


@pytest.fixture
def config(tmp_path: Path, empty_registry: Path) -> Path:
    (tmp_path / "cache").mkdir()
    shutil.copy(empty_registry, tmp_path / "cache")
    return write_config(tmp_path)


def keys(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    return answer(capsys, "keys", *words)


def test_the_life_of_a_key(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = keys(capsys, "create", "--config", config, "--tenant", "acme", "--scopes", "use,admin", "--expires", "90d")
    assert made["key"].startswith(f"ck-{made['id']}-")
    assert (made["tenant"], made["scopes"], made["status"]) == ("acme", ["admin", "use"], "active")
    assert made["expires_at"] - made["created_at"] == pytest.approx(90 * 86400, abs=1)
    listed = keys(capsys, "list", "--config", config)["data"]
    assert listed == [{name: value for name, value in made.items() if name != "key"}]
    rotated = keys(capsys, "rotate", made["id"], "--config", config, "--overlap", "0")
    assert rotated["key"] != made["key"]
    assert keys(capsys, "revoke", rotated["id"], "--config", config, "--tenant", "acme")["status"] == "revoked"
    statuses = {
        key["id"]: key["status"] for key in keys(capsys, "list", "--config", config, "--tenant", "acme")["data"]
    }
    assert statuses == {made["id"]: "revoked", rotated["id"]: "revoked"}


def test_the_key_alone_is_on_stdout(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("keys", "create", "--config", config, "--tenant", "acme") == 0
    out, err = capsys.readouterr()
    assert out.startswith("ck-")
    assert out.count("\n") == 1
    assert "not shown again" in err
    assert exit_code("keys", "list", "--config", config) == 0
    out, _ = capsys.readouterr()
    assert "create,use" in out
    assert "active" in out


@pytest.mark.parametrize(("auth", "is_told"), [("auto", True), ("off", True), ("required", False)])
def test_it_says_where_nobody_needs_a_key(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], auth: str, is_told: bool
) -> None:
    config = write_config(tmp_path, server={"auth": auth})
    words: list[tuple[str, ...]] = [("create", "--tenant", "acme")]
    for _ in range(3):
        code, out, err = run(capsys, "keys", *words[-1], "--config", config)
        assert code == 0
        assert ("a server of this configuration asks for no key (server.auth is " in err) is is_told, words[-1]
        if out.startswith("ck-"):
            words.append(("rotate" if len(words) == 1 else "revoke", out.split("-")[1]))


def test_it_works_beside_a_server(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def serve() -> list[str]:
        database = Database(f"sqlite:///{config.parent / 'cache' / 'registry.sqlite'}")
        await database.open()
        assert await asyncio.to_thread(exit_code, "keys", "create", "--config", config, "--tenant", "acme") == 0
        seen = [key.tenant for key in await TenantStore(database).keys()]
        await database.close()
        return seen

    assert asyncio.run(serve()) == ["acme"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("create", "--tenant", "Acme"), "'Acme' is not a tenant's name: use [a-z0-9]"),
        (("create", "--tenant", "acme", "--scopes", "root"), "some of use, create, admin; got root"),
        (("create", "--tenant", "acme", "--expires", "soon"), "'soon' is not a time such as 90d"),
        (("create", "--tenant", "acme", "--expires", "0"), "--expires: must be longer than nothing"),
        (("revoke", "000000000000"), "there is no key '000000000000'"),
        (("rotate", "000000000000", "--overlap", "-1d"), "'-1d' is not a time such as 90d"),
        (("create",), "Missing option '--tenant'"),
    ],
)
def test_wrong_usage_exits_2_says_why_and_writes_nothing(
    args: tuple[str, ...], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, "keys", *args, "--config", config)
    assert keys(capsys, "list", "--config", config)["data"] == []
