"""`cocktail-serve`: one module per command, loaded when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from cocktail_serve.build import versions
from cocktail_serve.cli.backup import backup as backup_command
from cocktail_serve.cli.client.chat import chat as chat_command
from cocktail_serve.cli.client.cocktails import delete as delete_command
from cocktail_serve.cli.client.cocktails import export as export_command
from cocktail_serve.cli.client.cocktails import list_cocktails as list_command
from cocktail_serve.cli.client.cocktails import pin as pin_command
from cocktail_serve.cli.client.cocktails import report as report_command
from cocktail_serve.cli.client.cocktails import show as show_command
from cocktail_serve.cli.client.create import create as create_command
from cocktail_serve.cli.client.restart import restart as restart_command
from cocktail_serve.cli.demo import demo as demo_command
from cocktail_serve.cli.doctor import doctor as doctor_command
from cocktail_serve.cli.eval import evaluate as eval_command
from cocktail_serve.cli.extract import extract as extract_command
from cocktail_serve.cli.import_openai import import_openai as import_openai_command
from cocktail_serve.cli.init import init as init_command
from cocktail_serve.cli.inspect import inspect as inspect_command
from cocktail_serve.cli.keys import keys as keys_commands
from cocktail_serve.cli.limits import limits as limits_commands
from cocktail_serve.cli.mix import mix as mix_command
from cocktail_serve.cli.serve import serve as serve_command
from cocktail_serve.cli.terminal import print_error
from cocktail_serve.cli.usage import usage as usage_command
from cocktail_serve.cli.weigh import weigh as weigh_command
from cocktail_serve.errors import ClientError, CocktailError
from cocktail_serve.loading import missing_library

app = typer.Typer(
    name="cocktail-serve",
    help="Task models mixed from fine-tuned models you own, served behind the OpenAI API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a fault of ours shows Python's own traceback; the user's are told in one line
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(init_command)
app.command("serve")(serve_command)
app.command("weigh")(weigh_command)
app.command("mix")(mix_command)
app.command("extract")(extract_command)
app.command("inspect")(inspect_command)
app.command("eval")(eval_command)
app.command("doctor")(doctor_command)
app.command("demo")(demo_command)
app.command("import-openai")(import_openai_command)
app.command("usage")(usage_command)
app.command("backup")(backup_command)
app.command("list")(list_command)
app.command("show")(show_command)
app.command("create")(create_command)
app.command("chat")(chat_command)
app.command("report")(report_command)
app.command("export")(export_command)
app.command("pin")(pin_command)
app.command("delete")(delete_command)
app.command("restart")(restart_command)
app.add_typer(keys_commands)
app.add_typer(limits_commands)


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 done, 2 usage or bad input, 1 failure; 130 when interrupted."""
    words = sys.argv[1:] if args is None else list(args)
    try:
        app(words, obj=["cocktail-serve", *words])  # what was typed, for commands that tell how to repeat them
    except CocktailError as error:
        print_error(error.message)
        sys.exit(2 if isinstance(error, ClientError) else 1)
    except ModuleNotFoundError as error:
        missing = missing_library(error)
        if missing is None:
            raise
        print_error(missing.message)
        sys.exit(2)
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit; build, vLLM, torch and Python go to stderr."
    ),
) -> None:
    if version:
        found = versions()
        typer.echo(found.pop("cocktail-serve"))
        for name, number in found.items():
            typer.echo(f"{name} {number or ('not known' if name == 'build' else 'not installed')}", err=True)
        raise typer.Exit
