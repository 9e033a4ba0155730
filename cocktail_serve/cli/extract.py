"""`extract`: a pool of full experts as a pool of LoRA adapters."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cocktail_serve.cli.inspect import layer_group, layer_order
from cocktail_serve.cli.model_card import CARD_FILE, adapter_card
from cocktail_serve.cli.options import AsJSON, ConfigFile, OptionalExamplesFile, PoolId, read_examples
from cocktail_serve.cli.terminal import ResultTable, print_json, progress, stdout
from cocktail_serve.config import load_settings
from cocktail_serve.pool import BASE

if TYPE_CHECKING:
    from rich.console import Console

    from cocktail_serve.offline.extracted_pool import ExtractedPool
    from cocktail_serve.offline.extraction import Extraction

POOL_FILE = "pool.yaml"
REPORT_FILE = "extraction.json"

_HEADER = """\
# Made by `cocktail-serve extract`: pool {pool} with its full experts as LoRA adapters of rank {rank} or lower, beside
# this file. `cocktail-serve doctor {file}` checks it; what each adapter lacks of its expert is in {report}.
"""


def extract(
    context: typer.Context,
    config: ConfigFile,
    *,
    pool: PoolId,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the adapters, where a layer is wide enough.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder to write; must not exist, or be empty. POOL-rankR in the current folder if left out.",
            show_default=False,
        ),
    ] = None,
    examples: OptionalExamplesFile = None,
    as_json: AsJSON = False,
) -> None:
    """Make a LoRA adapter of every full expert of a decoder pool, offline: its difference to the base, cut to a rank.

    Writes a folder for each adapter, as peft has it, and the configuration of the pool that they make. Tells what the
    adapters lack, and with examples what that costs.
    """
    settings = load_settings(config)
    rows = None if examples is None else read_examples(examples)
    out = Path(f"{pool}-rank{rank}") if out is None else out

    from cocktail_serve.checkpoints.folder import new_folder, write_json
    from cocktail_serve.offline.extracted_pool import extract_pool, pool_section

    started_at = time.monotonic()
    with new_folder(out) as folder, progress() as report:
        extracted = extract_pool(settings, pool, folder, rank=rank, rows=rows, report=report)
        told = {**extraction_json(extracted), "out": str(out), "pool_file": str(out / POOL_FILE)}
        section = pool_section(extracted, settings.pool(pool))
        _write_pool(folder / POOL_FILE, section, rank)
        write_json(folder / REPORT_FILE, told)
        for name in extracted.extractions:
            (folder / name / CARD_FILE).write_text(
                adapter_card(
                    told["experts"][name],
                    extracted.pool,
                    settings.pool(pool),
                    name=name,
                    rank=rank,
                    command=context.obj,
                )
            )
    seconds = time.monotonic() - started_at
    if as_json:
        print_json({**told, "seconds": round(seconds, 3)})
        return
    console = stdout()
    _show(console, extracted)
    console.print(f"{seconds:.1f} s, written to {out}; the pool's configuration is {out / POOL_FILE}", markup=False)


def extraction_json(extracted: ExtractedPool) -> dict[str, Any]:
    """What was made as `--json` shows it and the folder keeps it. Errors are Frobenius norms over the difference's."""
    return {
        "object": "cocktail.extraction",
        "pool": extracted.pool.id,
        "rank": extracted.rank,
        "num_examples": extracted.num_examples,
        "base_loss": extracted.losses.get(BASE),
        "experts": {
            name: {
                **_extraction(extraction),
                "loss": extracted.losses.get(name),
                "adapter_loss": extracted.adapter_losses.get(name),
            }
            for name, extraction in extracted.extractions.items()
        },
        "passed_through": list(extracted.passed_through),
    }


def _extraction(extraction: Extraction) -> dict[str, Any]:
    return {
        "relative_error": extraction.relative_error,
        "relative_error_at": {str(rank): extraction.relative_error_at(rank) for rank in _ranks(extraction.rank)},
        "lost_share": extraction.lost_share,
        "difference": extraction.difference,
        "num_bytes": extraction.num_bytes,
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "rank": layer.rank,
                "difference": layer.difference,
                "relative_error": layer.relative_error,
            }
            for layer in extraction.layers
        ],
        "lost": [
            {"name": each.name, "shape": list(each.shape), "reason": each.reason, "difference": each.difference}
            for each in extraction.lost
        ],
    }


def _ranks(rank: int) -> list[int]:
    """The powers of two below a rank, and the rank."""
    return [*(1 << power for power in range(rank.bit_length()) if 1 << power < rank), rank]


def _write_pool(path: Path, section: dict[str, Any], rank: int) -> None:
    header = _HEADER.format(pool=section["id"], rank=rank, file=path.name, report=REPORT_FILE)
    path.write_text(header + "\n" + yaml.safe_dump({"pools": [section]}, sort_keys=False))


def _show(console: Console, extracted: ExtractedPool) -> None:
    """Error by layer, by rank, and what each adapter is."""
    extractions = extracted.extractions
    layers = _table("relative error of the difference", "layer", extractions)
    squares: dict[str, dict[str, list[float]]] = {}
    for name, extraction in extractions.items():
        for layer in extraction.layers:
            sums = squares.setdefault(layer_group(layer.name), {}).setdefault(name, [0.0, 0.0])
            sums[0] += layer.error**2
            sums[1] += layer.difference**2
    for group, of_group in sorted(squares.items(), key=lambda item: layer_order(item[0])):
        cells = (math.sqrt(of_group[name][0] / of_group[name][1]) if name in of_group else None for name in extractions)
        layers.add_row(group, *map(_number, cells))
    console.print(layers)
    console.print()
    ranks = _table("relative error of all, by rank", "rank", extractions)
    for rank in _ranks(extracted.rank):
        ranks.add_row(str(rank), *(_number(each.relative_error_at(rank)) for each in extractions.values()))
    console.print(ranks)
    console.print()
    adapters = ResultTable(title="adapters")
    for column in ("expert", "relative error", "lost", "MB", *(("loss", "adapter's loss") if extracted.losses else ())):
        adapters.add_column(column, justify="left" if column == "expert" else "right")
    if extracted.losses:
        adapters.add_row(BASE, "", "", "", _number(extracted.losses[BASE]), "")
    for name, extraction in extractions.items():
        losses = (extracted.losses[name], extracted.adapter_losses[name]) if extracted.losses else ()
        size, lost = f"{extraction.num_bytes / 1e6:,.1f}", f"{extraction.lost_share:.2%}"
        adapters.add_row(name, _number(extraction.relative_error), lost, size, *map(_number, losses))
    console.print(adapters)
    for name, extraction in extractions.items():
        if extraction.lost:
            what = ", ".join(dict.fromkeys(".".join(each.name.split(".")[-2:]) for each in extraction.lost))
            console.print(f"{name}: differs from the base in what LoRA cannot hold: {what}", markup=False)
    if extracted.passed_through:
        console.print(f"adapters already, named as they are: {', '.join(extracted.passed_through)}", markup=False)


def _table(title: str, first: str, extractions: Mapping[str, Extraction]) -> ResultTable:
    table = ResultTable(title=title)
    table.add_column(first)
    for name in extractions:
        table.add_column(name, justify="right")
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
