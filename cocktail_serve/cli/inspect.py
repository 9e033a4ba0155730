"""`inspect`: what a model folder holds, and whether two can be mixed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocktail_serve.cli.options import AsJSON
from cocktail_serve.cli.plot import check_plotting, plot_changes
from cocktail_serve.cli.terminal import ResultTable, bar, print_json, progress, stdout
from cocktail_serve.errors import CheckpointError
from cocktail_serve.progress import OnProgress

if TYPE_CHECKING:
    from cocktail_serve.checkpoints.compatibility import CompatibilityReport, Finding
    from cocktail_serve.checkpoints.reader import CheckpointReader

ModelFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A model folder.", show_default=False)]
OtherFolder = Annotated[
    Path | None, typer.Argument(metavar="[DIR]", help="A second one, fine-tuned from the first.", show_default=False)
]

PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.png", help="Draw the change of each group of layers too.", show_default=False),
]


def inspect(folder: ModelFolder, expert: OtherFolder = None, *, plot: PlotFile = None, as_json: AsJSON = False) -> None:
    """Tell what a model folder holds and whether it can be served; with two, whether they can be mixed and how far
    apart they are. The second may be a LoRA adapter, which is folded into the first. Exits 2 where they cannot."""
    if plot is not None:
        if expert is None:
            raise typer.BadParameter("a change needs two models: name the second folder", param_hint="--plot")
        check_plotting(plot)
    with progress() as report:
        described = [_describe(folder, report)]
        compatibility = changes = mixed = None
        if expert is not None:
            from cocktail_serve.checkpoints.adapters.reader import is_adapter
            from cocktail_serve.checkpoints.compatibility import compare

            if is_adapter(expert):
                described.append(_describe_adapter(expert, folder, described[0]))
            else:
                described.append(_describe(expert, report, base=folder))
            compatibility = compare(folder, expert)
            mixed = _mixed_generation(folder, expert)
            # what a quantised base's parameters are, nothing is measured by
            is_measured = compatibility.is_compatible and described[0]["quantisation"] is None
            changes = list(_changes(folder, expert, report)) if is_measured else []
    if plot is not None and changes:
        plot_changes(changes, plot, title=f"{expert} against {folder}")
    if as_json:
        result: dict[str, Any] = {"object": "inspection", "models": described}
        if compatibility is not None:
            result["compatible"] = compatibility.is_compatible
            result["problems"] = [_problem(finding) for finding in compatibility.problems]
            result["warnings"] = [_problem(finding) for finding in compatibility.warnings]
            result["changes"] = changes
            result["mixed_generation"] = mixed
        print_json(result)
    else:
        _show(described, compatibility, changes, mixed)
    if compatibility is not None and not compatibility.is_compatible:
        raise typer.Exit(2)


def _describe(folder: Path, report: OnProgress, *, base: Path | None = None) -> dict[str, Any]:
    """What a folder holds.

    Raises:
        CheckpointError: it cannot be read as a checkpoint, and so not be served: says why.
    """
    from cocktail_serve.checkpoints.fingerprint import identify
    from cocktail_serve.checkpoints.generation_files import read_settings
    from cocktail_serve.checkpoints.layout import generates, model_class, read_modules
    from cocktail_serve.checkpoints.reader import CheckpointReader
    from cocktail_serve.checkpoints.tokenizer import FolderTokenizer

    with CheckpointReader(folder, allow_quantised=base is None) as reader:
        fingerprint = identify(
            reader, progress=lambda done, total: report(f"reading {folder}", done, total, is_bytes=True)
        ).fingerprint
        tokenization = FolderTokenizer(folder).written
        return {
            "folder": str(folder),
            "architectures": [named] if (named := model_class(folder)) else [],
            "num_parameters": _num_parameters(reader),
            "dtype": reader.dtype,
            "quantisation": None if reader.quantisation is None else reader.quantisation.method,
            "num_bytes": reader.num_bytes,
            "num_tensors": len(reader.tensors),
            "tied": dict(reader.tied),
            "fingerprint": fingerprint,
            "modules": [module.type for module in read_modules(folder)],
            "vocabulary": None if tokenization is None else len(tokenization.vocab),
            "generation": read_settings(folder, base).to_json() if generates(folder) else None,
            "blockers": list(_blockers(folder, has_tokenizer=tokenization is not None)),
        }


def _describe_adapter(folder: Path, base: Path, described_base: dict[str, Any]) -> dict[str, Any]:
    """What an adapter holds: parameters, dtype and bytes are those of its factors.

    Raises:
        CheckpointError, IncompatibleModelsError: it cannot be folded into this base.
    """
    from cocktail_serve.checkpoints.adapters.reader import AdapterReader
    from cocktail_serve.checkpoints.fingerprint import identify_adapter
    from cocktail_serve.checkpoints.generation_files import read_settings
    from cocktail_serve.checkpoints.reader import CheckpointReader

    is_quantised = described_base["quantisation"] is not None
    with (
        CheckpointReader(base, allow_quantised=is_quantised) as base_reader,
        AdapterReader(folder, base_reader) as reader,
    ):
        factors = reader.factors.values()
        identity = identify_adapter(reader, described_base["fingerprint"], largest_of_base=math.inf)
        modes = {"unmerged": reader.merged_only is None, "merged": not is_quantised}
        return {
            "folder": str(folder),
            "adapter_of": str(base),
            "architectures": described_base["architectures"],
            "num_parameters": sum(info.num_elements for info in factors),
            "dtype": ", ".join(sorted({info.dtype for info in factors})),
            "quantisation": None,
            "num_bytes": reader.num_bytes,
            "num_tensors": len(factors),
            "tied": {},
            "fingerprint": identity.fingerprint,
            "modules": [],
            "vocabulary": None,
            "generation": described_base["generation"] and read_settings(folder, base).to_json(),
            "blockers": ["a LoRA adapter: it can be an expert over its base, and no base"],
            "merged_only": reader.merged_only,
            "engine_modes": [mode for mode, is_possible in modes.items() if is_possible],
        }


def _mixed_generation(base: Path, expert: Path) -> dict[str, Any] | None:
    """How a mixture of the two is called in a pool of its own; None where they do not generate."""
    from cocktail_serve.checkpoints.generation_files import common_template, read_settings
    from cocktail_serve.checkpoints.layout import generates
    from cocktail_serve.generation_settings import mixed_settings

    if not generates(base):
        return None
    mine, theirs = read_settings(base), read_settings(expert, base)
    return mixed_settings(mine, [theirs], chat_template=common_template([mine, theirs])).to_json()


def _num_parameters(reader: CheckpointReader) -> int:
    return sum(info.num_elements for info in reader.parameters.values() if info.is_floating)


def _blockers(folder: Path, *, has_tokenizer: bool) -> Iterator[str]:
    """What stands in the way of serving the folder as a pool's base; what makes it no checkpoint at all raises."""
    from cocktail_serve.checkpoints.model_config import load_model_config
    from cocktail_serve.checkpoints.opening import unserved_class

    try:
        load_model_config(folder)
    except CheckpointError as error:
        yield error.message
    if unserved := unserved_class(folder):
        yield unserved
    if not has_tokenizer:
        yield "no tokenizer.json: it can be an expert, which uses the base's, and no base"


