"""A configuration, and all it names."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_cache_path

from cocktail_serve.cli.doctor.finding import Check, tried
from cocktail_serve.cli.doctor.pools import check_pool
from cocktail_serve.config import Settings, load_settings
from cocktail_serve.database.sqlite_file import NO_REGISTRY, kept_copies
from cocktail_serve.errors import CocktailError, ConfigError
from cocktail_serve.pool import Pool
from cocktail_serve.progress import OnProgress
from cocktail_serve.tenants.keys import DEFAULT_TENANT

if TYPE_CHECKING:
    from cocktail_serve.database.database import Database


def check_config(path: Path, report: OnProgress) -> Iterator[Check]:
    """The configuration and all it names. What is wrong with one part does not hide the others."""
    try:
        settings = load_settings(path)
    except ConfigError as error:
        yield Check("configuration", "problem", error.message)
        return
    yield Check("configuration", "ok", f"{path}: {len(settings.pools)} pools")
    is_running = _is_running(settings)
    yield _RUNS if is_running else tried("address", partial(_check_address, settings))
    yield _check_auth(settings)
    yield _check_store(settings, is_running=is_running)
    for root in settings.server.expert_roots:
        yield _check_root(root)
    pools: dict[str, Pool] = {}
    for pool in settings.pools:
        yield from check_pool(settings, pool, report, pools)
    yield from _check_registry(settings, pools)


_RUNS = Check(
    "address",
    "warning",
    "a server of this configuration runs: its address and its store are in use",
    "end it before the next one is started",
)


def _is_running(settings: Settings) -> bool:
    """Whether one server has both the address and the store: then it is this configuration's, not somebody else's."""
    from cocktail_serve.gateway.run_dir import check_unused
    from cocktail_serve.gateway.server import bind

    try:
        with bind(settings.server):
            return False
    except ConfigError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno != errno.EADDRINUSE:
            return False
    try:
        check_unused(settings)
    except ConfigError:
        return True
    except CocktailError:
        pass
    return False


def _check_address(settings: Settings) -> str:
    from cocktail_serve.gateway.server import bind

    with bind(settings.server):
        return f"{settings.server.host}:{settings.server.port} is free"


def _check_auth(settings: Settings) -> Check:
    server = settings.server
    if not server.requires_key:
        detail = f"not required: {server.reason_open}"
        if server.is_on_loopback:
            return Check("keys", "ok", detail)
        return Check("keys", "warning", f"{detail}, though {server.host} is no loopback address", "set it to required")
    if settings.admin_key is None:
        return Check("keys", "problem", "required, and none is set", "set COCKTAIL_ADMIN_KEY, or listen on 127.0.0.1")
    return Check("keys", "ok", "required, and COCKTAIL_ADMIN_KEY is set")


def _check_store(settings: Settings, *, is_running: bool) -> Check:
    from cocktail_serve.gateway.run_dir import check_unused

    cache = settings.store.cache_dir
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check("store", "problem", f"{existing} cannot be written", "set store.cache_dir to a folder that can")
    try:
        if not is_running:
            check_unused(settings)
    except CocktailError as error:
        return Check("store", "problem", error.message)
    free, wanted = shutil.disk_usage(existing).free, int(settings.store.cache_bytes)
    detail = f"{cache}, {free / 1e9:.1f} GB free"
    if free < wanted:
        return Check(
            "store",
            "warning",
            f"{detail}, less than the {wanted / 1e9:.1f} GB of store.cache_bytes",
            "make room, or lower it",
        )
    return Check("store", "ok", detail)


def _check_root(root: Path) -> Check:
    name = f"expert root {root}"
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        return Check(name, "problem", "there is no such folder, or it cannot be read", "see server.expert_roots")
    if root.stat().st_mode & stat.S_IWOTH:
        return Check(name, "warning", "everybody on this machine may put models into it", f"chmod o-w {root}")
    return Check(name, "ok", "readable")


def _check_registry(settings: Settings, pools: dict[str, Pool]) -> list[Check]:
    """Whether the database can be used, and the experts that were added while a server ran. Makes no database."""
    from cocktail_serve.database.database import Database
    from cocktail_serve.database.registry_file import registry_url

    name = "registry"
    try:
        with registry_url(settings.store, may_move=False) as url:
            database = Database(url)
            where = (
                str(database.url.database) if database.is_sqlite else database.url.render_as_string(hide_password=True)
            )
            left_out, tenants = asyncio.run(_read_registry(database, settings, pools))
    except CocktailError as error:
        if error.code == NO_REGISTRY:
            return [Check(name, "ok", f"not there yet: made at the first start, in {where}")]
        if error.code == "registry_outdated":
            return [Check(name, "warning", error.message, "nothing, once servers of the earlier release have ended")]
        return [Check(name, "problem", error.message)]
    fix = "DELETE it under /admin/pools/{id}/experts, or put its folder back"
    return [
        Check(name, "ok", f"{where}: reachable, and its tables are this release's"),
        *_registry_in_cache(settings, where),
        *_copies(Path(where)),
        *_tenants_of_an_open_server(settings, tenants),
        *(Check(f"expert {model}", "problem", why, fix) for model, why in left_out.items()),
    ]


def _registry_in_cache(settings: Settings, where: str) -> Iterator[Check]:
    """A registry that may be cleared away as a cache."""
    name = "registry's place"
    if where == str(settings.store.former_registry_path):
        place = settings.store.registry_path
        yield Check(name, "warning", f"a cache, which may be cleared; the next start moves it to {place}")
    elif Path(where).is_relative_to(user_cache_path()):
        fix = "end the server, move the file with those beside it, and name it in store.url"
        yield Check(name, "warning", f"{where} lies in a cache, which may be cleared", fix)


def _copies(registry: Path) -> Iterator[Check]:
    """Copies that upgrades left."""
    copies = kept_copies(registry)
    if copies:
        size = sum(copy.stat().st_size for copy in copies)
        detail = f"{len(copies)} beside it, {size / 1e6:,.1f} MB, of before upgrades: {', '.join(map(str, copies))}"
        yield Check("registry's copies", "ok", detail, "delete them once you do not go back to an earlier release")


def _tenants_of_an_open_server(settings: Settings, tenants: Iterable[str]) -> Iterator[Check]:
    """Keys and limits that hold only for who sends a key, where nobody has to."""
    if settings.server.reason_open and (others := sorted(set(tenants) - {DEFAULT_TENANT})):
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        yield Check(
            "tenants",
            "warning",
            f"{shown}: who sends no key is answered too, as {DEFAULT_TENANT!r} ({settings.server.reason_open})",
            "set server.auth: required",
        )


async def _read_registry(
    database: Database, settings: Settings, pools: dict[str, Pool]
) -> tuple[Mapping[str, str], list[str]]:
    """Why which added experts are left out, and the tenants' names."""
    from cocktail_serve.cocktails.experts import Experts
    from cocktail_serve.tenants.store import TenantStore

    try:
        await database.open(as_server=False, may_make=False)
        experts = Experts(database, pools, {}, roots=settings.server.expert_roots, cache_dir=settings.store.cache_dir)
        left_out = await experts.load()
        return left_out, [tenant.name for tenant in await TenantStore(database).tenants()]
    finally:
        await database.close()
