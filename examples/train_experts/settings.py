"""How experts are trained: what every kind of model has in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cocktail_serve.progress import OnProgress


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Options of one training; the defaults are those of LM-Cocktail (arXiv 2311.13534), batch and length apart.

    Attributes:
        max_steps: optimizer steps at most; None: all epochs.
        max_tokens: longest row; None: what the model takes.
        lora_rank: None: all parameters are tuned. Otherwise the rank of an adapter, which is the expert.
        target_modules: layers that the adapter is on, by the last part of their names; None: every linear layer.
        merge: with an adapter: it is merged into the base, and the expert is a full checkpoint.
        bf16: matrix products in bfloat16 (parameters stay float32): faster where the hardware has units for it.
    """

    learning_rate: float = 2e-5
    epochs: float = 3.0
    batch_size: int = 16
    max_steps: int | None = None
    max_tokens: int | None = None
    lora_rank: int | None = None
    lora_alpha: int | None = None
    target_modules: tuple[str, ...] | None = None
    merge: bool = False
    bf16: bool = False
    seed: int = 0

    def arguments(self, scratch: Path) -> dict[str, Any]:
        """What transformers' and sentence-transformers' arguments have in common; nothing is kept but the model."""
        return {
            "output_dir": str(scratch),
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "max_steps": -1 if self.max_steps is None else self.max_steps,
            "per_device_train_batch_size": self.batch_size,
            "warmup_steps": 0.1,  # a share of all steps
            "lr_scheduler_type": "linear",
            "bf16": self.bf16,
            "use_cpu": not torch.accelerator.is_available(),  # bf16 on a CPU wants to be told
            "seed": self.seed,
            "data_seed": self.seed,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,  # `Reporter` shows how far it is
            "dataloader_pin_memory": False,
        }

    def lora(self, **options: Any) -> Any:
        """peft's configuration of the adapter: alpha twice the rank unless given."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * (self.lora_rank or 0) if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear" if self.target_modules is None else list(self.target_modules),
            **options,
        )


class Reporter(TrainerCallback):
    """Tells the terminal how many steps of a training are done."""

    def __init__(self, name: str, report: OnProgress) -> None:
        self._what = f"training {name}"
        self._report = report

    def run(self, trainer: Trainer) -> None:
        """Trains, and shows nothing else."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)
        trainer.train()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report(self._what, 0, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report(self._what, state.global_step, state.max_steps)
