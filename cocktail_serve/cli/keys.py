"""`keys`: the tenants' keys, in the store itself. Works beside a running server, which follows within seconds."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cocktail_serve.cli.in_store import in_store, warn_if_open
from cocktail_serve.cli.options import AsJSON, Config
from cocktail_serve.cli.terminal import ResultTable, print_json, stderr, stdout
from cocktail_serve.config import Settings, load_settings
from cocktail_serve.tenants.keys import DEFAULT_SCOPES, Key, check_scopes
from cocktail_serve.usage.actor import CLI

if TYPE_CHECKING:
    from cocktail_serve.tenants.store import TenantStore

keys = typer.Typer(name="keys", help="Make, list, revoke and rotate the tenants' API keys.", no_args_is_help=True)

TenantOption = Annotated[str, typer.Option(help="Whose key.", show_default=False)]
OptionalTenant = Annotated[str | None, typer.Option(help="Whose key.", show_default=False)]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The visible part of the key: ck-ID-...", show_default=False)]

_T = TypeVar("_T")

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """`90d`, `12h`, `30m` or `45s` in seconds; `0` is 0.

    Raises:
        typer.BadParameter: not of that form.
    """
    form = re.fullmatch(r"(\d+)([smhd])|0", text)
    if form is None:
        raise typer.BadParameter(f"{text!r} is not a time such as 90d, 12h, 30m or 45s")
    return 0.0 if text == "0" else int(form[1]) * _SECONDS[form[2]]


@keys.command("create")
def create(
    *,
    config: Config,
    tenant: TenantOption,
    scopes: Annotated[str, typer.Option(help="Some of use, create, admin; create contains use.")] = ",".join(
        DEFAULT_SCOPES
    ),
    expires: Annotated[
        str | None, typer.Option(help="How long it is valid, as 90d, 12h, 30m; omitted: no end.", show_default=False)
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Make a key. It is shown this once; the store keeps a digest."""
    lifetime_s = None if expires is None else parse_duration(expires)
    if lifetime_s == 0:
        raise typer.BadParameter("must be longer than nothing", param_hint="--expires")
    wanted = check_scopes(part.strip() for part in scopes.split(",") if part.strip())
    settings = load_settings(config)
    made = _in_store(settings, lambda store: store.create_key(tenant, wanted, lifetime_s=lifetime_s, actor=CLI))
    _show_created(settings, *made, as_json)


@keys.command("list")
def list_keys(*, config: Config, tenant: OptionalTenant = None, as_json: AsJSON = False) -> None:
    """List keys without their secrets, those that ended too."""
    from cocktail_serve.gateway.schemas.admin import KeyList, KeyView

    found = _in_store(load_settings(config), lambda store: store.keys(tenant))
    if as_json:
        print_json(KeyList(data=[KeyView.of(key) for key in found]).model_dump())
        return
    table = ResultTable("id", "tenant", "scopes", "status", "created", "expires")
    for key in found:
        status, scopes = KeyView.of(key).status, ",".join(sorted(key.scopes))
        table.add_row(key.id, key.tenant, scopes, status, _date(key.created_at), _date(key.expires_at))
    stdout().print(table)


@keys.command("revoke")
def revoke(key_id: KeyId, *, config: Config, tenant: OptionalTenant = None, as_json: AsJSON = False) -> None:
    """End a key. A running server refuses it within five seconds."""
    from cocktail_serve.gateway.schemas.admin import KeyView

    settings = load_settings(config)
    key = _in_store(settings, lambda store: store.revoke(key_id, tenant=tenant, actor=CLI))
    warn_if_open(settings, key.tenant)
    if as_json:
        print_json(KeyView.of(key).model_dump())
    else:
        stdout().print(f"revoked {key.id} of {key.tenant}", markup=False)


@keys.command("rotate")
def rotate(
    key_id: KeyId,
    *,
    config: Config,
    tenant: OptionalTenant = None,
    overlap: Annotated[str, typer.Option(help="How long the old key stays valid; 0 ends it at once.")] = "1d",
    as_json: AsJSON = False,
) -> None:
    """Make a key like another, which ends after the overlap."""
    overlap_s = parse_duration(overlap)
    settings = load_settings(config)
    made = _in_store(settings, lambda store: store.rotate(key_id, overlap_s=overlap_s, tenant=tenant, actor=CLI))
    _show_created(settings, *made, as_json)


def _in_store(settings: Settings, work: Callable[[TenantStore], Awaitable[_T]]) -> _T:
    from cocktail_serve.tenants.store import TenantStore

    return in_store(settings, lambda database: work(TenantStore(database)))


def _show_created(settings: Settings, key: Key, secret: str, as_json: bool) -> None:
    from cocktail_serve.gateway.schemas.admin import CreatedKey

    warn_if_open(settings, key.tenant)
    if as_json:
        print_json(CreatedKey.made(key, secret).model_dump())
        return
    stderr().print(f"key {key.id} of {key.tenant}; it is not shown again", markup=False)
    stdout().print(secret, markup=False)


def _date(moment: float | None) -> str:
    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(moment))
