"""Fine-tunes a decoder on input and output with transformers' Trainer, all parameters or an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers import set_seed as set_all_seeds

from cocktail_serve.errors import ContextLengthError, InvalidExamplesError
from cocktail_serve.examples import ExampleSet
from cocktail_serve.loading import require_words
from cocktail_serve.progress import OnProgress
from cocktail_serve.scoring.decoder import TokenizedExample, tokenize_examples

from .saving import dtype_of, loading, store
from .settings import Reporter, TrainSettings

NOT_TRAINED = -100
"""Label of a position that carries no loss, as transformers and torch have it."""

LOCAL_ONLY = {"local_files_only": True, "trust_remote_code": False}


def train_decoder(
    base: Path, examples: ExampleSet, out: Path, settings: TrainSettings, *, name: str, report: OnProgress
) -> int:
    """Trains on the outputs, the text joined token by token as cocktails are scored, and writes what was trained.

    Parameters are trained in float32. That is a whole model, stored in the base's dtype, or with `lora_rank` an adapter
    in float32; with `merge` a whole model again, and the adapter beside it in `out/adapter`.

    Returns:
        How many rows were left out because they are longer than `max_tokens`.

    Raises:
        InvalidExamplesError: no row is short enough.
        CheckpointError, ConfigError: the base cannot be loaded, or has no tokenizer.
    """
    set_all_seeds(settings.seed)
    with loading(base):
        tokenizer = AutoTokenizer.from_pretrained(base, **LOCAL_ONLY)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **LOCAL_ONLY)
    require_words(tokenizer, base)
    rows = tokenize(tokenizer, examples, max_tokens=settings.max_tokens or longest_row(model.config, tokenizer))
    if settings.lora_rank is not None:
        from peft import get_peft_model

        model = get_peft_model(model, settings.lora(task_type="CAUSAL_LM"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **settings.arguments(out / "trainer"),
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
        ),
        train_dataset=[{"input_ids": row.token_ids, "output_start": row.output_start} for row in rows],
        data_collator=collate,
    )
    Reporter(name, report).run(trainer)
    if settings.lora_rank is None:
        store_decoder(model, base, out)
    else:
        model.save_pretrained(out / "adapter" if settings.merge else out)
        if settings.merge:
            store_decoder(model.merge_and_unload(), base, out)
    return len(examples) - len(rows)


def store_decoder(model: PreTrainedModel, base: Path, out: Path) -> None:
    """Writes what was trained from `base`, in the base's dtype."""
    dtype = dtype_of(base)
    # the base's are copied; transformers refuses to write some that it has read, as a temperature without do_sample
    model.generation_config = GenerationConfig()
    store(model.to(device="cpu", dtype=getattr(torch, dtype)).save_pretrained, base, out, dtype=dtype)


def longest_row(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens that the model has positions for; where it counts none (ALiBi, Mamba), the tokenizer's limit or none."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return tokenizer.model_max_length if positions is None else positions


def tokenize(tokenizer: PreTrainedTokenizerFast, examples: ExampleSet, *, max_tokens: int) -> list[TokenizedExample]:
    """The rows that fit, as `scoring.decoder` makes tokens of them.

    Raises:
        InvalidExamplesError: none fits.
    """
    rows = []
    for example in examples:
        try:
            rows += tokenize_examples(tokenizer, ExampleSet.of([example]), max_tokens=max_tokens)
        except ContextLengthError:
            continue
    if not rows:
        raise InvalidExamplesError(f"no row is short enough for {max_tokens} tokens: there is nothing to train on")
    return rows


def collate(rows: Sequence[dict[str, object]]) -> dict[str, torch.Tensor]:
    """Pads on the right, where causal attention does not look; only the output carries loss."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), NOT_TRAINED)
    for index, row in enumerate(rows):
        tokens, start = torch.tensor(row["input_ids"]), row["output_start"]
        ids[index, : len(tokens)] = tokens
        mask[index, : len(tokens)] = 1
        labels[index, start : len(tokens)] = tokens[start:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
