"""Which server the commands ask, and by what key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote

import typer

from cocktail_serve.api_client import DEFAULT_SERVER, ServerClient

SERVER_VARIABLE = "COCKTAIL_BASE_URL"
KEY_VARIABLE = "COCKTAIL_API_KEY"
OPENAI_SERVER_VARIABLE = "OPENAI_BASE_URL"
OPENAI_KEY_VARIABLE = "OPENAI_API_KEY"
"""What OpenAI's own clients read."""

Ref = Annotated[
    str, typer.Argument(metavar="NAME", help="A cocktail's name, or a version: name@digest8.", show_default=False)
]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The options of every command that asks a server."""

    server: Annotated[
        str | None,
        typer.Option(
            envvar=SERVER_VARIABLE,
            metavar="URL",
            help=f"The server; {OPENAI_SERVER_VARIABLE} if left out, else {DEFAULT_SERVER}.",
            show_default=False,
        ),
    ] = None
    key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY_VARIABLE,
            help=f"The tenant's key; {OPENAI_KEY_VARIABLE} where the server is that of {OPENAI_SERVER_VARIABLE}.",
            show_default=False,
        ),
    ] = None

    def client(self, environ: Mapping[str, str] = os.environ) -> ServerClient:
        """A client of the server that is meant. A key of OpenAI's variables goes to no other server than theirs."""
        server, key = self.server, self.key
        if not server:
            server = environ.get(OPENAI_SERVER_VARIABLE)
            key = key or (environ.get(OPENAI_KEY_VARIABLE) if server else None)
        return ServerClient(server or DEFAULT_SERVER, key or None)


def path_of(ref: str) -> str:
    """The path of a cocktail in the API."""
    return f"/v1/cocktails/{quote(ref, safe='@')}"
