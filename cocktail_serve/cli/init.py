"""`init`: a configuration of the models that lie in some folders."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cocktail_serve.cli.doctor.finding import Check, show
from cocktail_serve.cli.options import AsJSON
from cocktail_serve.cli.terminal import print_json, progress, stdout
from cocktail_serve.config import load_settings
from cocktail_serve.errors import ConfigError, StorageError
from cocktail_serve.progress import OnProgress
from vllm_cocktail.launch import is_cpu_build

if TYPE_CHECKING:
    from rich.console import Console

    from cocktail_serve.checkpoints.model_folders import LeftOut
    from cocktail_serve.offline.proposal import Proposal
    from cocktail_serve.pool import Pool

CONFIG_FILE = Path("cocktail-serve.yaml")

GPU_SHARE = 0.9
"""Of a GPU's memory, for all decoder pools together."""

_HEADER = """\
# Made by `{command}`.
# `cocktail-serve doctor {file}` checks it, `cocktail-serve serve {file}` serves it; paths are relative to this file.
# Every key, and what it is when it is left out: docs/reference/config.md.
"""
_LIMITED = "a context of at most {tokens} tokens; the base's own is longer, and needs a larger KV cache"


def init(
    context: typer.Context,
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Folders with models in or below them.", show_default=False),
    ],
    *,
    base: Annotated[
        list[Path] | None,
        typer.Option("--base", help="Folder of a base, where nothing else says which is; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="File to write; must not exist.")] = CONFIG_FILE,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Try each pool as `doctor` does: every model is read once.")
    ] = True,
    as_json: AsJSON = False,
) -> None:
    """Find bases, their experts and adapters among folders and write the configuration that serves them.

    Full models and adapters are taken as publishers, peft, trainers and the hub's cache save them. What is left out is
    told with the reason. Exits 1, with nothing written, where `doctor` would find a problem.
    """
    from cocktail_serve.checkpoints.model_folders import find_model_folders
    from cocktail_serve.offline.proposal import propose

    if out.exists():
        raise ConfigError(f"{out} exists, and nothing is overwritten: name another file with --out", param="out")
    with progress() as report:
        models, left_out = find_model_folders(folders)
        proposal = propose(models, bases=base or (), report=report)
        proposal.left_out[:0] = left_out
        if not proposal.pools:
            raise ConfigError(f"no base with an expert lies in these folders{_reasons(proposal.left_out)}")
        text = _text(proposal, out, command=context.obj)
        with _written(out, text) as draft:
            checks = _checks(draft, report) if check else []
            is_sound = not any(each.status == "problem" for each in checks)
            if is_sound:
                _publish(draft, out)
    if as_json:
        told = {"checks": [asdict(each) for each in checks], "out": str(out) if is_sound else None}
        print_json({**_to_json(proposal), **told})
    else:
        _show(stdout(), proposal, checks)
        if is_sound:
            stdout().print(f"written to {out}; next: cocktail-serve serve {shlex.quote(str(out))}", markup=False)
        else:
            stdout().print("nothing was written: leave out what has a problem, or use --no-check", style="red")
    if not is_sound:
        raise typer.Exit(1)


def _text(proposal: Proposal, out: Path, *, command: list[str]) -> str:
    """The configuration as a file."""
    decoders = [pool for pool in proposal.pools if pool.kind == "decoder"]
    shares = len(decoders) > 1 and not is_cpu_build()
    share = round(GPU_SHARE / len(decoders), 2) if shares else None
    sections = [pool.section(out.parent, gpu_share=share) for pool in proposal.pools]
    text = yaml.safe_dump({"pools": sections}, sort_keys=False, allow_unicode=True)
    for tokens in {section["engine"].get("max_model_len") for section in sections} - {None}:
        line = f"max_model_len: {tokens}\n"
        text = text.replace(line, f"{line[:-1]}  # {_LIMITED.format(tokens=tokens)}\n")
    return _HEADER.format(command=shlex.join(command), file=shlex.quote(out.name)) + text


@contextmanager
def _written(out: Path, text: str) -> Iterator[Path]:
    """The text in a file of its own beside `out`, where its relative paths hold; it is gone at the end."""
    draft = out.absolute().with_name(f".{out.name}.{secrets.token_hex(4)}.draft")
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        yield draft
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def _publish(draft: Path, out: Path) -> None:
    try:
        os.link(draft, out)
    except FileExistsError:
        raise ConfigError(f"{out} was made by somebody else meanwhile; nothing is overwritten", param="out") from None


def _checks(draft: Path, report: OnProgress) -> list[Check]:
    from cocktail_serve.cli.doctor.pools import check_pool

    settings = load_settings(draft)
    opened: dict[str, Pool] = {}
    return [check for pool in settings.pools for check in check_pool(settings, pool, report, opened)]


def _reasons(left_out: list[LeftOut]) -> str:
    if not left_out:
        return ": they hold no model (config.json) and no adapter (adapter_config.json)"
    return ":" + "".join(f"\n  {each.folder}: {each.why}" for each in left_out)


def _to_json(proposal: Proposal) -> dict[str, Any]:
    return {
        "object": "configuration",
        "pools": [
            {
                "id": pool.id,
                "kind": pool.kind,
                "base": str(pool.base.folder),
                "why": pool.why,
                "experts": {name: str(model.folder) for name, model in pool.experts.items()},
                "adapters": [name for name, model in pool.experts.items() if model.is_adapter],
            }
            for pool in proposal.pools
        ],
        "warnings": proposal.warnings,
        "left_out": [{"folder": str(each.folder), "why": each.why} for each in proposal.left_out],
    }


def _show(console: Console, proposal: Proposal, checks: list[Check]) -> None:
    for pool in proposal.pools:
        console.print(f"[bold]{pool.id}[/], a pool of kind {pool.kind}")
        console.print(f"  base: {pool.base.folder} ({pool.why})", markup=False)
        for name, model in pool.experts.items():
            what = "adapter" if model.is_adapter else "expert"
            console.print(f"  {what} {name}: {model.folder}", markup=False)
    if proposal.left_out:
        console.print("left out:")
    for each in proposal.left_out:
        console.print(f"  {each.folder}: {each.why}", markup=False)
    for warning in proposal.warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow")
    for check in checks:
        show(console, check)