def _changes(base: Path, expert: Path, report: OnProgress) -> Iterator[dict[str, Any]]:
    """How far the expert moved, group of layers by group: the norm of the difference over the norm of the base."""
    from cocktail_serve.checkpoints.adapters.reader import read_expert
    from cocktail_serve.checkpoints.reader import CheckpointReader

    squares: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    with CheckpointReader(base) as mine, read_expert(expert, mine) as theirs:
        names = [name for name, info in mine.tensors.items() if info.is_floating and name in theirs.tensors]
        for done, name in enumerate(names, start=1):
            before, after = mine.get(name).double(), theirs.get(name).double()
            sums = squares.setdefault(layer_group(name), [0.0, 0.0])
            sums[0] += (after - before).square().sum().item()
            sums[1] += before.square().sum().item()
            counts[layer_group(name)] = counts.get(layer_group(name), 0) + 1
            report(f"comparing {expert}", done, len(names))
    for group, (difference, norm) in sorted(squares.items(), key=lambda item: layer_order(item[0])):
        yield {
            "group": group,
            "num_tensors": counts[group],
            "relative_change": (difference / norm) ** 0.5 if norm else None,
        }


def layer_group(name: str) -> str:
    """A tensor's layer, or for those outside of layers the name of their module."""
    match = re.search(r"(?:^|\.)((?:layers?|h|blocks?)\.\d+)\.", name)
    if match:
        return match.group(1)
    return name.rpartition(".")[0].removeprefix("model.") or name


