"""Brings a database to the tables of this release, from empty or from an earlier release's."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from cocktail_serve.errors import StorageError

_BEFORE_ALEMBIC = {1: "0001"}
"""Revision whose tables the first releases had, by the version that they wrote into `schema_info`."""


def needs_change(connection: Connection, *, may_change: bool) -> bool:
    """Whether `migrate` would change tables that hold something.

    Args:
        may_change: whether it may.

    Raises:
        StorageError: the tables are a later release's; or an earlier one's, and may not be changed.
    """
    scripts = ScriptDirectory.from_config(_config(connection))
    head = scripts.get_current_head()
    found = MigrationContext.configure(connection).get_current_revision()
    if found == head:
        return False
    adopted = None if found is not None else _before_alembic(connection)
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        raise _of_another_release(found, head)
    if not may_change and (found or adopted):
        raise StorageError(
            f"the registry's tables are of revision {found or adopted} and this release reads {head}; "
            "start the server of this release, which brings them up to date, and try again",
            code="registry_outdated",
        )
    return bool(found or adopted)


def migrate(connection: Connection) -> None:
    """Runs the revisions that a database lacks, in the connection's transaction; `needs_change` said that it may."""
    config = _config(connection)
    found = MigrationContext.configure(connection).get_current_revision()
    if found == ScriptDirectory.from_config(config).get_current_head():
        return
    if found is None and (adopted := _before_alembic(connection)) is not None:
        connection.execute(text("DROP TABLE schema_info"))
        command.stamp(config, adopted)
    command.upgrade(config, "head")


def _config(connection: Connection) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def _before_alembic(connection: Connection) -> str | None:
    if not inspect(connection).has_table("schema_info"):
        return None
    version = connection.execute(text("SELECT version FROM schema_info")).scalar_one()
    if version not in _BEFORE_ALEMBIC:
        raise _of_another_release(f"version {version}", "0001")
    return _BEFORE_ALEMBIC[version]


def _of_another_release(found: str, read: str | None) -> StorageError:
    return StorageError(
        f"the registry's tables are of revision {found!r}, which this release does not know (its own is {read!r}); "
        "use the release that wrote them, or set store.url to a new place"
    )
