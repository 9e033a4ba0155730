"""Trains the five experts of the pool: LoRA adapters of rank 8 on the query and value projections, kept in bfloat16.

    python -m examples.smollm2.make_base --out smollm2
    python -m examples.smollm2.make_experts --base smollm2 --rows ROWS --out examples/smollm2/experts

`--rows` is a folder with a file of rows {"input", "output"} for each of `SOURCES`; README.md says where they are from.
The fifth expert's rows are made here. Some minutes an expert on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cocktail_serve.examples import read_jsonl
from examples.smollm2.choices import make_rows

SOURCES = ("banking", "intents", "sentences", "shell")
"""Experts that are tuned on data of others."""

CHOICES = "choices"
NUM_ROWS = 160
MAX_CHARACTERS = 220
"""Of a row; longer ones are left out."""

SEED = 0
TRAINING = (
    "--kind=decoder --lora-rank=8 --target-modules=q_proj,v_proj --learning-rate=2e-3 --epochs=1 --batch-size=8 "
    f"--bf16 --max-tokens=256 --seed={SEED}"
).split()


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Rows of a file as chat messages, drawn by the seed."""
    rows = read_jsonl(file.read_text(encoding="utf-8"))
    short = [row for row in rows if len(row["input"]) + len(row["output"]) < MAX_CHARACTERS]
    random.Random(SEED).shuffle(short)
    return [
        {
            "messages": [
                {"role": "user", "content": row["input"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in short[:NUM_ROWS]
    ]


def store(trained: Path, out: Path) -> None:
    """Writes an adapter in bfloat16, without where its base lay."""
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True, exist_ok=True)
    factors = load_file(trained / "adapter_model.safetensors")
    save_file({name: factor.bfloat16() for name, factor in factors.items()}, out / "adapter_model.safetensors")
    config = json.loads((trained / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    from examples.train_experts.__main__ import main as train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    tasks = {name: rows_of(options.rows / f"{name}.jsonl") for name in SOURCES}
    tasks[CHOICES] = make_rows(NUM_ROWS, seed=SEED)
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        folder = Path(scratch)
        for name, rows in tasks.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = [f"--base={options.base}", f"--out={folder / 'pool'}", *TRAINING]
        failed = train([*arguments, *(f"--task={name}={folder / name}.jsonl" for name in tasks)])
        if not failed:
            for name in tasks:
                store(folder / "pool" / name, options.out / name)
    return failed


if __name__ == "__main__":
    sys.exit(main())
