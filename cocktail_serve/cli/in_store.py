"""Commands that work on the store itself, beside a running server, which follows within seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from cocktail_serve.cli.terminal import print_warnings, stderr
from cocktail_serve.config import Settings
from cocktail_serve.tenants.keys import DEFAULT_TENANT

if TYPE_CHECKING:
    from cocktail_serve.database.database import Database, DatabaseURL

_T = TypeVar("_T")


def in_store(settings: Settings, work: Callable[[Database], Awaitable[_T]]) -> _T:
    """The result of some work on the open store, which must be there: a mistyped place is not taken for a new one.

    Raises:
        ConfigError, StorageError: the store cannot be opened or used, or there is none.
    """
    from cocktail_serve.database.database import Database
    from cocktail_serve.database.registry_file import registry_url

    async def run(url: DatabaseURL) -> _T:
        database = Database(url)
        await database.open(as_server=False, may_make=False)
        try:
            return await work(database)
        finally:
            await database.close()

    with registry_url(settings.store) as url:
        return asyncio.run(run(url))


def warn_if_open(settings: Settings, tenant: str) -> None:
    """Says so where what was just said of a tenant holds only for who sends its keys, since others need none."""
    if reason := settings.server.reason_open:
        warning = (
            f"a server of this configuration asks for no key ({reason}): {tenant!r} is who sends one of its keys, and "
            f"whoever sends none is answered too, as {DEFAULT_TENANT!r}; set server.auth: required"
        )
        print_warnings(stderr(), [warning])
