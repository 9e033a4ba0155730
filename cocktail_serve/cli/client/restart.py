"""`restart`: the engines of a pool on a running server, one after the other."""

from __future__ import annotations

import time
from typing import Annotated, Any
from urllib.parse import quote

import typer

from cocktail_serve.cli.client.options import ServerOptions
from cocktail_serve.cli.options import AsJSON, with_options
from cocktail_serve.cli.terminal import print_json, progress, stdout
from cocktail_serve.errors import EngineError

POLL_S = 0.5


@with_options
def restart(
    pool: Annotated[str, typer.Argument(help="Id of the pool.", show_default=False)],
    *,
    drain_s: Annotated[
        float, typer.Option(min=0, help="How long what a replica has in flight may take before it is ended, seconds.")
    ] = 600.0,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until all are ready again.")] = True,
    server: ServerOptions,
    as_json: AsJSON = False,
) -> None:
    """Restart the replicas of a pool on a running server, one after the other: the others answer meanwhile.

    Needs a key of the scope admin.
    """
    path = f"/admin/engines/{quote(pool, safe='')}"
    with server.client() as client, progress() as tell:
        told = client.call("POST", f"{path}/restart", {"drain_s": drain_s})
        while wait and _goes_on(told):
            tell(f"restarting {pool}", told["restart"]["done"], told["restart"]["total"])
            time.sleep(POLL_S)
            told = client.call("GET", path)
        if wait and told["restart"]["error"] is None:
            tell(f"restarting {pool}", told["restart"]["done"], told["restart"]["total"])
    if as_json:
        print_json(told)
    if wait and told["restart"]["error"] is not None:
        raise EngineError(f"the restart of {pool} was given up: {told['restart']['error']}")
    if not as_json:
        done = f"{told['restart']['done']} of {told['restart']['total']} replicas restarted"
        stdout().print(done if wait else f"begun: {done}", markup=False)


def _goes_on(told: dict[str, Any]) -> bool:
    return told["restart"]["error"] is None and told["restart"]["done"] < told["restart"]["total"]
