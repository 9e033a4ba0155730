"""A pool of adapters in memory whose mixtures are made while it computes: no parameters are mixed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from cocktail_serve.config import Settings
from cocktail_serve.errors import CocktailError
from cocktail_serve.evaluation.backend import TunedRecipe
from cocktail_serve.evaluation.cells import CellStore
from cocktail_serve.evaluation.in_memory import InMemoryDecoders
from cocktail_serve.evaluation.measure import Measuring
from cocktail_serve.evaluation.runs import CELLS, Evaluation
from cocktail_serve.examples import ExampleSet
from cocktail_serve.offline.opened import open_with_progress
from cocktail_serve.offline.tuning import Factors, Tuned, applied
from cocktail_serve.pool import BASE, Member
from cocktail_serve.progress import OnProgress
from cocktail_serve.recipe import Recipe, one_hot
from cocktail_serve.scoring.decoder import TokenizedExample, batches_by_length, mean_loss

PREFIX = "base_model.model."
"""Before the name of a layer in a file of peft's."""


class NotKept(CocktailError):
    """Something is asked for that was not measured before."""


class UnmergedDecoders(InMemoryDecoders):
    """A `DecoderBackend` of LoRA experts: a linear mixture is the base and the experts' factors, each times its
    coefficient, as an engine serves them unmerged; the factors are float32 here.

    Rows of several mixtures share a batch, and what all rows begin with is computed once for a mixture.

    Args:
        args: of `InMemoryDecoders`.
        is_kept_only: nothing is computed.
    """

    def __init__(self, *args: Any, is_kept_only: bool) -> None:
        super().__init__(*args)
        self._is_kept_only = is_kept_only
        experts = {member.fingerprint: factors_of(member) for member in self.pool.experts.values()}
        self._experts = list(experts)
        self._factors = joined(list(experts.values()))
        self._rank = next(iter(self._factors.values())).down.shape[0] // len(experts)

    def foresee(self, asked: Sequence[tuple[Recipe, Sequence[int]]], examples: ExampleSet) -> None:
        new = [(recipe, rows) for recipe, rows in asked if self._store.get(self._key(recipe, examples, rows)) is None]
        if not new:
            return
        tokenized = self._tokenized(examples)
        rows = [(index, tokenized[row]) for index, (_, of_recipe) in enumerate(new) for row in of_recipe]
        losses = iter(map(mean_loss, self._log_probs([recipe for recipe, _ in new], rows)))
        for recipe, of_recipe in new:
            self._store.put(self._key(recipe, examples, of_recipe), [next(losses) for _ in of_recipe])

    def log_probs(self, recipe: Recipe | TunedRecipe, tokenized: Sequence[TokenizedExample]) -> list[np.ndarray]:
        rows = [(0, example) for example in tokenized]
        if isinstance(recipe, Recipe):
            return self._log_probs([recipe], rows)
        self._check_may_compute()
        with self._using(recipe) as model, torch.inference_mode():
            return log_probs_behind_prefix(model, rows, lambda _: nullcontext())

    def _log_probs(self, recipes: Sequence[Recipe], rows: Sequence[Row]) -> list[np.ndarray]:
        self._check_may_compute()
        coefficients = torch.tensor(
            [
                [recipe.task_vector_coefficients.get(fingerprint, 0.0) for fingerprint in self._experts]
                for recipe in recipes
            ]
        ).repeat_interleave(self._rank, dim=1)  # [mixtures, experts * rank]
        with self._using(one_hot(self.pool, BASE, dtype=self.dtype)) as model, torch.inference_mode():
            return log_probs_behind_prefix(
                model, rows, lambda mixtures: applied(model, self._factors, coefficients[mixtures])
            )

    def _tuned(self, recipe: TunedRecipe) -> Tuned:
        self._check_may_compute()
        return super()._tuned(recipe)

    def _check_may_compute(self) -> None:
        if self._is_kept_only:
            raise NotKept("this was not measured")


def factors_of(expert: Member) -> dict[str, Factors]:
    """An adapter's factors by name of the layer, its scaling in the second."""
    config: Any = PeftConfig.from_pretrained(str(expert.path))
    tensors = load_file(Path(expert.path) / "adapter_model.safetensors")
    scaling = config.lora_alpha / config.r
    return {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): Factors(
            down.float(), scaling * tensors[name.replace("lora_A", "lora_B")].float()
        )
        for name, down in tensors.items()
        if name.endswith(".lora_A.weight")
    }


def joined(experts: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """The factors of all experts beside each other: `[experts * rank, in]`, `[out, experts * rank]`."""
    return {
        layer: Factors(
            torch.cat([of_expert[layer].down for of_expert in experts]),
            torch.cat([of_expert[layer].up for of_expert in experts], dim=1),
        )
        for layer in experts[0]
    }


Row = tuple[int, TokenizedExample]
"""A mixture by its number, and what is scored under it."""


def log_probs_behind_prefix(
    model: Any, rows: Sequence[Row], under: Callable[[Sequence[int]], AbstractContextManager[None]]
) -> list[np.ndarray]:
    """As `scoring.decoder.token_log_probs`, of rows that begin alike: what they begin with is computed once a mixture.

    Args:
        under: makes the model that of these mixtures, one for each row of a batch.
    """
    ids = [example.token_ids for _, example in rows]
    shared = min(example.output_start for _, example in rows) - 1
    while shared and any(row[:shared] != ids[0][:shared] for row in ids):
        shared -= 1
    mixtures = list(dict.fromkeys(mixture for mixture, _ in rows))
    prefix = None
    if shared:
        with under(mixtures):
            input_ids = torch.tensor([ids[0][:shared]] * len(mixtures))
            prefix = model(input_ids=input_ids, use_cache=True, logits_to_keep=1).past_key_values
    log_probs: dict[int, np.ndarray] = {}
    for batch in batches_by_length([len(row) - shared for row in ids]):
        ends = [torch.tensor(ids[index][shared:]) for index in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(ends, batch_first=True, padding_value=0)
        lengths = torch.tensor([len(ids[index]) for index in batch])
        of_batch = [rows[index][0] for index in batch]
        past = copy.deepcopy(prefix)
        if past is not None:
            past.batch_select_indices(torch.tensor([mixtures.index(mixture) for mixture in of_batch]))
        first = min(rows[index][1].output_start for index in batch) - shared - 1
        with under(of_batch):
            logits = model(
                input_ids=input_ids,
                attention_mask=(torch.arange(shared + input_ids.shape[1]) < lengths[:, None]).long(),
                past_key_values=past,
                use_cache=past is not None,
                logits_to_keep=input_ids.shape[1] - first,
            ).logits
        for of_row, index, row in zip(logits, batch, ends, strict=True):
            start = rows[index][1].output_start - shared
            predicted = of_row[start - 1 - first : len(row) - 1 - first].float()
            losses = torch.nn.functional.cross_entropy(predicted, row[start:], reduction="none")
            log_probs[index] = -losses.double().numpy()
    return [log_probs[index] for index in range(len(rows))]


@contextmanager
def open_unmerged(
    settings: Settings, pool_id: str, *, out: Path, how: Measuring, is_kept_only: bool, report: OnProgress
) -> Iterator[Evaluation]:
    """As `open_evaluation`, over `UnmergedDecoders`."""
    config = settings.pool(pool_id)
    store = CellStore(out / CELLS)
    pool = replace(open_with_progress(settings, config, report), mode="merged")  # recipes of sums
    backend = UnmergedDecoders(settings, config, pool, store, report, is_kept_only=is_kept_only)
    yield Evaluation(settings, backend, store, how, None)
