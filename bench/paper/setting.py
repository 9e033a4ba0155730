"""A setting: which pools, tasks and limits the tables are made with, read from a YAML beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from cocktail_serve.errors import ConfigError
from cocktail_serve.evaluation.metrics import Metric

FOLDER = Path(__file__).parent

PoolKind = Literal["decoder", "encoder"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolSetting(_Section):
    """One pool and what it is measured on.

    Attributes:
        base: folder below `--pools`, or a hub id; None: all-MiniLM-L6-v2 from its package.
        experts: folder below `--pools` (a model or an adapter) or hub id by name.
        data: folder of the tasks below `--data`.
        max_rows: rows or queries of a task that are measured; None: all.
        max_rows_elsewhere: the same of a task that is another's "other task", of which there are many pairs.
        max_documents: documents of a corpus beside those that are judged; None: all.
        targets: expert by the task that it was fine-tuned for.
        others: tasks that no expert was fine-tuned for, of Tables 1 and 2.
        unseen: tasks of Tables 3 and 4.
        alpha_targets: of `targets`, those that alpha is varied for.
        metrics: by task, where it is not accuracy (decoders) or NDCG@10 (encoders).
        boundaries: what prompts end with, where a pool was trained with BOS before a text and the space behind these as
            a token of its own, and its tokenizer does neither: it is made to.
        chat: every row is a turn of a chat, as the chat template of the base writes it; a task without files of its own
            is the rows of all folders in it.
        max_characters: rows of decoders that are longer, input and output together, are left out, as rows to be
            measured and as examples; None: none are.
        unmerged: the experts are LoRA adapters, and mixtures are made while the base computes.
        measured: what is measured of a task; None: all that it has.
        multitask: `TrainSettings` and `max_rows` of the multitask model; None: there is none.
    """

    base: str | None
    experts: dict[str, str]
    engine: dict[str, Any]
    data: str
    max_rows: int | None = None
    max_rows_elsewhere: int | None = None
    max_documents: int | None = None
    max_new_tokens: int = 64
    targets: dict[str, str]
    others: list[str]
    unseen: list[str]
    alpha_targets: list[str]
    metrics: dict[str, Metric] = Field(default_factory=dict)
    boundaries: list[str] = Field(default_factory=list)
    chat: bool = False
    max_characters: int | None = None
    unmerged: bool = False
    measured: tuple[Metric, ...] | None = None
    multitask: dict[str, Any] | None = None


class Setting(_Section):
    """All of a YAML file.

    Attributes:
        selective: the temperature of a second LM-Cocktail 10, beside the paper's.
        example_counts: numbers of examples that weightings are compared at.
        decoder: None: the setting has no such pool, as the next.
    """

    seeds: list[int]
    num_examples: int = 5
    temperatures: list[float]
    selective: float
    alphas: list[float]
    table5: list[int | None]
    example_counts: list[int] = Field(default=[5])
    decoder: PoolSetting | None = None
    encoder: PoolSetting | None = None

    def pool(self, kind: PoolKind) -> PoolSetting:
        """The pool of a kind.

        Raises:
            ConfigError: the setting has none.
        """
        pool = self.decoder if kind == "decoder" else self.encoder
        if pool is None:
            raise ConfigError(f"this setting has no pool of {kind}s: leave out what is made of one")
        return pool

    def without_multitask(self) -> Setting:
        """The same with no multitask models."""
        pools = {"decoder": self.decoder, "encoder": self.encoder}
        return self.model_copy(
            update={kind: pool and pool.model_copy(update={"multitask": None}) for kind, pool in pools.items()}
        )


def load_setting(name: str) -> Setting:
    """Reads `<name>.yaml` beside this file, or a path."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    return Setting.model_validate(yaml.safe_load(path.read_text()))
