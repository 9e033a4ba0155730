"""`usage`: what tenants used, from the store itself. Works beside a running server, which writes every second."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from cocktail_serve.cli.in_store import in_store
from cocktail_serve.cli.options import AsJSON, Config
from cocktail_serve.cli.terminal import ResultTable, print_json, stdout
from cocktail_serve.config import load_settings
from cocktail_serve.suggestions import did_you_mean
from cocktail_serve.usage.days import usage_days
from cocktail_serve.usage.store import AMOUNTS, GROUPS, UsageStore

_DAY = ["%Y-%m-%d"]


def usage(
    *,
    config: Config,
    tenant: Annotated[str | None, typer.Option(help="Whose; omitted: of all.", show_default=False)] = None,
    start: Annotated[
        datetime | None, typer.Option(formats=_DAY, help="First day, UTC; omitted: 29 days before the last one.")
    ] = None,
    end: Annotated[datetime | None, typer.Option(formats=_DAY, help="Last day, included; omitted: today.")] = None,
    group_by: Annotated[str, typer.Option(help=f"Some of {', '.join(GROUPS)}.")] = "day,tenant",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Show tokens, scoring and mixing seconds by day and tenant, or by what you say."""
    from cocktail_serve.gateway.schemas.usage import UsageList, UsageView, usage_csv

    if as_csv and as_json:
        raise typer.BadParameter("give one of --csv and --json", param_hint="--csv")
    wanted = [part.strip() for part in group_by.split(",") if part.strip()]
    groups = [group for group in GROUPS if group in wanted]
    unknown = sorted(set(wanted) - set(GROUPS))
    if unknown:
        meant = did_you_mean(unknown[0], GROUPS)
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(GROUPS)}{meant}", param_hint="--group-by")
    first, last = usage_days(start.date() if start else None, end.date() if end else None)

    settings = load_settings(config)
    sums = in_store(settings, lambda database: UsageStore(database).sums(first, last, group_by=groups, tenant=tenant))
    if as_csv:
        typer.echo(usage_csv(sums, groups), nl=False)
        return
    views = [UsageView.of(each) for each in sums]
    if as_json:
        print_json(UsageList(data=views).model_dump())
        return
    console = stdout()
    table = ResultTable(*groups)
    for amount in AMOUNTS:
        table.add_column(amount, justify="right")
    rows = [view.model_dump() for view in views]
    for row in rows:
        table.add_row(*(str(row[group]) for group in groups), *(f"{row[amount]:,}" for amount in AMOUNTS))
    if table.fits(console):
        console.print(table)
        return
    for row in rows:
        console.print("  ".join(str(row[group]) for group in groups), style="bold", markup=False)
        console.print("    " + "  ".join(f"{amount} {row[amount]:,}" for amount in AMOUNTS), markup=False)
