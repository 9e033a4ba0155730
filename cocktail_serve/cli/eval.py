"""`eval`: whether a cocktail helps, measured on a task's own rows beside the alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cocktail_serve.cli.options import AsJSON, ConfigFile, ExpertsOption, PoolId, parse_method_params
from cocktail_serve.cli.terminal import ResultTable, print_json, progress, stdout
from cocktail_serve.config import load_settings
from cocktail_serve.evaluation.metrics import Metric
from cocktail_serve.evaluation.systems import SYSTEMS, find_systems
from cocktail_serve.suggestions import did_you_mean

if TYPE_CHECKING:
    from cocktail_serve.evaluation.report import Report

TasksOption = Annotated[
    list[Path],
    typer.Option(
        "--task",
        metavar="PATH",
        exists=True,
        help="A JSONL file or a folder with test.jsonl (decoders), a folder in BEIR's layout (encoders); may be "
        "repeated.",
        show_default=False,
    ),
]


def evaluate(
    config: ConfigFile,
    *,
    pool: PoolId,
    task: TasksOption,
    systems: Annotated[
        str | None,
        typer.Option("--systems", help=f"Rows, as base,lm-cocktail: {', '.join(SYSTEMS)}. All if left out."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="TASK=EXPERT, the expert fine-tuned for a task; an expert of the task's name if left out."),
    ] = None,
    multitask: Annotated[
        str | None, typer.Option(help="Model fine-tuned on many tasks: its folder, or an expert of the pool.")
    ] = None,
    expert: ExpertsOption = None,
    num_examples: Annotated[int, typer.Option(min=1, help="Few-shot examples sampled from a task's train file.")] = 5,
    examples: Annotated[
        list[str] | None,
        typer.Option(help="TASK=FILE, a task's few-shot examples, whole, in place of a sample."),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(min=0.0, help="tau; repeated, a row for each. The configuration's if left out."),
    ] = None,
    alpha: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the target.")] = 0.5,
    budget: Annotated[int | None, typer.Option(min=1, help="Mixtures that blackbox tries.")] = None,
    method_param: Annotated[
        list[str] | None, typer.Option(help="A parameter of TIES and DARE, as density=0.3; may be repeated.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Measure only this; may be repeated, the first is the table's.")
    ] = None,
    choice_norm: Annotated[
        str, typer.Option(help="sum, token or byte: what log-probabilities of choices are by.")
    ] = "sum",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows or queries a task, sampled.")] = None,
    max_documents: Annotated[
        int | None, typer.Option(min=0, help="At most so many documents beside those judged, sampled.")
    ] = None,
    cross: Annotated[bool, typer.Option("--cross", help="Measure what is made for a task on all tasks.")] = False,
    seed: Annotated[int, typer.Option(help="Of samples and of the bootstrap.")] = 0,
    base_url: Annotated[
        str | None,
        typer.Option(help="Ask a running server, as http://127.0.0.1:8000/v1; the pool in memory if left out."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="COCKTAIL_API_KEY", help="The server's key.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results; a run with the same folder goes on where it was.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Measure a pool's cocktails beside base, experts and other ways to combine them, on tasks with known answers."""
    from cocktail_serve.evaluation.measure import Measuring
    from cocktail_serve.evaluation.plots import PLOT_FILE, check_plotting, plot_summary
    from cocktail_serve.evaluation.report import Report
    from cocktail_serve.evaluation.runs import RunEntry, open_evaluation, run
    from cocktail_serve.evaluation.tasks import load_examples, load_task, sample_examples, train_file

    if choice_norm not in ("sum", "token", "byte"):
        raise typer.BadParameter("use sum, token or byte", param_hint="--choice-norm")
    settings = load_settings(config)
    pool_config = settings.pool(pool)
    chosen = find_systems(None if systems is None else systems.replace(",", " ").split(), pool_config.kind)
    if out is not None:
        check_plotting()
    targets, files = pairs(target, "--target"), pairs(examples, "--examples")
    separator = pool_config.example_separator
    entries = []
    for path in task:
        loaded = load_task(path, pool_config.kind, limit=limit, max_documents=max_documents, seed=seed)
        few = None
        if loaded.name in files:
            few = load_examples(Path(files[loaded.name]), pool_config.kind, separator=separator)
        elif train_file(path) is not None:
            few = sample_examples(path, pool_config.kind, num=num_examples, seed=seed, separator=separator)
        own = loaded.name if loaded.name in pool_config.experts else None
        entries.append(RunEntry(loaded, few, targets.get(loaded.name, own)))
    for name in (*targets, *files):
        names = [entry.task.name for entry in entries]
        if name not in names:
            raise typer.BadParameter(
                f"{name!r} is none of the tasks{did_you_mean(name, names)}", param_hint="--target, --examples"
            )
    params = parse_method_params(method_param) or {}
    how = Measuring(
        metrics=None if metric is None else checked_metrics(metric),
        max_new_tokens=max_new_tokens,
        choice_norm=choice_norm,  # type: ignore[arg-type]  # checked above
        example_separator=separator,
    )
    with (
        progress() as report,
        open_evaluation(
            settings, pool, out=out, how=how, multitask=multitask, base_url=base_url, api_key=api_key, report=report
        ) as evaluation,
    ):
        result = Report(
            run(
                evaluation,
                entries,
                chosen,
                temperatures=tuple(temperature or ()),
                experts=expert or None,
                cross=cross,
                report=report,
                alpha=alpha,
                budget=budget,
                seed=seed,
                method_params={"ties": params, "dare_linear": params},
            ),
            seed=seed,
        )
    if out is not None:
        result.write(out)
        plot_summary(result, out / PLOT_FILE)
    if as_json:
        print_json(result.to_json())
        return
    show(result)


def show(report: Report) -> None:
    """The summary, and what is missing in it."""
    console = stdout()
    console.print(_table(*report.rows()))
    for title, columns, rows in report.tables_beside():
        console.print()
        console.print(_table(columns, rows, title=title))
    for note in report.notes:
        console.print(note, markup=False)
    for (system, task), why in report.run.skipped.items():
        console.print(f"not made: {system}, {task}: {why}", markup=False)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> ResultTable:
    table = ResultTable(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == "system" else "right")
    for row in rows:
        table.add_row(*(text.replace("**", "") for text in row), style="bold" if "**" in row[-1] else None)
    return table


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """`["ag_news=ag-news"]` by name.

    Raises:
        typer.BadParameter: not of that form.
    """
    found = {}
    for text in texts or ():
        name, separator, value = text.partition("=")
        if not (name and separator and value):
            raise typer.BadParameter(f"{text!r} is not TASK=VALUE", param_hint=option)
        found[name] = value
    return found


def checked_metrics(names: list[str]) -> tuple[Metric, ...]:
    """The metrics of these names.

    Raises:
        typer.BadParameter: an unknown one.
    """
    from cocktail_serve.evaluation.metrics import DECODER_METRICS, ENCODER_METRICS

    known: dict[str, Metric] = {metric: metric for metric in (*DECODER_METRICS, *ENCODER_METRICS)}
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"there is no metric {name!r}; there are: {', '.join(known)}{did_you_mean(name, known)}",
                param_hint="--metric",
            )
    return tuple(known[name] for name in names)
