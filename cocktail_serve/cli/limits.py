"""`limits`: what tenants may use, in the store itself. Works beside a running server, which follows within seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from cocktail_serve.cli.in_store import in_store, warn_if_open
from cocktail_serve.cli.options import AsJSON, Config
from cocktail_serve.cli.terminal import ResultTable, print_json, stdout
from cocktail_serve.config import Limits, Settings, load_settings
from cocktail_serve.suggestions import did_you_mean
from cocktail_serve.tenants.keys import DEFAULT_TENANT, check_tenant
from cocktail_serve.tenants.limits import merged
from cocktail_serve.usage.actor import CLI

if TYPE_CHECKING:
    from cocktail_serve.database.database import Database
    from cocktail_serve.tenants.store import Tenant

limits = typer.Typer(name="limits", help="Show, set and unset what each tenant may use.", no_args_is_help=True)

NAMES = tuple(Limits.model_fields)

OwnLimits = Mapping[str, int | None]
Changed = Callable[[OwnLimits], OwnLimits]
"""From the limits that a tenant has of its own to those that it is to have."""

TenantName = Annotated[str, typer.Option("--tenant", help="Whose limits.", show_default=False)]


@limits.command("show")
def show(
    *,
    config: Config,
    tenant: Annotated[str | None, typer.Option(help="Whose limits; omitted: all tenants'.", show_default=False)] = None,
    as_json: AsJSON = False,
) -> None:
    """Show the limits that hold, those of the configuration included."""
    from cocktail_serve.tenants.store import TenantStore

    settings = load_settings(config)
    found = in_store(settings, lambda database: TenantStore(database).tenants())
    _print(settings, found if tenant is None else [_named(tenant, found)], as_json=as_json)


@limits.command("set")
def set_limits(
    pairs: Annotated[
        list[str],
        typer.Argument(
            metavar="LIMIT=NUMBER",
            help=f"What it may use, as cocktails=10 or cocktails=none; some of {', '.join(NAMES)}.",
            show_default=False,
        ),
    ],
    *,
    config: Config,
    tenant: TenantName,
    new: Annotated[bool, typer.Option("--new", help="Of a tenant that has no key yet.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Say what a tenant may use instead of what the configuration says. Its other limits stay as they are."""
    settings, wanted = load_settings(config), parse_limits(pairs)
    # everybody who sends no key is of that tenant, though nobody made it
    may_make = new or tenant == DEFAULT_TENANT
    _change(settings, tenant, lambda own: {**own, **wanted}, as_json=as_json, may_make=may_make)
    if tenant != DEFAULT_TENANT:
        warn_if_open(settings, tenant)


@limits.command("unset")
def unset(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="LIMIT", help="Which; omitted: all of its own.", show_default=False),
    ] = None,
    *,
    config: Config,
    tenant: TenantName,
    as_json: AsJSON = False,
) -> None:
    """Go back to what the configuration says."""
    gone = [_known(name) for name in names or NAMES]
    _change(
        load_settings(config),
        tenant,
        lambda own: {name: own[name] for name in own if name not in gone},
        as_json=as_json,
        may_make=False,
    )


def parse_limits(pairs: Sequence[str]) -> dict[str, int | None]:
    """`["cocktails=10", "example_bytes=none"]` as limits by name; `none` is no limit.

    Raises:
        typer.BadParameter: not of that form, an unknown limit, or no number that it takes; names the part.
    """
    wanted: dict[str, str | None] = {}
    for pair in pairs:
        name, separator, value = (piece.strip() for piece in pair.partition("="))
        if not separator:
            raise typer.BadParameter(f"{pair!r} is not LIMIT=NUMBER, as in cocktails=10 or cocktails=none")
        wanted[_known(name)] = None if value == "none" else value
    try:
        return Limits.model_validate(wanted).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from error


def _known(name: str) -> str:
    if name not in NAMES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    return name


def _named(tenant: str, found: Iterable[Tenant]) -> Tenant:
    from cocktail_serve.errors import NotFoundError

    for each in found:
        if each.name == tenant:
            return each
    raise NotFoundError(
        f"there is no tenant {tenant!r}; its first key or limit makes it: keys create, or limits set --new",
        param="tenant",
    )


def _change(settings: Settings, tenant: str, changed: Changed, *, as_json: bool, may_make: bool) -> None:
    from cocktail_serve.tenants.store import TenantStore

    async def change(database: Database) -> Tenant:
        store = TenantStore(database)
        check_tenant(tenant)
        if not may_make:
            _named(tenant, await store.tenants())
        return await store.change_limits(tenant, changed, actor=CLI)

    _print(settings, [in_store(settings, change)], as_json=as_json)


def _print(settings: Settings, tenants: Sequence[Tenant], *, as_json: bool) -> None:
    from cocktail_serve.gateway.schemas.admin import TenantList, TenantView

    views = [TenantView.of(tenant, merged(settings.limits, tenant.limits)) for tenant in tenants]
    if as_json:
        print_json(TenantList(data=views).model_dump())
        return
    table = ResultTable("tenant", "limit")
    table.add_column("value", justify="right")
    table.add_column("said by")
    for view in views:
        for name, limit in view.limits.items():
            said_by = "the operator" if name in view.own_limits else "the configuration"
            table.add_row(view.name, name, "none" if limit is None else f"{limit:,}", said_by)
    stdout().print(table)
