"""`list`, `show`, `report`, `export`, `pin` and `delete`: a tenant's cocktails on a running server."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import typer

from cocktail_serve.api_client import ServerClient
from cocktail_serve.cli.client.options import Ref, ServerOptions, path_of
from cocktail_serve.cli.options import AsJSON, with_options
from cocktail_serve.cli.terminal import (
    ResultTable,
    print_json,
    print_warnings,
    progress,
    stderr,
    stdout,
    weighing_table,
)
from cocktail_serve.cli.weigh import show as show_weighing

REPORT_POLL_S = 0.5

_FIGURES = {
    "mixed_loss": "loss of the mixture on the examples that it was weighed with",
    "held_out_loss": "held out: each under a mixture weighed without it",
    "best_expert_held_out_loss": "held out: each under the expert that the others choose",
    "validation_loss": "loss of the mixture on the validation examples",
}
"""Figures of a report by field, and what each is."""


@with_options
def list_cocktails(
    *,
    name: Annotated[str | None, typer.Option(help="Only versions of this name.", show_default=False)] = None,
    models: Annotated[
        bool, typer.Option("--models", help="List what can be asked instead: pools, experts and cocktails.")
    ] = False,
    server: ServerOptions,
    as_json: AsJSON = False,
) -> None:
    """List the tenant's cocktails on a running server, the newest first."""
    if models and name is not None:
        raise typer.BadParameter("give one of --models and --name", param_hint="--models")
    with server.client() as client:
        told = client.call("GET", "/v1/models") if models else _all_cocktails(client, name)
    if as_json:
        print_json(told)
        return
    if models:
        table = ResultTable("id", "kind", "pool", "owned by")
        for model in told["data"]:
            table.add_row(model["id"], model["kind"], model["pool"], model["owned_by"])
    else:
        table = ResultTable("id", "current", "status", "pool", "loss", "made")
        for each in told["data"]:
            loss = "" if each["mixed_loss"] is None else f"{each['mixed_loss']:.3f}"
            current = "*" if each["current"] else ""
            table.add_row(each["id"], current, each["status"], each["pool"], loss, _moment(each["created_at"]))
    if told["data"]:
        stdout().print(table)
    else:
        stderr().print("no cocktails; `cocktail-serve create` makes one, `list --models` shows pools", markup=False)


@with_options
def show(ref: Ref, *, server: ServerOptions, as_json: AsJSON = False) -> None:
    """Show a cocktail of a running server: what it is made of, and why."""
    with server.client() as client:
        cocktail = client.call("GET", path_of(ref))
    if as_json:
        print_json(cocktail)
    else:
        show_cocktail(cocktail)


def show_cocktail(cocktail: Mapping[str, Any]) -> None:
    """A cocktail, as the API shows it, for reading."""
    console, recipe = stdout(), cocktail["recipe"]
    what = [cocktail["status"], f"pool {cocktail['pool']}", f"made {_moment(cocktail['created_at'])}"]
    what += ["current"] if cocktail["current"] else []
    console.print(f"{cocktail['id']}: {', '.join(what)}", style="bold", markup=False)
    if cocktail["losses"] or cocktail["merging_weights"]:
        told = [] if recipe is None else [f"recipe {recipe['digest'][:12]} ({recipe['dtype']}, {recipe['form']})"]
        show_weighing(console, cocktail, *told)
    else:
        print_warnings(console, cocktail["warnings"])
    if cocktail["error"] is not None:
        console.print(f"error: {cocktail['error']['message']}", style="red", markup=False)


@with_options
def report(
    ref: Ref,
    *,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the verdict is there.")] = True,
    server: ServerOptions,
    as_json: AsJSON = False,
) -> None:
    """Tell whether a cocktail of a running server is worth using: losses, weights and the verdict."""
    with server.client() as client, progress() as tell:
        told = client.call("GET", f"{path_of(ref)}/report")
        while wait and told["report_status"] == "pending" and told["status"] not in ("failed", "cancelled"):
            tell("finding out what it can be expected to do", 0, 1)
            time.sleep(REPORT_POLL_S)
            told = client.call("GET", f"{path_of(told['id'])}/report")
            if told["report_status"] == "ready":
                tell("finding out what it can be expected to do", 1, 1)
    if as_json:
        print_json(told)
        return
    console = stdout()
    losses = {model["model"]: model["loss"] for model in told["models"] if model["loss"] is not None}
    weights = {model["model"]: model["merging_weight"] or 0.0 for model in told["models"]}
    console.print(f"{told['id']}: {told['status']}", style="bold", markup=False)
    console.print(weighing_table(losses, weights))
    for field, what in _FIGURES.items():
        if told[field] is not None:
            console.print(f"{what}: {told[field]:.3f} nats", markup=False)
    print_warnings(console, told["warnings"])
    verdict = told["verdict"] or ("the verdict is not there yet" if told["report_status"] == "pending" else None)
    if verdict is not None:
        console.print(verdict, style="bold", markup=False)


@with_options
def export(
    ref: Ref,
    *,
    server: ServerOptions,
    as_json: AsJSON = False,  # there is no other form
) -> None:
    """Print the recipe of a cocktail: `create --recipe` makes it on another server, `mix --recipe` as a folder.

    A few hundred bytes of JSON that name models by their content; they make the same mixture bit for bit.
    """
    with server.client() as client:
        print_json(client.call("GET", f"{path_of(ref)}/recipe"))


@with_options
def pin(
    ref: Ref,
    *,
    newest: Annotated[bool, typer.Option("--newest", help="Take the pin of a name away.")] = False,
    server: ServerOptions,
    as_json: AsJSON = False,
) -> None:
    """Make a version current, whatever becomes ready later; with --newest the name means its newest again."""
    name, at, _ = ref.partition("@")
    if newest == bool(at):
        raise typer.BadParameter("give a version, as films@1a2b3c4d, or a name and --newest", param_hint="NAME")
    with server.client() as client:
        told = client.call("PATCH", path_of(name), {"current": None if newest else ref})
    if as_json:
        print_json(told)
    else:
        stdout().print(f"{name} is {told['id']}", markup=False)


@with_options
def delete(
    ref: Ref,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask no question before all versions of a name go.")] = False,
    server: ServerOptions,
    as_json: AsJSON = False,
) -> None:
    """Delete a version, or all versions of a name, with examples and losses."""
    with server.client() as client:
        if "@" not in ref and not yes:
            _confirm(ref, len(client.call("GET", "/v1/cocktails", params={"name": ref})["data"]))
        told = client.call("DELETE", path_of(ref))
    if as_json:
        print_json(told)
    else:
        stdout().print(f"deleted {ref}", markup=False)


def _confirm(name: str, num_versions: int) -> None:
    if num_versions < 2:
        return  # it goes, or the server says that there is none
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"{name!r} has {num_versions} versions, which all go: give --yes, or name one")
    typer.confirm(f"delete all {num_versions} versions of {name}?", abort=True, err=True)


def _all_cocktails(client: ServerClient, name: str | None) -> dict[str, Any]:
    """The whole list, whatever its pages."""
    params = {} if name is None else {"name": name}
    told = page = client.call("GET", "/v1/cocktails", params=params)
    while page["has_more"]:
        page = client.call("GET", "/v1/cocktails", params={**params, "after": page["last_id"]})
        told = {**told, "data": [*told["data"], *page["data"]], "last_id": page["last_id"], "has_more": False}
    return told


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
