"""Makes LM-Cocktail's tables and figures, one or several.

    python -m bench.paper table1 --data $COCKTAIL_BENCH_DATA --pools $COCKTAIL_BENCH_POOLS

Everything that was measured is kept under --work: a command that is broken off goes on where it was, and commands that
need the same figures share them. See README.md for what each makes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.machine import describe_machine
from bench.paper import alphas, counts, published, show, targets, trials, unseen, weightings
from bench.paper.session import Session, open_session
from bench.paper.setting import FOLDER, PoolKind, load_setting
from cocktail_serve.cli.terminal import progress


def table_of_targets(session: Session, out: Path, name: str) -> Mapping[str, Any]:
    decoder = session.kind == "decoder"
    result = targets.table(session)
    title = f"{'Table 1' if decoder else 'Table 2'}: target and other tasks, {session.kind}s"
    text = show.targets_text(title, result, published.TABLE1 if decoder else published.TABLE2)
    return _written(session, out, name, result, text)


def figure1(session: Session, out: Path, name: str) -> Mapping[str, Any]:
    result = targets.table(session)
    show.plot_targets(result, out / f"{name}.png", f"Figure 1: tuned for a task, {session.kind}s")
    return result


def table_of_tasks(session: Session, out: Path, name: str) -> Mapping[str, Any]:
    title = f"{'Table 8' if session.kind == 'decoder' else 'Table 9'}: every task, {session.kind}s"
    result = targets.by_task(session)
    return _written(session, out, name, result, show.tasks_text(title, result))


def table_of_unseen(session: Session, out: Path, name: str) -> Mapping[str, Any]:
    decoder = session.kind == "decoder"
    systems, seeds = unseen.systems_of(session), session.setting.seeds
    beside = unseen.DRAWN_ONCE | {"multitask", "icl"}
    groups = {
        "No expert was tuned for these": unseen.table(session, session.pool.unseen, systems, seeds=seeds),
        "Their own expert is left out": unseen.table(
            session,
            list(session.pool.targets),
            [system for system in systems if system.name not in beside],
            seeds=seeds[:1],
        ),
    }
    title = f"{'Table 3' if decoder else 'Table 4'}: without fine-tuning, {session.kind}s"
    text = show.unseen_text(title, groups, published.TABLE3 if decoder else published.TABLE4)
    return _written(session, out, name, groups, text)


def table5(session: Session, out: Path, name: str) -> Mapping[str, Any]:
    groups = {
        "One unified cocktail for all unseen tasks, from pooled examples": counts.table(session, session.pool.unseen),
        "A cocktail of each task's own": counts.one_more(session, session.pool.unseen, session.default_temperature),
    }
    return _written(session, out, name, groups, show.counts_text(f"Table 5: examples, {session.kind}s", groups))


def figure_of_alphas(session: Session, out: Path, name: str) -> Mapping[str, Any]:
    title = f"{'Figure 2' if session.kind == 'decoder' else 'Figure 3'}: alpha, {session.kind}s"
    result = alphas.figure(session)
    show.plot_alphas(result, out / f"{name}.png", title)
    return _written(session, out, name, result, show.alphas_text(title, result))


def table_of_verdicts(session: Session, out: Path, name: str) -> Mapping[str, Any]:
    options = {"weighting": "softmax", "temperature": session.default_temperature}
    result = trials.trials(session, session.setting.seeds, options)
    return _written(session, out, name, result, show.trials_text(f"The report's verdict, {session.kind}s", result))


def table_of_weightings(session: Session, out: Path, name: str) -> Mapping[str, Any]:
    trials = weightings.measure(session, session.pool.unseen)
    result = weightings.table(trials)
    text = show.weightings_text("Weightings, and tuning on the same examples", result)
    _written(session, out, name, {"examples": result, "trials": weightings.summaries(trials)}, text)
    return result


COMMANDS: Mapping[str, tuple[PoolKind, Callable[[Session, Path, str], Mapping[str, Any]]]] = {
    "fig1": ("decoder", figure1),
    "fig1-encoder": ("encoder", figure1),
    "table1": ("decoder", table_of_targets),
    "table2": ("encoder", table_of_targets),
    "table3": ("decoder", table_of_unseen),
    "table4": ("encoder", table_of_unseen),
    "table5": ("decoder", table5),
    "table5-encoder": ("encoder", table5),
    "fig2": ("decoder", figure_of_alphas),
    "fig3": ("encoder", figure_of_alphas),
    "table8": ("decoder", table_of_tasks),
    "table9": ("encoder", table_of_tasks),
    "weightings": ("decoder", table_of_weightings),
    "verdict": ("decoder", table_of_verdicts),
    "verdict-encoder": ("encoder", table_of_verdicts),
}


def main() -> None:
    options = _parser().parse_args()
    setting = load_setting(options.setting)
    if options.without_multitask:
        setting = setting.without_multitask()
    out = options.out or FOLDER / "results" / options.setting
    names = list(COMMANDS) if "all" in options.what else options.what
    with progress() as report:
        for kind in ("decoder", "encoder"):
            wanted = [name for name in names if COMMANDS[name][0] == kind]
            if not wanted:
                continue
            with open_session(
                setting,
                kind,
                pools=options.pools,
                data=options.data,
                work=options.work,
                is_kept_only=options.kept_only,
                report=report,
            ) as session:
                for name in wanted:
                    started_at = time.monotonic()
                    COMMANDS[name][1](session, out, name)
                    report(f"{name}: {time.monotonic() - started_at:.0f} s", 1, 1)


def _written(session: Session, out: Path, name: str, result: Mapping[str, Any], text: str) -> Mapping[str, Any]:
    show.write(out, name, {"machine": describe_machine(), "measured": session.describe(), **result}, text)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*COMMANDS, "all"])
    parser.add_argument("--setting", default="small", help="small, paper, or a YAML like theirs.")
    for name in ("data", "pools"):
        variable = f"COCKTAIL_BENCH_{name.upper()}"
        value = os.environ.get(variable)
        parser.add_argument(
            f"--{name}", type=Path, default=value, required=value is None, help=f"Folder; else {variable}."
        )
    parser.add_argument("--work", type=Path, default=Path("build/paper"), help="What is measured is kept here.")
    parser.add_argument("--out", type=Path, help="Folder of the results; omitted: results/<setting> beside this file.")
    parser.add_argument(
        "--kept-only", action="store_true", help="Of an unmerged pool: tables of what was measured, nothing computed."
    )
    parser.add_argument(
        "--without-multitask", action="store_true", help="Neither train nor measure the multitask models."
    )
    return parser


if __name__ == "__main__":
    main()
