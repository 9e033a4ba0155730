"""Commands and the server see one registry, wherever it is and on its way out of the cache."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from cocktail_serve.cli.in_store import in_store
from cocktail_serve.config import Settings, load_settings
from cocktail_serve.database.database import Database
from cocktail_serve.gateway.assembly import assembled
from cocktail_serve.gateway.lifecycle import Lifecycle
from cocktail_serve.gateway.metrics import GatewayMetrics
from cocktail_serve.tenants.store import TenantStore
from tests import command_line


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


@pytest.fixture
def config(home: Path) -> Path:
    """With no word of a store."""
    return command_line.write_config(home, store={})


async def add_key(path: Path) -> None:
    """As an earlier release did."""
    path.parent.mkdir(parents=True)
    database = Database(f"sqlite:///{path}")
    await database.open()
    await TenantStore(database).create_key("acme", ["use"])
    await database.close()


def checks(capsys: pytest.CaptureFixture[str], config: Path) -> dict[str, dict[str, str]]:
    _, out, _ = command_line.run(capsys, "doctor", config, "--json")
    return {check["name"]: check for check in json.loads(out)["checks"]}


def test_a_key_of_an_earlier_release_is_seen_by_all(
    home: Path, config: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    former = home / ".cache" / "cocktail-serve" / "registry.sqlite"
    place = home / "share" / "cocktail-serve" / "registry.sqlite"
    asyncio.run(add_key(former))
    found = checks(capsys, config)
    assert found["registry"]["detail"].startswith(f"{former}: reachable")
    assert f"the next start moves it to {place}" in found["registry's place"]["detail"]
    assert former.exists()

    listed = command_line.answer(capsys, "keys", "list", "--config", config)
    assert [key["tenant"] for key in listed["data"]] == ["acme"]
    assert place.exists()
    assert not former.exists()
    assert f"the registry was moved from {former} to {place}" in caplog.text
    found = checks(capsys, config)
    assert found["registry"]["detail"].startswith(f"{place}: reachable")
    assert "registry's place" not in found

    settings = load_settings(config)

    async def tenants_of_the_server() -> list[str]:
        async with assembled(settings, {}, {}, GatewayMetrics(), Lifecycle()) as gateway:
            return [key.tenant for key in await gateway.tenants.keys()]

    assert asyncio.run(tenants_of_the_server()) == ["acme"]


def test_a_server_moves_it_and_says_that_nobody_needs_its_keys(
    home: Path, config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    former = home / ".cache" / "cocktail-serve" / "registry.sqlite"
    asyncio.run(add_key(former))
    settings = load_settings(config)

    async def serve() -> None:
        async with assembled(settings, {}, {}, GatewayMetrics(), Lifecycle()):
            pass

    asyncio.run(serve())
    assert not former.exists()
    assert "tenants have keys, and who sends none is answered too, as 'default' (server.auth is 'auto'" in caplog.text
    assert len(in_store(settings, lambda database: TenantStore(database).keys())) == 1


def test_a_cache_of_the_users_that_was_set_is_told(
    home: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = home / ".cache" / "mine"
    asyncio.run(add_key(own / "registry.sqlite"))
    config = command_line.write_config(home, store={"cache_dir": str(own)})
    found = checks(capsys, config)
    assert found["registry's place"]["status"] == "warning"
    assert f"{own}/registry.sqlite lies in a cache" in found["registry's place"]["detail"]
    assert found["registry's place"]["fix"].endswith("name it in store.url")
    assert isinstance(load_settings(config), Settings)


def test_a_relative_url_in_a_folder_that_no_url_can_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "is it?"
    folder.mkdir()
    config = command_line.write_config(folder, store={"url": "sqlite:///registry.sqlite"})
    code, _, err = command_line.run(capsys, "keys", "list", "--config", config)
    assert code == 2
    assert "no URL can name a folder with '?'" in err
