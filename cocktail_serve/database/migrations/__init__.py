"""Brings a database to the tables of this release, from empty or from an earlier release's."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from cocktail_serve.database.sqlite_file import NO_REGISTRY
from cocktail_serve.errors import StorageError

FIRST_REVISION = "0001"

_BEFORE_ALEMBIC = {1: FIRST_REVISION}
"""Revision whose tables the first releases had, by the version that they wrote into `schema_info`."""


def head() -> str:
    """The revision whose tables this release reads."""
    return str(_scripts().get_current_head())


def revision_to_change(connection: Connection, *, may_change: bool, may_make: bool) -> str | None:
    """The revision of tables that hold something and that `migrate` would change; None: it changes none.

    Args:
        may_change: whether it may change some.
        may_make: whether it may make them where there are none.

    Raises:
        StorageError: the tables are a later release's; or an earlier one's, and may not be changed; or are missing, and
            may not be made.
    """
    found = MigrationContext.configure(connection).get_current_revision()
    if found == head():
        return None
    if found is None:
        found = _before_alembic(connection)
    elif found not in {script.revision for script in _scripts().walk_revisions()}:
        raise _of_another_release(found, head())
    if found is None and not may_make:
        raise StorageError(
            "the database of store.url holds no registry yet: the first start of the server makes it", code=NO_REGISTRY
        )
    if found is not None and not may_change:
        raise StorageError(
            f"the registry's tables are of revision {found} and this release reads {head()}; "
            "start the server of this release, which brings them up to date, and try again",
            code="registry_outdated",
        )
    return found


def migrate(connection: Connection) -> None:
    """Runs the revisions that a database lacks, in the connection's transaction; `revision_to_change` let it."""
    config = _config(connection)
    found = MigrationContext.configure(connection).get_current_revision()
    if found == head():
        return
    if found is None and (adopted := _before_alembic(connection)) is not None:
        connection.execute(text("DROP TABLE schema_info"))
        command.stamp(config, adopted)
    command.upgrade(config, "head")


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config(connection: Connection | None = None) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def _before_alembic(connection: Connection) -> str | None:
    if not inspect(connection).has_table("schema_info"):
        return None
    version = connection.execute(text("SELECT version FROM schema_info")).scalar_one()
    if version not in _BEFORE_ALEMBIC:
        raise _of_another_release(f"version {version}", FIRST_REVISION)
    return _BEFORE_ALEMBIC[version]


def _of_another_release(found: str, read: str | None) -> StorageError:
    return StorageError(
        f"the registry's tables are of revision {found!r}, which this release does not know (its own is {read!r}); "
        "use the release that wrote them, or set store.url to a new place"
    )
