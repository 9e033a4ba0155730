"""`create`: a cocktail on a running server, from examples, weights, a target or a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cocktail_serve.api_client import ServerClient
from cocktail_serve.cli.client.cocktails import show_cocktail
from cocktail_serve.cli.client.options import ServerOptions
from cocktail_serve.cli.options import (
    AsJSON,
    MixtureOptions,
    OptionalExamplesFile,
    RecipeFile,
    WeightsOption,
    read_examples,
    with_options,
)
from cocktail_serve.cli.terminal import print_json, progress, stderr
from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.imported_recipe import read_recipe


@with_options
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the cocktail.", show_default=False)],
    *,
    pool: Annotated[
        str | None,
        typer.Option("--pool", help="Id of the pool; with --recipe the one of the recipe's base, if left out."),
    ] = None,
    examples: OptionalExamplesFile = None,
    weights: WeightsOption = None,
    recipe: RecipeFile = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            "--validation-examples",
            help="Examples that decide nothing: the loss of the mixture on them is told.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    options: MixtureOptions,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is ready.")] = True,
    server: ServerOptions,
    as_json: AsJSON = False,
) -> None:
    """Make a cocktail on a running server; the same name again makes a new version, which becomes current."""
    if examples is None and weights is None and recipe is None and options.target is None:
        raise typer.BadParameter("give --examples, --weights, --recipe or --target: there is nothing to mix")
    body = {"name": name, **options.body(examples=examples, merging_weights=weights, recipe=recipe)}
    if validation is not None:
        body["validation_examples"] = read_examples(validation)
    with server.client() as client, progress() as report:
        body["pool"] = pool or _pool_of(client, body.get("recipe"))
        made = client.call("POST", "/v1/cocktails", body)

        def tell(now: Mapping[str, Any]) -> None:
            report(f"making {now['id']}", round(100 * now["progress"]), 100)

        if wait:
            made = client.follow(made, tell)
    if as_json:
        print_json(made)
        return
    show_cocktail(made)
    if made["status"] == "ready" and made["kind"] == "decoder":
        stderr().print(f"ask it: cocktail-serve chat {made['name']}", markup=False)


def _pool_of(client: ServerClient, recipe: Any) -> str:
    """The only pool that the server has, or the only one of the recipe's base."""
    pools = client.call("GET", "/v1/pools")["data"]
    if recipe is not None:
        base = read_recipe(recipe).recipe.base
        pools = [pool for pool in pools if pool["base"]["fingerprint"] == base]
        if not pools:
            raise InvalidRequestError(
                f"{client.url} has no pool of the recipe's base {base[:12]}: have the operator serve one of the same "
                "files"
            )
    if len(pools) != 1:
        raise typer.BadParameter(
            f"name a pool; there are: {', '.join(pool['id'] for pool in pools)}", param_hint="--pool"
        )
    pool_id: str = pools[0]["id"]
    return pool_id
