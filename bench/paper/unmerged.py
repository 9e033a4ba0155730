"""A pool of adapters in memory whose mixtures are made while it computes: no parameters are mixed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from cocktail_serve.offline.opened import open_with_progress
from cocktail_serve.offline.tuning import Factors, Tuned, applied
from cocktail_serve.pool import BASE, Member
from cocktail_serve.progress import OnProgress
from cocktail_serve.recipe import Recipe, one_hot
from cocktail_serve.scoring.decoder import TokenizedExample, batches_by_length

PREFIX = "base_model.model."
"""Before the name of a layer in a file of peft's."""


class NotKept(CocktailError):
    """Something is asked for that was not measured before."""


class UnmergedDecoders(InMemoryDecoders):
    """A `DecoderBackend` of LoRA experts: a linear mixture is the base and the experts' factors, each times its
    coefficient, as an engine serves them unmerged; the factors are float32 here.

    What all rows begin with is computed once for them.

    Args:
        args: of `InMemoryDecoders`.
        is_kept_only: nothing is computed.
    """

    def __init__(self, *args: Any, is_kept_only: bool) -> None:
        super().__init__(*args)
        self._is_kept_only = is_kept_only
        self._experts = {member.fingerprint: factors_of(member) for member in self.pool.experts.values()}

    @contextmanager
    def _using(self, recipe: Recipe | TunedRecipe) -> Iterator[Any]:
        if self._is_kept_only:
            raise NotKept(f"{recipe.digest[:12]} was not measured")
        if isinstance(recipe, TunedRecipe):
            with super()._using(recipe) as model:
                yield model
            return
        model = self._models.use(one_hot(self.pool, BASE, dtype=self.dtype))
        with applied(model, mixed(self._experts, recipe.task_vector_coefficients)):
            yield model

    def _tuned(self, recipe: TunedRecipe) -> Tuned:
        if self._is_kept_only:
            raise NotKept(f"{recipe.digest[:12]} was not tuned")
        return super()._tuned(recipe)

    def log_probs(self, recipe: Recipe | TunedRecipe, tokenized: Sequence[TokenizedExample]) -> list[np.ndarray]:
        with self._using(recipe) as model, torch.inference_mode():
            return log_probs_behind_prefix(model, tokenized)


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


def mixed(experts: Mapping[str, Mapping[str, Factors]], coefficients: Mapping[str, float]) -> dict[str, Factors]:
    """One adapter that adds what all add, each times its coefficient."""
    taken = [(experts[fingerprint], coefficient) for fingerprint, coefficient in coefficients.items()]
    return {
        layer: Factors(
            torch.cat([of_expert[layer].down for of_expert, _ in taken]),
            torch.cat([coefficient * of_expert[layer].up for of_expert, coefficient in taken], dim=1),
        )
        for layer in (taken[0][0] if taken else ())
    }


def log_probs_behind_prefix(model: Any, tokenized: Sequence[TokenizedExample]) -> list[np.ndarray]:
    """As `scoring.decoder.token_log_probs`, of rows that begin alike: what they begin with is computed once."""
    ids = [example.token_ids for example in tokenized]
    shared = min(example.output_start for example in tokenized) - 1
    while shared and any(row[:shared] != ids[0][:shared] for row in ids):
        shared -= 1
    prefix = None
    if shared:
        prefix = model(input_ids=torch.tensor([ids[0][:shared]]), use_cache=True, logits_to_keep=1).past_key_values
    log_probs: dict[int, np.ndarray] = {}
    for batch in batches_by_length([len(row) - shared for row in ids]):
        rows = [torch.tensor(ids[index][shared:]) for index in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        ends = torch.tensor([len(ids[index]) for index in batch])
        attention_mask = (torch.arange(shared + input_ids.shape[1]) < ends[:, None]).long()
        past = copy.deepcopy(prefix)
        if past is not None:
            past.batch_repeat_interleave(len(batch))
        first = min(tokenized[index].output_start for index in batch) - shared - 1
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=input_ids.shape[1] - first,
        ).logits
        for of_row, index, row in zip(logits, batch, rows, strict=True):
            start = tokenized[index].output_start - shared
            predicted = of_row[start - 1 - first : len(row) - 1 - first].float()
            losses = torch.nn.functional.cross_entropy(predicted, row[start:], reduction="none")
            log_probs[index] = -losses.double().numpy()
    return [log_probs[index] for index in range(len(tokenized))]


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
