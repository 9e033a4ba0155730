"""Makes the pool of the setting `smollm2`: the chat model of examples/smollm2 and eight LoRA experts of it.

    python -m bench.paper.chat_pool --data DATA --out POOLS/smollm2

The experts are tuned by `examples.train_experts` on short rows of `DATA/decoder/<task>/train.jsonl`, as messages. What
is there is not made again. Some minutes an expert on a core.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cocktail_serve.examples import read_jsonl

MAX_CHARACTERS = {
    "clinc150": 300,
    "commongen": 300,
    "hellaswag": 700,
    "mrpc": 300,
    "nl2bash": 300,
    "squad": 800,
    "sst2": 300,
    "stsb": 300,
}
"""Experts, and how long a row of theirs may be, input and output together."""

MAX_TOKENS = 10_000
"""A quarter of the characters of an expert's rows together: about what it is trained on."""

SEED = 0
TRAINING = (
    "--kind=decoder --lora-rank=8 --target-modules=q_proj,v_proj --learning-rate=2e-3 --epochs=1 --batch-size=8 "
    f"--bf16 --max-tokens=320 --seed={SEED}"
).split()


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A row of {"input", "output"} as a turn of a chat."""
    turns = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
    return {"messages": turns}


def rows_of(file: Path, max_characters: int) -> list[dict[str, Any]]:
    """The rows that an expert is tuned on, drawn by the seed."""
    rows = read_jsonl(file.read_text())
    random.Random(SEED).shuffle(rows)
    taken, characters = [], 0
    for row in rows:
        length = len(row["input"]) + len(row["output"])
        if length <= max_characters and characters + length <= 4 * MAX_TOKENS:
            taken.append(as_messages(row))
            characters += length
    return taken


def main(argv: Sequence[str] | None = None) -> int:
    from examples.smollm2.make_base import make_base
    from examples.train_experts.__main__ import main as train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    base = options.out / "base"
    make_base(base)
    rows = options.out / "rows"
    rows.mkdir(exist_ok=True)
    tasks = []
    for name, max_characters in MAX_CHARACTERS.items():
        chosen = rows_of(options.data / "decoder" / name / "train.jsonl", max_characters)
        (rows / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        print(f"{name}: {len(chosen)} rows", flush=True)
        tasks.append(f"--task={name}={rows / name}.jsonl")
    return train([f"--base={base}", f"--out={options.out}", *TRAINING, *tasks])


if __name__ == "__main__":
    sys.exit(main())
