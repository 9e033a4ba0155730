"""`demo`: every kind of pool on real engines, cocktails made and used while the server runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cocktail_serve.cli.options import AsJSON
from cocktail_serve.cli.terminal import print_json, stderr, stdout

if TYPE_CHECKING:
    from cocktail_serve.cli.demo.pools import DemoPools
    from cocktail_serve.cli.demo.report import Narrator

DEFAULT_FOLDER = Path("~/.cache/cocktail-serve/demo")
DEFAULT_PORT = 8000


def demo(
    serve: Annotated[bool, typer.Option("--serve", help="Leave the server running afterwards.")] = False,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Port of the server; omitted: a free one, 8000 with --serve.", show_default=False
        ),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Show the whole product: small pools on real engines and a chat model, a cocktail of each, before and after.

    Needs no network and no GPU. What is made once is kept in ~/.cache/cocktail-serve/demo (COCKTAIL_DEMO_DIR).
    """
    from cocktail_serve.cli.demo.pools import prepare

    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _end)  # a supervisor's stop and a closed terminal end the server too
    pools = prepare(Path(os.environ.get("COCKTAIL_DEMO_DIR") or DEFAULT_FOLDER).expanduser().absolute())

    from cocktail_serve.cli.demo.report import Narrator
    from cocktail_serve.cli.demo.server import DemoServer

    narrator = Narrator(stderr() if as_json else stdout())
    default_port = DEFAULT_PORT if serve else 0
    with DemoServer(pools, port=default_port if port is None else port, keep=serve) as server:
        server.wait_until_ready()
        result = _tour(server.url, pools, narrator)
        if as_json:
            print_json(result | {"url": server.url, "start_seconds": round(server.start_seconds, 1)})
        if serve:
            narrator.serving(server.url)
            with contextlib.suppress(KeyboardInterrupt):  # the way to end it, as it just said
                server.wait()


def _tour(url: str, pools: DemoPools, narrator: Narrator) -> dict[str, Any]:
    from cocktail_serve.cli.demo import report
    from cocktail_serve.cli.demo.tour import Tour

    tour = Tour(url, pools)
    try:
        narrator.decoder_task(pools)
        travel = tour.make_travel()
        narrator.made(travel)
        answers = tour.ask()
        narrator.answers(answers)
        narrator.encoder_task(pools)
        office = tour.make_office()
        narrator.made(office)
        rankings = tour.search()
        narrator.rankings(rankings, pools.search.documents)
        chat = None
        if pools.chat is None:
            narrator.no_chat_task()
        else:
            narrator.chat_task(pools.chat)
            desk = tour.make_desk(pools.chat)
            narrator.made(desk)
            desk_answers = tour.ask_desk(pools.chat, desk)
            narrator.chat_answers(desk_answers)
            together = tour.ask_together(pools.chat)
            narrator.together(together)
            chat = (desk, desk_answers, together)
        narrator.what_next(url, pools)
    finally:
        tour.close()
    return report.as_json(travel, answers, office, rankings, pools.search.documents, chat=chat)


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)
