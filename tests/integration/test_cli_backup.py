"""`backup`: the registry is copied while a server writes, and a server that starts on the copy answers as it did."""

from __future__ import annotations

import sqlite3
import stat
import threading
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests import command_line
from tests.gateways import EXAMPLES, live_gateway
from tests.integration.stores.test_database import FIRST_RELEASE
from tests.tenants import ADMIN, ask, make


def rows(path: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(path)) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: database.execute(f"SELECT * FROM {name}").fetchall() for name in names}


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    path = tmp_path / "cache" / "registry.sqlite"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as old:
        old.executescript(FIRST_RELEASE.read_text())
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return command_line.write_config(tmp_path)


def test_a_server_on_a_copy_that_was_made_while_it_wrote_answers_as_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded = {"server": {"auth": "required"}, "admin_key": ADMIN}
    copy = tmp_path / "copies" / "registry.sqlite"
    copy.parent.mkdir()
    with live_gateway(tmp_path, **guarded) as live:
        registry = live.settings.store.registry_path
        config = command_line.write_config(tmp_path, store={"cache_dir": str(registry.parent)})
        key = command_line.answer(capsys, "keys", "create", "--config", config, "--tenant", "acme")["key"]
        with httpx.Client(base_url=live.url, timeout=60, headers={"authorization": f"Bearer {key}"}) as http:
            first, second = (make(http, "travel", temperature=temperature) for temperature in (0.2, 5.0))
            http.patch("/v1/cocktails/travel", json={"current": first["id"]}).raise_for_status()
            answer = ask(http, "travel", temperature=0).json()
            begun, end, made = threading.Event(), threading.Event(), list[str]()

            def write() -> None:
                with httpx.Client(base_url=live.url, timeout=60, headers=http.headers) as other:
                    while not end.is_set():
                        body = {"pool": "flan", "name": f"late-{len(made)}", "examples": EXAMPLES}
                        other.post("/v1/cocktails", json=body).raise_for_status()
                        made.append(body["name"])
                        begun.set()

            writer = threading.Thread(target=write)
            writer.start()
            try:
                assert begun.wait(30)
                before = len(made)
                told = command_line.answer(capsys, "backup", copy, "--config", config)
                late = len(made)
            finally:
                end.set()
                writer.join()
            assert len(made) > before, "nothing was written meanwhile"
    assert (told["registry"], told["file"], told["bytes"]) == (str(registry), str(copy), copy.stat().st_size)
    assert 2 + before <= told["counts"]["cocktails"] <= 2 + late + 1
    assert told["counts"]["keys"] == 1
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]

    for path in registry.parent.glob(f"{registry.name}*"):
        path.unlink()
    copy.rename(registry)
    with (
        live_gateway(tmp_path, **guarded) as live,
        httpx.Client(base_url=live.url, timeout=60, headers={"authorization": f"Bearer {key}"}) as http,
    ):
        for made_before in (first, second):
            again = http.get(f"/v1/cocktails/{made_before['id']}").json()
            for field in ("merging_weights", "losses", "recipe", "status", "created_at"):
                assert again[field] == made_before[field], field
        assert http.get("/v1/cocktails/travel").json()["id"] == first["id"], "the pin"
        again = ask(http, "travel", temperature=0).json()
        assert (again["model"], again["choices"]) == (answer["model"], answer["choices"])
        listed = {model["id"] for model in http.get("/v1/models").json()["data"]}
        assert {f"late-{number}" for number in range(before)} | {"travel", first["id"], second["id"]} <= listed


def test_what_is_shown(registry: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.sqlite"
    code, out, err = command_line.run(capsys, "backup", copy, "--config", config)
    assert code == 0, err
    assert out.startswith(f"{copy}: ")
    assert "tables of revision 0001, whole; " in out
    assert f"not in it: the configuration {config}" in err
    assert "not in it: the files of the 1 models" in err
    assert rows(copy) == rows(registry), "of an earlier release too, and no table changed"


def test_a_file_in_its_place_is_replaced_only_when_told(
    registry: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.sqlite"
    command_line.answer(capsys, "backup", copy, "--config", config)
    with closing(sqlite3.connect(registry, isolation_level=None)) as database:
        database.execute("DELETE FROM pins")
    assert "is there already" in command_line.refusal(capsys, "backup", copy, "--config", config)
    assert rows(copy)["pins"] != []
    command_line.answer(capsys, "backup", copy, "--config", config, "--overwrite")
    assert rows(copy)["pins"] == []
    told = config.read_text()
    assert "is no copy of a registry" in command_line.refusal(
        capsys, "backup", config, "--config", config, "--overwrite"
    )
    assert config.read_text() == told
    refused = command_line.refusal(capsys, "backup", registry, "--config", config, "--overwrite")
    assert "is the registry itself" in refused


def test_a_damaged_registry_leaves_the_earlier_copy(
    registry: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.sqlite"
    command_line.answer(capsys, "backup", copy, "--config", config)
    good = copy.read_bytes()
    content = bytearray(registry.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = b"\xff" * 4096
    registry.write_bytes(content)
    code, out, err = command_line.run(capsys, "backup", copy, "--config", config, "--overwrite")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: the registry {registry} cannot be copied to {copy}: ")
    assert copy.read_bytes() == good
    assert list(tmp_path.glob("*.partial")) == []


def test_where_there_is_nothing_to_copy(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.sqlite"
    code, out, err = command_line.run(capsys, "backup", copy, "--config", config)
    assert (code, out) == (1, "")
    assert "there is no registry" in err
    empty = tmp_path / "cache" / "registry.sqlite"
    empty.parent.mkdir(exist_ok=True)
    empty.touch()
    code, _, err = command_line.run(capsys, "backup", copy, "--config", config)
    assert code == 1
    assert f"{empty} holds no registry" in err
    config = command_line.write_config(tmp_path, store={"url": "sqlite://"})
    assert "is in memory" in command_line.refusal(capsys, "backup", copy, "--config", config)
    assert not copy.exists()


def test_postgresql_is_left_to_its_own_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "postgresql+asyncpg://cocktail:secret@db.internal:5433/shop"
    config = command_line.write_config(tmp_path, store={"url": url})
    refused = command_line.refusal(capsys, "backup", tmp_path / "it's.dump", "--config", config)
    assert f"pg_dump --format=custom --file='{tmp_path}/it'\"'\"'s.dump' " in refused
    assert " postgresql://cocktail@db.internal:5433/shop (" in refused
    assert "secret" not in refused
