"""How a database is opened: whose it is, what happens to its tables, and what it says when it refuses."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, insert, inspect, make_url, select, text

from cocktail_serve.database import migrations, sqlite_file, tables
from cocktail_serve.database.database import Database, async_url, insert_missing
from cocktail_serve.database.sqlite_file import kept_copies
from cocktail_serve.errors import ConfigError, InvalidRequestError, StorageError
from tests.postgres import Postgres

PIN = {"tenant": "acme", "name": "films", "uid": "1"}

ON_A_SERVER = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
"""Of what a database in a file has not: a server that may go."""

FIRST_RELEASE = Path(__file__).with_name("version_0_1_0.sql")


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'deep' / 'registry.sqlite'}")
    await database.open()
    yield database
    await database.close()


def path_of(database: Database) -> Path:
    return Path(str(database.url.database))


async def add_score(database: Database, item: str) -> None:
    async with database.write() as connection:
        row = {"tenant": "acme", "item": item, "model": "m", "variant": "v", "loss": 0.5}
        await connection.execute(insert(tables.losses).values(row))


async def scored_items(database: Database) -> list[str]:
    async with database.read() as connection:
        return list((await connection.execute(select(tables.losses.c.item).order_by("item"))).scalars())


async def end_other_connections(database: Database) -> None:
    """As a PostgreSQL that restarts ends them."""
    async with database.write() as connection:
        await connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid()"
        )


async def differences(database: Database) -> list[object]:
    def compare(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), tables.metadata))

    async with database.read() as connection:
        return await connection.run_sync(compare)


class TestMigrations:
    async def test_revisions_lead_from_nothing_to_the_tables_of_the_code(self, database: Database) -> None:
        assert await differences(database) == []

    async def test_a_table_that_no_revision_makes_is_noticed(self, database: Database) -> None:
        async with database.write() as connection:
            await connection.exec_driver_sql("DROP TABLE losses")
        assert [difference[0] for difference in await differences(database)] == ["add_table"]  # type: ignore[index]

    def test_there_is_one_last_revision(self) -> None:
        scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
        assert len(scripts.get_heads()) == 1

    async def test_opening_again_changes_nothing(self, database: Database, database_url: str) -> None:
        await add_score(database, "kept")
        await database.close()
        again = Database(database_url)
        await again.open()
        assert await scored_items(again) == ["kept"]
        await again.close()

    async def test_the_first_releases_tables_are_brought_up_to_date(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "registry.sqlite"
        with sqlite3.connect(path) as old:
            old.executescript(FIRST_RELEASE.read_text())
            names = "cocktails examples items pins losses embeddings".split()
            before = {name: old.execute(f"SELECT * FROM {name}").fetchall() for name in names}
        beside = Database(f"sqlite:///{path}")
        with pytest.raises(StorageError, match=r"of revision 0001 .*start the server of this release"):
            await beside.open(as_server=False)
        database = Database(f"sqlite:///{path}")
        await database.open()
        assert await differences(database) == []
        async with database.read() as connection:
            assert not await connection.run_sync(lambda sync: inspect(sync).has_table("schema_info"))
        await database.close()
        with sqlite3.connect(path) as new:
            for name, rows in before.items():
                width = len(rows[0])
                assert [row[:width] for row in new.execute(f"SELECT * FROM {name}")] == rows, name
        (copy,) = kept_copies(path)
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        with sqlite3.connect(copy) as old:
            assert {name: old.execute(f"SELECT * FROM {name}").fetchall() for name in names} == before
        (told,) = [record.getMessage() for record in caplog.records if "is upgraded" in record.getMessage()]
        assert told.startswith(f"the registry {path} is upgraded from revision 0001 to ")
        assert f"as it was, it is in {copy}" in told
        again = Database(f"sqlite:///{path}")
        await again.open()
        await again.close()
        assert kept_copies(path) == [copy], "once"

    async def test_tables_that_cannot_be_copied_are_not_changed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "registry.sqlite"
        with sqlite3.connect(path) as old:
            old.executescript(FIRST_RELEASE.read_text())
        content = path.read_bytes()[100:]

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        database = Database(f"sqlite:///{path}")
        with monkeypatch.context() as patch:
            patch.setattr(sqlite_file, "sync", full)
            with pytest.raises(StorageError, match=r"cannot be copied to .*: No space left on device"):
                await database.open()
        assert path.read_bytes()[100:] == content
        assert [name for name in os.listdir(tmp_path) if "revision" in name] == []
        await database.open()
        assert await differences(database) == []
        await database.close()

    @ON_A_SERVER
    async def test_an_upgrade_of_a_server_is_told(
        self, database: Database, database_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
        last = next(iter(scripts.walk_revisions()))
        await database.close()
        newer = Database(database_url)
        async with newer.write() as connection:
            for name in ("batch_lines", "batches"):
                await connection.exec_driver_sql(f"DROP TABLE {name}")
            await connection.exec_driver_sql("ALTER TABLE files DROP COLUMN purpose")
            await connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{last.down_revision}'")
        await newer.open()
        assert f"is upgraded from revision {last.down_revision} to {last.revision}; no copy" in caplog.text
        assert await differences(newer) == []
        await newer.close()

    async def test_a_command_makes_none(self, database_url: str) -> None:
        database = Database(database_url)
        with pytest.raises(StorageError, match="the first start of the server makes it") as caught:
            await database.open(as_server=False, may_make=False)
        assert caught.value.code == "registry_missing"
        if database.is_sqlite:
            assert not path_of(database).parent.exists()
        else:
            async with database.read() as connection:
                assert not await connection.run_sync(lambda sync: inspect(sync).get_table_names())
        await database.close()

    async def test_tables_of_a_later_release_are_refused(self, database: Database, database_url: str) -> None:
        async with database.write() as connection:
            await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        await database.close()
        older = Database(database_url)
        with pytest.raises(StorageError, match="of revision '9999', which this release does not know"):
            await older.open()

    async def test_several_that_open_an_empty_database_at_once_make_its_tables_once(self, database_url: str) -> None:
        databases = [Database(database_url) for _ in range(4)]
        await asyncio.gather(*(database.open(as_server=False) for database in databases))
        for number, database in enumerate(databases):
            await add_score(database, str(number))
        assert await scored_items(databases[0]) == ["0", "1", "2", "3"]
        for database in databases:
            await database.close()

    async def test_foreign_keys_are_enforced_after_migrating(self, database: Database) -> None:
        with pytest.raises(StorageError, match=r"(?i)foreign key"):
            async with database.write() as connection:
                await connection.execute(insert(tables.pins).values(PIN))


class TestServers:
    async def test_several_servers_and_commands_share_a_database(self, database: Database, database_url: str) -> None:
        second, command = Database(database_url), Database(database_url)
        await second.open()
        await command.open(as_server=False)
        await add_score(second, "from a server")
        await add_score(command, "from a command")
        assert await scored_items(database) == ["from a command", "from a server"]
        await second.close()
        await command.close()

    async def test_tables_are_not_changed_beneath_a_server(self, database: Database, database_url: str) -> None:
        scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
        async with database.write() as connection:
            await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
        later = Database(database_url)
        with pytest.raises(StorageError, match="while servers work with it; stop them first"):
            await later.open()
        async with database.write() as connection:
            assert await connection.scalar(text("SELECT version_num FROM alembic_version")) == "0001"
            head = scripts.get_current_head()
            await connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{head}'")
        await later.open()
        await later.close()

    @ON_A_SERVER
    async def test_the_servers_lock_is_taken_again_after_it_was_lost(
        self, database: Database, database_url: str
    ) -> None:
        other = Database(database_url)
        await other.open(as_server=False)
        await end_other_connections(other)
        await database.hold()
        with pytest.raises(StorageError, match="stop them first"):
            await other._own_server()
        await database.hold()
        await other.close()

    async def test_a_decision_in_a_transaction_still_holds_when_it_is_written(
        self, database: Database, database_url: str
    ) -> None:
        """Two processes at once: SQLite lets one write at a time, PostgreSQL leaves the second row out."""
        other = Database(database_url)
        await other.open(as_server=False)

        async def add_once(through: Database) -> None:
            async with through.write() as connection:
                row = {"tenant": "acme", "item": "same", "model": "m", "variant": "v", "loss": 0.5}
                await asyncio.sleep(0)
                await connection.execute(insert_missing(connection, tables.losses), [row])

        await asyncio.gather(*(add_once(through) for through in (database, other) * 5))
        assert await scored_items(database) == ["same"]
        await other.close()

    async def test_a_write_ends_though_its_caller_leaves(self, database: Database) -> None:
        going = asyncio.create_task(database.run_shielded(add_score(database, "kept")))
        await asyncio.sleep(0)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        await database._shield.until_done()
        assert await scored_items(database) == ["kept"]


class TestRefusals:
    async def test_messages_carry_no_values(self, database: Database) -> None:
        await add_score(database, "the vault opens at dawn")
        with pytest.raises(StorageError, match=r"(?i)unique") as caught:
            await add_score(database, "the vault opens at dawn")
        assert "vault" not in caught.value.message

    async def test_a_server_that_is_not_there(self, tmp_path: Path) -> None:
        database = Database(f"postgresql://nobody@/none?host={tmp_path}")
        with pytest.raises(StorageError, match="could not be used"):
            await database.open()

    async def test_a_database_or_role_that_is_not_there(self, postgres: Postgres) -> None:
        for url in (postgres.url("missing"), postgres.url("postgres").replace(f"{postgres.user}@", "stranger@")):
            database = Database(url)
            with pytest.raises(StorageError, match="does not exist"):
                await database.open()

    @ON_A_SERVER
    async def test_a_server_that_restarts_is_connected_to_again(self, database: Database) -> None:
        other = Database(database.url.render_as_string())
        await other.open(as_server=False)
        await end_other_connections(other)
        await other.close()
        await add_score(database, "after")
        assert await scored_items(database) == ["after"]

    async def test_a_file_that_is_no_database_is_a_storage_error(self, tmp_path: Path) -> None:
        path = tmp_path / "registry.sqlite"
        path.write_bytes(b"not a database, but long enough to be looked at" * 100)
        database = Database(f"sqlite:///{path}")
        with pytest.raises(StorageError, match="not a database"):
            await database.open()
        await database.close()

    async def test_damage_inside_a_file_is_found_when_it_is_checked(
        self, sqlite: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        for number in range(300):
            await add_score(sqlite, f"{number} {'x' * 200}")
        await sqlite.close()
        path = path_of(sqlite)
        content = bytearray(path.read_bytes())
        middle = len(content) // 2 // 4096 * 4096
        content[middle : middle + 4096] = b"\xff" * 4096
        path.write_bytes(content)
        caplog.clear()
        database = Database(f"sqlite:///{path}")
        with pytest.raises(StorageError, match=r"is damaged \(.*put a copy in its place"):
            await database.open(is_checked=True)
        assert caplog.records == [], "told once, by who opens it"

    async def test_a_folder_that_cannot_be_made_is_a_storage_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        database = Database(f"sqlite:///{tmp_path / 'file' / 'registry.sqlite'}")
        with pytest.raises(StorageError, match=r"check store\.url"):
            await database.open()
        await database.close()


class TestSQLite:
    async def test_the_file_is_private_durable_and_checks_its_keys(self, sqlite: Database) -> None:
        path = path_of(sqlite)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.with_name(path.name + "-wal").stat().st_mode) == 0o600
        async with sqlite.read() as connection:
            settings = {}
            for pragma in ("journal_mode", "synchronous", "foreign_keys", "secure_delete", "busy_timeout"):
                settings[pragma] = (await connection.exec_driver_sql(f"pragma {pragma}")).scalar()
        assert settings == {
            "journal_mode": "wal",
            "synchronous": 2,
            "foreign_keys": 1,
            "secure_delete": 1,
            "busy_timeout": 10000,
        }

    async def test_a_file_that_is_gone_or_another_is_missed_and_none_is_made(
        self, sqlite: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = path_of(sqlite)
        await add_score(sqlite, "before")
        away = path.with_name("away")
        path.rename(away)
        assert sqlite.reason_lost().startswith(f"the registry {path} is gone (No such file or directory): put it back")
        for use in (lambda: add_score(sqlite, "lost"), lambda: scored_items(sqlite)):
            with pytest.raises(StorageError, match=r"is gone .*Nothing was changed"):
                await use()
        await sqlite._engine.dispose()
        sqlite._file = None  # even where nobody asks, connections open what is there and make nothing
        with pytest.raises(StorageError, match="unable to open database file"):
            await scored_items(sqlite)
        for thread in threading.enumerate():  # the driver's, which tells this loop that it ended
            if thread.name.endswith("(_connection_worker_thread)"):
                thread.join(10)
        assert not path.exists()
        assert [record.levelname for record in caplog.records if " is gone " in record.getMessage()] == ["ERROR"]

    async def test_one_that_is_back_goes_on_and_another_in_its_place_does_not(
        self, sqlite: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = path_of(sqlite)
        away, content = path.with_name("away"), path.read_bytes()
        path.rename(away)
        path.write_bytes(content)
        with pytest.raises(StorageError, match="is another file than was opened"):
            await add_score(sqlite, "lost")
        assert path.read_bytes() == content
        away.rename(path)
        await add_score(sqlite, "kept")
        assert await scored_items(sqlite) == ["kept"]
        assert (sqlite.reason_lost(), f"the registry {path} is back" in caplog.text) == ("", True)

    async def test_another_process_holding_the_write_lock_is_waited_for(self, sqlite: Database) -> None:
        other = sqlite3.connect(path_of(sqlite), isolation_level=None, check_same_thread=False)
        other.execute("begin immediate")
        writing = asyncio.create_task(add_score(sqlite, "late"))
        await asyncio.sleep(0.05)
        assert not writing.done()
        other.execute("commit")
        other.close()
        await writing
        assert await scored_items(sqlite) == ["late"]

    async def test_a_registry_in_memory_is_one_database(self, tmp_path: Path) -> None:
        database = Database("sqlite:///:memory:")
        await database.open()
        await add_score(database, "kept")
        assert await scored_items(database) == ["kept"]
        await database.close()
        assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("sqlite:///a/b.sqlite", "sqlite+aiosqlite"),
        ("sqlite+aiosqlite:////a/b.sqlite", "sqlite+aiosqlite"),
        ("postgresql://user:secret@host/db", "postgresql+asyncpg"),
        ("postgresql+psycopg://host/db", "postgresql+psycopg"),
    ],
)
def test_urls_get_a_driver_that_awaits(url: str, driver: str) -> None:
    assert async_url(url).drivername == driver
    assert async_url(url).database == make_url(url).database


@pytest.mark.parametrize("url", ["not a url", "oracle+none://x/y", "", "postgresql+nodriver://host/db"])
def test_a_url_that_cannot_be_used_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Database(url)
    assert caught.value.param == "store.url"


async def add_tenant(database: Database, name: str) -> None:
    async with database.write() as connection:
        await connection.execute(insert(tables.tenants).values(name=name, created_at=0.0))


async def test_a_database_in_a_file_keeps_a_nul(sqlite: Database) -> None:
    await add_tenant(sqlite, "a\0b")
    async with sqlite.read() as connection:
        assert await connection.scalar(select(tables.tenants.c.name)) == "a\0b"


@pytest.mark.parametrize(
    ("database_url", "odd"),
    [("sqlite", "\ud800"), ("postgresql", "\ud800"), ("postgresql", "\0")],
    indirect=["database_url"],
)
async def test_what_is_no_text_is_the_callers_fault_and_nothing_is_written(database: Database, odd: str) -> None:
    with pytest.raises(InvalidRequestError, match="Nothing was changed"):
        await add_tenant(database, f"a{odd}")
    async with database.read() as connection:
        assert (await connection.execute(select(tables.tenants))).all() == []
