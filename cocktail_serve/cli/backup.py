"""`backup`: a copy of the registry, made while the server runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cocktail_serve.cli.options import AsJSON, Config
from cocktail_serve.cli.terminal import print_json, stderr, stdout
from cocktail_serve.config import Settings, load_settings


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The copy to make.", show_default=False, dir_okay=False)],
    *,
    config: Config,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier copy of that name.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Copy the registry (SQLite) into a file, also while the server runs: whole, checked, as it is at one moment."""
    from cocktail_serve.database.backup import back_up
    from cocktail_serve.database.registry_file import registry_url

    settings = load_settings(config)
    with registry_url(settings.store, may_move=False) as url:
        made = back_up(url, file, overwrite=overwrite)
    not_held = _not_held(settings, config)
    if as_json:
        print_json(
            {
                "object": "backup",
                "registry": str(made.registry),
                "file": str(made.path),
                "bytes": made.num_bytes,
                "revision": made.revision,
                "counts": dict(made.counts),
                "not_held": not_held,
            }
        )
        return
    counted = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in made.counts.items())
    stdout().print(
        f"{made.path}: {made.num_bytes / 1e6:,.1f} MB, tables of revision {made.revision}, whole; {counted}",
        markup=False,
    )
    for each in not_held:
        stderr().print(f"not in it: {each}", markup=False)


def _not_held(settings: Settings, config: Path) -> list[str]:
    """What a server needs beside its registry."""
    models = {source.path for pool in settings.pools for source in (pool.base, *pool.experts.values())}
    return [
        f"the configuration {config}, and secrets of the environment such as COCKTAIL_ADMIN_KEY",
        f"the files of the {len(models)} models of the configuration, and of experts that were added",
    ]
