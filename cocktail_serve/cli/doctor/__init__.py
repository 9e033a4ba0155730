"""`doctor`: what would stop a server from running well here, before it is started."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cocktail_serve.cli.doctor.configuration import check_config
from cocktail_serve.cli.doctor.finding import show
from cocktail_serve.cli.doctor.installation import check_installation
from cocktail_serve.cli.doctor.machine import check_machine
from cocktail_serve.cli.options import AsJSON
from cocktail_serve.cli.terminal import print_json, progress, stdout


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also check this configuration.", show_default=False)
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Check the installation, the machine and a configuration. Exits 1 if there is a problem."""
    checks = [*check_installation(), *check_machine()]
    with progress() as report:
        checks += [] if config is None else check_config(config, report)
    if as_json:
        print_json({"object": "diagnosis", "checks": [asdict(check) for check in checks]})
    else:
        console = stdout()
        for check in checks:
            show(console, check)
    if any(check.status == "problem" for check in checks):
        raise typer.Exit(1)
