"""Fine-tunes an encoder by contrast with sentence-transformers' trainer, all parameters or an adapter."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed as set_all_seeds

from cocktail_serve.examples import ExampleSet
from cocktail_serve.loading import require_words
from cocktail_serve.progress import OnProgress
from cocktail_serve.scoring.retrieval import retrieval_example

from .saving import dtype_of, loading, store
from .settings import Reporter, TrainSettings

TEMPERATURE = 0.02
"""What similarities are divided by: LM-Cocktail's, for fine-tuning (its weighing uses 0.05)."""


def train_encoder(
    base: Path, tasks: Mapping[str, ExampleSet], out: Path, settings: TrainSettings, *, name: str, report: OnProgress
) -> None:
    """Trains on queries and their positives and writes what was trained, in the forms that `train_decoder` has.

    What stands beside a positive in its batch is its negatives, with one of the row's own where it has any. A batch
    holds rows of one task, and no text twice.

    Args:
        tasks: rows by task; several: one model is tuned on all of them.
    """
    set_all_seeds(settings.seed)
    model = load(base)
    if settings.max_tokens is not None:
        model.max_seq_length = settings.max_tokens
    if settings.lora_rank is not None:
        from peft import get_peft_model

        # modules behind the transformer would be trained whole, and the adapter alone be another model
        model.requires_grad_(False)
        # puts its layers into the transformer itself; there is nothing to put back into `model`
        adapted = get_peft_model(model[0].auto_model, settings.lora(task_type="FEATURE_EXTRACTION"))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            **settings.arguments(out / "trainer"), batch_sampler=BatchSamplers.NO_DUPLICATES
        ),
        train_dataset=datasets_of(tasks, seed=settings.seed),
        loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
    )
    Reporter(name, report).run(trainer)
    if settings.lora_rank is None:
        store_encoder(model, base, out)
    else:
        adapted.save_pretrained(out / "adapter" if settings.merge else out)
        if settings.merge:
            adapted.merge_and_unload()
            store_encoder(model, base, out)


def load(base: Path) -> SentenceTransformer:
    """The model in float32, whatever dtype it is stored in.

    Raises:
        CheckpointError, ConfigError: the base cannot be loaded, or has no tokenizer.
    """
    with loading(base):
        model = SentenceTransformer(
            str(base), local_files_only=True, trust_remote_code=False, model_kwargs={"dtype": torch.float32}
        )
    require_words(model.tokenizer, base)
    return model.float()


def store_encoder(model: SentenceTransformer, base: Path, out: Path) -> None:
    """Writes what was trained from `base`, in the base's dtype."""
    dtype = dtype_of(base)
    model.to(device="cpu", dtype=getattr(torch, dtype))
    store(lambda folder: model.save(str(folder), create_model_card=False), base, out, dtype=dtype)


def datasets_of(tasks: Mapping[str, ExampleSet], *, seed: int) -> DatasetDict:
    """Rows of query and positive, and of query, positive and negative, each task's apart.

    A query with several positives is a row for each; of a row's negatives one is drawn.
    """
    rng = random.Random(seed)
    found: dict[str, list[dict[str, str]]] = {}
    for task, examples in tasks.items():
        for row in map(retrieval_example, examples):
            for positive in row.pos:
                pair = {"anchor": row.query, "positive": positive}
                negatives = [text for text in row.neg if text not in row.pos]
                if negatives:
                    found.setdefault(f"{task}-triplets", []).append({**pair, "negative": rng.choice(negatives)})
                else:
                    found.setdefault(f"{task}-pairs", []).append(pair)
    return DatasetDict({name: Dataset.from_list(rows) for name, rows in found.items()})