def layer_order(group: str) -> list[tuple[int, str]]:
    """What groups of layers are sorted by: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", group)]


def _lines(findings: Iterable[Finding]) -> Iterator[str]:
    """A line for each finding, but one for all layers of which the same is found: unlike models differ in hundreds of
    tensors for a few reasons."""
    alike: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        layer = re.sub(r"\.\d+\.", ".*.", finding.subject)
        alike.setdefault((layer, finding.base, finding.expert, finding.fix), []).append(finding)
    for (layer, *_), same in alike.items():
        yield str(same[0] if len(same) == 1 else replace(same[0], subject=f"{layer} ({len(same)} of them)"))


def _problem(finding: Any) -> dict[str, str]:
    return {"subject": finding.subject, "base": finding.base, "expert": finding.expert, "fix": finding.fix}


def _generation_rows(generation: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "end tokens", ", ".join(map(str, generation["stop_token_ids"])) or "none"
    sampling = ", ".join(f"{name} {value:g}" for name, value in generation["sampling"].items())
    yield "sampling", sampling or "no defaults"
    template = generation["chat_template"]
    yield "chat template", f"digest {template[:12]}" if template else "none"


def _show_mixed_generation(mixed: dict[str, Any], alone: list[dict[str, Any]]) -> None:
    console = stdout()
    if all(generation == mixed for generation in alone):
        same = "end tokens, sampling defaults and chat template are the same, and so are their mixture's"
        console.print(same, style="green")
        return
    table = ResultTable(
        title="end tokens, sampling defaults or chat template differ; a mixture of the two takes:", show_header=False
    )
    for row in _generation_rows(mixed):
        table.add_row(*row)
    console.print(table, markup=False)
    console.print()


def _rows(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "architecture", ", ".join(model["architectures"]) or "not said"
    yield "parameters", f"{model['num_parameters']:,} in {model['num_tensors']} tensors"
    yield "stored as", f"{model['dtype']}, {model['num_bytes'] / 1e6:,.1f} MB"
    if model["quantisation"]:
        yield "quantised", f"{model['quantisation']}: a base of LoRA adapters, which are served unmerged"
    yield "fingerprint", model["fingerprint"]
    if model["tied"]:
        yield "tied", ", ".join(f"{name} is {source}" for name, source in model["tied"].items())
    yield "tokenizer", f"{model['vocabulary']:,} entries" if model["vocabulary"] else "none"
    if model["modules"]:
        yield "modules", " > ".join(model["modules"])
    if model["generation"]:
        yield from _generation_rows(model["generation"])
    yield "can be served", "yes" if not model["blockers"] else "no: " + "; ".join(model["blockers"])
    if "adapter_of" in model:
        modes, why = " or ".join(model["engine_modes"]) or "none", model["merged_only"]
        yield "engine.mode", modes if why is None else f"{modes}, not unmerged: {why}"


def _show(
    described: list[dict[str, Any]],
    compatibility: CompatibilityReport | None,
    changes: list[dict[str, Any]] | None,
    mixed: dict[str, Any] | None,
) -> None:
    console = stdout()
    for model in described:
        table = ResultTable(title=model["folder"], show_header=False)
        for label, value in _rows(model):
            table.add_row(label, value)
        console.print(table, markup=False)
        console.print()
    if compatibility is None:
        return
    if not compatibility.is_compatible:
        console.print("they cannot be mixed:", style="red")
        for line in _lines(compatibility.problems):
            console.print(f"  - {line}", markup=False)
        if len(compatibility.problems) > 1:
            console.print(f"{len(compatibility.problems)} differences in all; --json lists each", markup=False)
        return
    console.print("they can be mixed", style="green")
    if compatibility.warnings:
        console.print("warnings:", style="yellow")
    for line in _lines(compatibility.warnings):
        console.print(f"  - {line}", markup=False)
    if mixed is not None:
        _show_mixed_generation(mixed, [model["generation"] for model in described])
    if not changes:
        return
    table = ResultTable("layers")
    table.add_column("relative change", justify="right")
    table.add_column("")
    largest = max(row["relative_change"] or 0.0 for row in changes) or 1.0
    for row in changes:
        change = row["relative_change"]
        table.add_row(row["group"], "base is 0" if change is None else f"{change:.4f}", bar((change or 0.0) / largest))
    console.print(table)
