"""The registry's way out of the cache: whole or not at all, once, and with everything that was in it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.config import Settings
from cocktail_serve.database import registry_file
from cocktail_serve.database.database import Database
from cocktail_serve.database.registry_file import registry_url
from cocktail_serve.errors import StorageError

NUM_ROWS = 300


@dataclass(frozen=True)
class Place:
    registry_path: Path
    former_registry_path: Path | None
    url: str | None = None


@pytest.fixture(params=["plain", "odd ?name#with%20 é'\"&"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    folder = tmp_path / request.param
    return Place(folder / "data" / "cocktail-serve" / "registry.sqlite", folder / "cache" / "registry.sqlite")


def fill(path: Path, *, first: int = 0) -> None:
    """Rows, of which the last are in the write-ahead log alone: as a server that is killed leaves a registry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code = (
        "import os, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.execute('PRAGMA journal_mode = WAL')\n"
        "connection.execute('CREATE TABLE IF NOT EXISTS cocktails (id INTEGER PRIMARY KEY, name TEXT)')\n"
        "first = int(sys.argv[2])\n"
        f"for number in range(first, first + {NUM_ROWS}):\n"
        "    if number == 100:\n"
        "        connection.execute('PRAGMA wal_checkpoint(TRUNCATE)')\n"
        "    connection.execute('INSERT INTO cocktails VALUES (?, ?)', (number, 'x' * 100))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(first)], check=False)
    assert Path(f"{path}-wal").stat().st_size > 0


def rows(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as connection:
        return [number for (number,) in connection.execute("SELECT id FROM cocktails ORDER BY id")]


def found(place: Any, **options: Any) -> Path:
    with registry_url(place, **options) as url:
        return Path(str(getattr(url, "database", url)))


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_all_of_it_is_moved(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    former = place.former_registry_path
    assert former is not None
    fill(former)
    (former.parent / "fingerprints").mkdir()
    assert found(place) == place.registry_path
    assert rows(place.registry_path) == list(range(NUM_ROWS))
    assert left_in(former.parent) == {"fingerprints"}
    assert place.registry_path.stat().st_mode & 0o777 == 0o600
    assert caplog.messages == [
        f"the registry was moved from {former} to {place.registry_path}, out of a folder that is cleared as a cache"
    ]
    caplog.clear()
    assert found(place) == place.registry_path
    assert not caplog.messages


async def test_a_database_is_opened_there(place: Place) -> None:
    """Whatever the folders are called."""
    for _ in range(2):
        with registry_url(place) as url:
            database = Database(url)
            await database.open()
            await database.close()
    assert place.registry_path.is_file()
    assert left_in(place.registry_path.parent) >= {"registry.sqlite", "registry.sqlite.lock"}
    assert left_in(place.registry_path.parents[1]) == {"cocktail-serve"}


def test_without_a_former_one_nothing_is_made(place: Place) -> None:
    assert found(place) == place.registry_path
    assert not place.registry_path.parent.exists()


def test_who_only_looks_moves_nothing(place: Place) -> None:
    former = place.former_registry_path
    assert former is not None
    fill(former)
    assert found(place, may_move=False) == former
    assert not place.registry_path.parent.exists()
    found(place)
    assert found(place, may_move=False) == place.registry_path


def test_of_two_the_new_one_is_used_and_the_other_told(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    former = place.former_registry_path
    assert former is not None
    fill(former)
    fill(place.registry_path, first=1000)
    assert found(place) == place.registry_path
    assert rows(place.registry_path)[0] == 1000
    assert rows(former)[0] == 0
    (message,) = caplog.messages
    assert f"{place.registry_path} is used, and {former} is not; delete the latter" in message


def test_where_a_url_is_given_nothing_is_moved(tmp_path: Path) -> None:
    former = tmp_path / "cache" / "registry.sqlite"
    fill(former)
    with registry_url(Place(tmp_path / "data" / "registry.sqlite", former, "postgresql://h/n")) as url:
        assert url == "postgresql://h/n"
    assert rows(former) == list(range(NUM_ROWS))


def killed_at(number: int, work: Any) -> int:
    """Runs something in a process that is killed before its `number`th step on the disk; 0: it came to its end."""

    def run() -> None:
        steps = 0

        def count(event: str, _arguments: Any) -> None:
            nonlocal steps
            if event in ("open", "os.remove", "os.rename", "shutil.copyfile", "sqlite3.connect", "os.mkdir"):
                steps += 1
                if steps == number:
                    os.kill(os.getpid(), 9)

        sys.addaudithook(count)
        work()

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def test_killed_at_every_step_it_is_whole(tmp_path: Path) -> None:
    template = tmp_path / "template"
    fill(template / "registry.sqlite")
    number, ended = 0, -9
    while ended != 0:
        number += 1
        folder = tmp_path / str(number)
        shutil.copytree(template, folder / "cache")
        place = Place(folder / "data" / "registry.sqlite", folder / "cache" / "registry.sqlite")
        ended = killed_at(number, lambda place=place: found(place))
        assert ended in (-9, 0)
        if place.registry_path.exists():
            assert rows(place.registry_path) == list(range(NUM_ROWS)), f"after step {number}"
        assert rows(found(place)) == list(range(NUM_ROWS)), f"after step {number}"
        assert found(place) == place.registry_path
        assert left_in(folder / "data") <= {"registry.sqlite", "registry.sqlite.moving"}
    assert number > 12, "steps are counted"


@pytest.mark.parametrize("step", ["shutil.copyfile", "os.fsync", "pathlib.Path.replace", "os.open"])
def test_a_disk_that_refuses_leaves_it_where_it_was(place: Place, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    former = place.former_registry_path
    assert former is not None
    fill(former)

    def refuse(*_args: Any, **_options: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(step, refuse)
        with pytest.raises(StorageError, match=r"cannot be moved .* No space left on device; make room there, or set"):
            found(place)
    assert not place.registry_path.exists()
    assert left_in(place.registry_path.parent) == {"registry.sqlite.moving"}
    assert rows(former) == list(range(NUM_ROWS))
    assert rows(found(place)) == list(range(NUM_ROWS))


def test_what_is_no_database_is_left_alone(place: Place) -> None:
    former = place.former_registry_path
    assert former is not None
    former.parent.mkdir(parents=True)
    former.write_text("no database at all, and long enough to be none" * 100)
    with pytest.raises(StorageError, match="file is not a database"):
        found(place)
    assert former.is_file()
    assert not place.registry_path.exists()


def test_processes_at_once_move_it_once(tmp_path: Path) -> None:
    place = Place(tmp_path / "data" / "registry.sqlite", tmp_path / "cache" / "registry.sqlite")
    assert place.former_registry_path is not None
    fill(place.former_registry_path)
    start = time.monotonic() + 0.5

    def move_and_write(number: int) -> None:
        time.sleep(max(0.0, start - time.monotonic()))
        with closing(sqlite3.connect(found(place), timeout=30)) as connection, connection:
            connection.execute("INSERT INTO cocktails VALUES (?, 'new')", (1000 + number,))

    pids = []
    for number in range(6):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                move_and_write(number)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 6
    assert rows(place.registry_path) == [*range(NUM_ROWS), *range(1000, 1006)]
    assert not place.former_registry_path.exists()


async def test_while_a_server_works_with_it_all_use_it_where_it_is(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    former = place.former_registry_path
    assert former is not None
    server = Database(f"sqlite:///{former}") if "?" not in str(former) else Database(_url_of(former))
    await server.open()
    with registry_url(place) as url:
        assert getattr(url, "database", None) == str(former)
        await server.close()
        # a command still works with it: another process must not move it from under that
        assert found(place) == former
    assert [message for message in caplog.messages if "stays in" in message] == [
        f"the registry stays in {former}: a server works with it there"
    ] * 2
    assert found(place) == place.registry_path


def _url_of(path: Path) -> Any:
    with registry_url(Place(path, None)) as url:
        return url


def test_a_writer_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of an earlier release locks nothing but the database."""
    place = Place(tmp_path / "data" / "registry.sqlite", tmp_path / "cache" / "registry.sqlite")
    former = place.former_registry_path
    assert former is not None
    fill(former)
    with closing(sqlite3.connect(former, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO cocktails VALUES (5000, 'late')")
        monkeypatch.setattr(registry_file, "BUSY_S", 0.05)
        with pytest.raises(StorageError, match="database is locked"):
            found(place)
        writer.execute("COMMIT")
    assert rows(found(place))[-1] == 5000


def test_from_a_place_that_cannot_be_written(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """It is copied with its log, and left where it is."""
    former = place.former_registry_path
    assert former is not None
    fill(former)
    with read_only(former.parent):
        assert found(place) == place.registry_path
        assert rows(place.registry_path) == list(range(NUM_ROWS))
        assert former.exists()
        assert f"{former} was moved, and cannot be deleted" in caplog.text
        caplog.clear()
        assert found(place) == place.registry_path
        assert "there are two registries" in caplog.text


def test_to_a_place_that_cannot_be_written(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    former = place.former_registry_path
    assert former is not None
    fill(former)
    place.registry_path.parents[1].mkdir()
    with read_only(place.registry_path.parents[1]):
        assert found(place) == former
    assert f"the registry stays in {former}: {place.registry_path.parent} cannot be written" in caplog.text
    assert rows(former) == list(range(NUM_ROWS))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that nobody can write to: this user, or where that is the superuser, a file system mounted so."""
    if os.geteuid() != 0:
        modes = {path: path.stat().st_mode for path in (*folder.iterdir(), folder)}
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        try:
            yield
        finally:
            for path, mode in reversed(modes.items()):
                path.chmod(mode)
        return
    for words in (["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)]):
        if subprocess.run(["mount", *words], check=False, capture_output=True).returncode != 0:
            pytest.skip("the superuser writes everywhere, and may not mount here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system")
def test_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(f"/dev/shm/cocktail-registry-{os.getpid()}")
    former = folder / "registry.sqlite"
    place = Place(tmp_path / "data" / "registry.sqlite", former)
    try:
        fill(former)
        assert former.stat().st_dev != tmp_path.stat().st_dev
        assert rows(found(place)) == list(range(NUM_ROWS))
        assert found(place) == place.registry_path
        assert left_in(folder) == set()

        # the other way round it would go with the machine's memory
        back = Place(folder / "data" / "registry.sqlite", place.registry_path)
        monkeypatch.setattr(registry_file, "_goes_with_its_container", lambda path: path.is_relative_to("/dev/shm"))
        assert found(back) == place.registry_path
        assert "would go with its container; mount a volume there" in caplog.text
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_which_places_go_with_their_container() -> None:
    if "tmpfs /dev/shm tmpfs" in Path("/proc/mounts").read_text():
        assert registry_file._goes_with_its_container(Path("/dev/shm"))
    assert not registry_file._goes_with_its_container(Path("/proc"))


@pytest.mark.parametrize("is_default", [True, False])
def test_the_place_of_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_default: bool) -> None:
    """A folder of one's own holds the registry, as ever; it is the default that is a cache of the user's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    cache = "~/.cache/cocktail-serve" if is_default else str(tmp_path / "own")
    pool = {"id": "flan", "kind": "decoder", "base": "b", "engine": {"type": "fake"}}
    store = Settings.model_validate({"store": {"cache_dir": cache}, "pools": [pool]}).store
    assert Settings.model_validate({"pools": [pool]}).store.registry_path.is_relative_to(tmp_path / "share")
    if is_default:
        assert store.registry_path == tmp_path / "share" / "cocktail-serve" / "registry.sqlite"
        assert store.former_registry_path == tmp_path / ".cache" / "cocktail-serve" / "registry.sqlite"
    else:
        assert (store.registry_path, store.former_registry_path) == (tmp_path / "own" / "registry.sqlite", None)
