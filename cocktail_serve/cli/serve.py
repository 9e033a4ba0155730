"""`serve`: the server of a configuration."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from cocktail_serve.cli.first_steps import first_steps
from cocktail_serve.cli.options import AsJSON, ConfigFile
from cocktail_serve.cli.terminal import print_json, progress, stderr
from cocktail_serve.config import load_settings
from cocktail_serve.library_process import LibraryProcess
from vllm_cocktail.lifetime import die_with_owner


def serve(
    config: ConfigFile,
    *,
    host: Annotated[str | None, typer.Option(help="Overrides server.host.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Overrides server.port; 0: a free one.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Serve the pools of a configuration until interrupted."""
    die_with_owner()
    settings = load_settings(config)
    changed = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    settings = settings.model_copy(update={"server": settings.server.model_copy(update=changed)})

    from cocktail_serve import logs
    from cocktail_serve.engines import check_installed
    from cocktail_serve.gateway.server import check_start
    from cocktail_serve.gateway.server import serve as serve_forever

    settings.check_servable()
    for pool in settings.pools:
        check_installed(pool)
    logs.configure(settings.server.log_format, settings.server.log_level)
    check_start(settings)  # before gigabytes are read
    if any(pool.is_computed_here for pool in settings.pools):
        from cocktail_serve.engines.in_process.openmp import import_torch_waiting_passively

        import_torch_waiting_passively()  # before anything else imports torch

    from cocktail_serve.offline.opened import open_with_progress

    with progress() as report, LibraryProcess() as libraries:
        pools = {pool.id: open_with_progress(settings, pool, report, call=libraries.call) for pool in settings.pools}

    def announce(url: str) -> None:
        if as_json:
            print_json({"object": "server", "url": url, "pools": list(pools)})
        else:
            stderr().print(f"listening on {url}; engines are starting, {url}/ready tells when", markup=False)

    def show_first_steps(url: str) -> None:
        if not as_json and settings.server.log_format == "text":
            for line in first_steps(pools, url=url, requires_key=settings.server.requires_key):
                stderr().print(line, markup=False)

    with contextlib.suppress(KeyboardInterrupt):  # the way to end it; uvicorn raises it again when all has ended
        serve_forever(settings, pools=pools, on_listening=announce, on_ready=show_first_steps)
