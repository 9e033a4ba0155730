"""`chat`: a conversation with a model of a running server, token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

import typer

from cocktail_serve.api_client import ServerClient
from cocktail_serve.cli.client.options import ServerOptions
from cocktail_serve.cli.options import AsJSON, with_options
from cocktail_serve.cli.terminal import print_error, print_json, stderr
from cocktail_serve.errors import CocktailError

_PATH = "/v1/chat/completions"

Message = dict[str, str]


@with_options
def chat(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A cocktail, name@digest8, a pool, or pool/expert.", show_default=False),
    ],
    message: Annotated[
        str | None,
        typer.Argument(
            metavar="[MESSAGE]",
            help="Ask this and end; - reads it from stdin. Left out: a conversation, a line each, until Ctrl-D.",
            show_default=False,
        ),
    ] = None,
    *,
    system: Annotated[str | None, typer.Option(help="What goes before the conversation.", show_default=False)] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of sampling; the model's own if left out.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer; the server's own if left out.", show_default=False)
    ] = None,
    server: ServerOptions,
    as_json: AsJSON = False,
) -> None:
    """Ask a model of a running server; its answer is printed as it comes."""
    settings = {"temperature": temperature, "max_completion_tokens": max_tokens}
    body: dict[str, Any] = {"model": model, **{name: value for name, value in settings.items() if value is not None}}
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    if message == "-" or (message is None and not sys.stdin.isatty()):
        message = sys.stdin.read().strip()
    if message is not None and not message:
        raise typer.BadParameter("the message is empty", param_hint="MESSAGE")
    with server.client() as client:
        if message is not None:
            body["messages"] = [*messages, {"role": "user", "content": message}]
            if as_json:
                print_json(client.call("POST", _PATH, body))
            else:
                _print_answer(client, body)
            return
        if as_json:
            raise typer.BadParameter("a conversation is no JSON object: give a message", param_hint="--json")
        _converse(client, body, messages)


def _converse(client: ServerClient, body: dict[str, Any], messages: list[Message]) -> None:
    """Until the input ends. What fails is told and not part of the conversation."""
    with suppress(ImportError):
        import readline  # noqa: F401 # gives `input` a history

    stderr().print(f"{body['model']} on {client.url}; Ctrl-D ends", markup=False)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            stderr().print()
            return
        if not said:
            continue
        asked = [*messages, {"role": "user", "content": said}]
        try:
            answer = _print_answer(client, {**body, "messages": asked})
        except CocktailError as error:
            print_error(error.message)
        except KeyboardInterrupt:  # of this answer; at the prompt it ends the conversation
            stderr().print("(interrupted)", markup=False)
        else:
            messages = [*asked, {"role": "assistant", "content": answer}]


def _print_answer(client: ServerClient, body: dict[str, Any]) -> str:
    """The answer, which is on stdout by then, token by token."""
    parts: list[str] = []
    try:
        for part in _content(client, body):
            sys.stdout.write(part)
            sys.stdout.flush()
            parts.append(part)
    finally:
        if parts and not parts[-1].endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    return "".join(parts)


def _content(client: ServerClient, body: dict[str, Any]) -> Iterator[str]:
    for chunk in client.stream(_PATH, body):
        for choice in chunk["choices"]:
            content = choice["delta"].get("content")
            if content:
                yield content
            if choice.get("finish_reason") == "length":
                stderr().print("(cut off at the limit of tokens; see --max-tokens)", markup=False)
