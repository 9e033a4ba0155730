"""Fine-tunes the experts of a pool, one for each JSONL file, and writes the pool's configuration.

    python -m examples.train_experts --kind decoder --base models/base --out pool \\
        --task ag-news=ag_news.jsonl --task nq=nq.jsonl --multitask

Rows are those of cocktails: {"input", "output"}, {"prompt", "completion"} or {"messages"} for a decoder,
{"query", "pos", "neg"} for an encoder. An expert whose folder is there is not trained again.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cocktail_serve.checkpoints.adapters.reader import is_adapter
from cocktail_serve.checkpoints.layout import CONFIG
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.cli.terminal import print_error, progress, stdout
from cocktail_serve.config import PoolConfig
from cocktail_serve.errors import CheckpointError, ClientError, CocktailError, InvalidRequestError
from cocktail_serve.examples import ExampleSet, parse_examples, read_jsonl
from cocktail_serve.pool import BASE, NAME_PATTERN
from cocktail_serve.progress import OnProgress

from .settings import TrainSettings

MULTITASK = "multitask"
POOL_FILE = "pool.yaml"
_HEADER = """\
# Made by examples/train_experts. The pool of {base}
# and the experts beside this file; `cocktail-serve doctor {file}` checks it.
{multitask}"""
_ABOUT_MULTITASK = f"""\
# {MULTITASK}/ is tuned on the tasks of all experts at once. It is for comparison: as an expert it would be a mixture
# among the ingredients.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is not there yet; 0, or 2 for input that is wrong."""
    options = _parser().parse_args(argv)
    _quiet()
    settings = TrainSettings(
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        batch_size=options.batch_size,
        max_steps=options.max_steps,
        max_tokens=options.max_tokens,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=options.target_modules,
        merge=options.merge,
        bf16=options.bf16,
        seed=options.seed,
    )
    try:
        if options.lora_rank is None and (options.merge or options.target_modules):
            raise InvalidRequestError("--merge and --target-modules are of an adapter: give --lora-rank too")
        check_folders(options.kind, options.base, options.out)
        tasks = read_tasks(options.task, options.kind, max_rows=options.max_rows, seed=options.seed)
        jobs = {name: {name: examples} for name, examples in tasks.items()}
        if options.multitask:
            jobs[MULTITASK] = tasks
        with progress() as report:
            for name, job in jobs.items():
                train_one(options.kind, options.base, job, options.out / name, settings, name=name, report=report)
        path = write_pool(options.out, options.kind, options.base, list(tasks), multitask=options.multitask)
    except CocktailError as error:
        print_error(error.message)
        return 2 if isinstance(error, ClientError) else 1
    stdout().print(f"written to {options.out}; the pool's configuration is {path}", markup=False)
    return 0


def check_folders(kind: str, base: Path, out: Path) -> None:
    """Tells what would else be told of the pool when its experts are trained.

    Raises:
        ClientError: a base that no pool of this kind takes, or an output folder that no pool can be named by.
    """
    if not base.is_dir():
        raise CheckpointError(f"there is no model folder {base}; one on the hub is fetched first: `hf download {base}`")
    if not re.fullmatch(NAME_PATTERN, out.resolve().name):
        raise InvalidRequestError(f"--out names the pool, {NAME_PATTERN}; {out.resolve().name!r} is no such name")
    pool = describe_pool(out, kind, base.resolve(), [])
    with tempfile.TemporaryDirectory() as cache:
        open_pool(PoolConfig.model_validate(pool), cache_dir=Path(cache))


def read_tasks(tasks: Sequence[str], kind: str, *, max_rows: int, seed: int) -> dict[str, ExampleSet]:
    """Reads `NAME=FILE` arguments.

    Raises:
        InvalidRequestError: a name that no expert may have, a file that cannot be read, rows that do not fit the kind.
    """
    read = {}
    for argument in tasks:
        name, _, file = argument.partition("=")
        if not file or not re.fullmatch(NAME_PATTERN, name) or name in (BASE, MULTITASK) or name in read:
            raise InvalidRequestError(
                f"--task takes NAME=FILE, the name a new one of the form {NAME_PATTERN}, got {argument!r}"
            )
        try:
            rows = read_jsonl(Path(file).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequestError(f"cannot read {file}: {error}") from error
        read[name] = parse_examples(rows, kind, max_examples=max_rows, seed=seed)
    return read


def is_trained(out: Path) -> bool:
    """Whether a training has left its model there, full or as an adapter."""
    return is_adapter(out) or (out / CONFIG).is_file()


def train_one(
    kind: str,
    base: Path,
    tasks: Mapping[str, ExampleSet],
    out: Path,
    settings: TrainSettings,
    *,
    name: str,
    report: OnProgress,
) -> None:
    """Trains one model into `out`, whole or not at all; does nothing where there is one."""
    if is_trained(out):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{name}-") as partial:
        folder = Path(partial) / name
        if kind == "decoder":
            from .decoder import train_decoder

            pooled = ExampleSet.of(example for examples in tasks.values() for example in examples)
            num_left_out = train_decoder(base, pooled, folder, settings, name=name, report=report)
            if num_left_out:
                print(f"{name}: {num_left_out} of {len(pooled)} rows are too long and left out", file=sys.stderr)
        else:
            from .encoder import train_encoder

            train_encoder(base, tasks, folder, settings, name=name, report=report)
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        folder.rename(out)


def write_pool(out: Path, kind: str, base: Path, experts: Sequence[str], *, multitask: bool) -> Path:
    """Writes the configuration of the pool, experts by their folders beside it."""
    pool = describe_pool(out, kind, Path(os.path.relpath(base.resolve(), out.resolve())), experts)
    path = out / POOL_FILE
    header = _HEADER.format(base=base, file=POOL_FILE, multitask=_ABOUT_MULTITASK if multitask else "")
    path.write_text(header + "\n" + yaml.safe_dump({"pools": [pool]}, sort_keys=False))
    return path


def describe_pool(out: Path, kind: str, base: Path, experts: Sequence[str]) -> dict[str, Any]:
    """The pool's section of a configuration."""
    return {
        "id": out.resolve().name,
        "kind": kind,
        "base": str(base),
        "experts": {name: name for name in experts},
        "engine": {"type": "vllm" if kind == "decoder" else "sentence_transformers"},
    }


def _quiet() -> None:
    """The libraries' own bars: ours say what they say."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("decoder", "encoder"), required=True)
    parser.add_argument("--base", type=Path, required=True, help="Folder of the model that all experts start from.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the pool; its name is the pool's id.")
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FILE", help="Repeat for each expert.")
    parser.add_argument("--multitask", action="store_true", help="Also tune one model on all tasks.")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-steps", type=int, help="Stop after so many optimizer steps.")
    parser.add_argument("--max-rows", type=int, default=1_000_000, help="Of each file, sampled by the seed.")
    parser.add_argument("--max-tokens", type=int, help="Longest row of a decoder, longest text of an encoder.")
    parser.add_argument("--lora-rank", type=int, help="Tune an adapter of this rank: it is the expert.")
    parser.add_argument("--lora-alpha", type=int, help="Its alpha; omitted: twice the rank.")
    parser.add_argument(
        "--target-modules",
        type=lambda names: tuple(names.split(",")),
        metavar="NAME,NAME",
        help="Layers that it is on, by the last part of their names; omitted: every linear layer.",
    )
    parser.add_argument("--merge", action="store_true", help="Merge the adapter: the expert is a full checkpoint.")
    parser.add_argument("--bf16", action="store_true", help="Matrix products in bfloat16; parameters stay float32.")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
