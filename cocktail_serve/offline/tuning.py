"""Tunes an adapter of the base on a handful of examples: what a mixture that was made from them has to beat."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from cocktail_serve.scoring.decoder import TokenizedExample, batch_log_probs, batches_by_length, score_with_transformers
from cocktail_serve.weighting.candidates import mean
from cocktail_serve.weighting.search import deal

if TYPE_CHECKING:
    from torch import Tensor

RANK = 8
"""Of the adapter, on every linear layer; its alpha is twice that."""

STEPS = 12
"""Steps at most, as many as `weighting.gradient` takes."""

LEARNING_RATE = 1e-3
"""Of AdamW, with no decay."""

VERSION = 1
"""Part of every key that what comes of a tuning is kept under: raised when the same examples give another adapter."""

INSTALL = "pip install 'cocktail-serve[eval]'"


class Factors(NamedTuple):
    """What an adapter adds to a layer's output: `x @ down.T @ up.T`.

    Attributes:
        down: `[rank, in]`.
        up: `[out, rank]`, the adapter's scaling in it.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class Tuned:
    """An adapter that was tuned.

    Attributes:
        num_steps: how many steps it took; 0: it is the base.
        held_out: mean held-out loss (nats) after 0, 1, 2, ... steps; empty for one example, which leaves nothing to
            hold out.
        factors: by name of the layer, float32.
    """

    num_steps: int
    held_out: tuple[float, ...]
    factors: Mapping[str, Factors]


def is_available() -> bool:
    """Whether peft is installed."""
    return importlib.util.find_spec("peft") is not None


def tune(model: Any, tokenized: Sequence[TokenizedExample], *, seed: int) -> Tuned:
    """LoRA (arXiv 2106.09685) by AdamW on all examples in every step, as many steps as folds allow.

    How many is chosen as `weighting.gradient` chooses it: the examples are dealt into at most five folds, for each fold
    an adapter of its own follows the slopes of the others, and is asked for the loss of the fold after every step.
    Slopes are measured once for all of them, where the adapter of all examples stands. The number of steps of the least
    mean is taken, of equals the fewest; 0 steps is the base, and all there is for one example.

    Args:
        model: the base in transformers, in evaluation mode, which it stays in: nothing is dropped out. It is as it was
            when this returns.
        seed: of the adapter's first factors and of the dealing.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config).eval()  # in place
    try:
        live = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        folds = [[tokenized[row] for row in fold] for fold in deal(len(tokenized), seed=seed)]
        whole, paths = _Path(live), [_Path([value.detach().clone() for value in live]) for _ in folds]
        held_out: list[float] = []
        factors, num_steps = dict(_factors(model)), 0
        for step in range(STEPS + 1 if folds else 0):
            losses = []
            for path, fold in zip(paths, folds, strict=True):
                with _in_place(live, path.parameters):
                    losses += score_with_transformers(model, fold)
            if held_out and mean(losses) < min(held_out):
                factors, num_steps = dict(_factors(model)), step
            held_out.append(mean(losses))
            if step < STEPS:
                slopes = [_slopes(model, live, fold) for fold in folds]
                total = [torch.stack(of_parameter).sum(dim=0) for of_parameter in zip(*slopes, strict=True)]
                whole.descend(total, len(tokenized))
                for path, fold, own in zip(paths, folds, slopes, strict=True):
                    others = [of_all - of_fold for of_all, of_fold in zip(total, own, strict=True)]
                    path.descend(others, len(tokenized) - len(fold))
    finally:
        adapted.unload()
        vars(model).pop("peft_config", None)  # older releases leave it, and take the next adapter for a second one
    return Tuned(num_steps, tuple(held_out), factors)


class _Path:
    """AdamW on parameters, by slopes that were measured elsewhere."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        import torch

        self.parameters = parameters
        self._optimizer = torch.optim.AdamW(list(parameters), lr=LEARNING_RATE, weight_decay=0.0)

    def descend(self, slopes: Sequence[Tensor], num_examples: int) -> None:
        """One step.

        Args:
            slopes: of the sum of the losses of so many examples, by parameter.
        """
        for parameter, slope in zip(self.parameters, slopes, strict=True):
            parameter.grad = slope / num_examples
        self._optimizer.step()


@contextmanager
def _in_place(live: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Other values in a model's parameters, for as long as it is open."""
    own = [parameter.data for parameter in live]
    for parameter, value in zip(live, values, strict=True):
        parameter.data = value.data
    try:
        yield
    finally:
        for parameter, value in zip(live, own, strict=True):
            parameter.data = value


def _slopes(model: Any, live: Sequence[Tensor], tokenized: Sequence[TokenizedExample]) -> list[Tensor]:
    """Of the sum of the examples' losses, by parameter."""
    import torch

    total = [torch.zeros_like(parameter) for parameter in live]
    for batch in batches_by_length([len(example.token_ids) for example in tokenized]):
        log_probs = batch_log_probs(model, [tokenized[index] for index in batch])
        loss = -torch.stack([of_row.mean() for of_row in log_probs]).sum()
        for of_all, of_batch in zip(total, torch.autograd.grad(loss, list(live)), strict=True):
            of_all.add_(of_batch)
    return total


@contextmanager
def applied(model: Any, factors: Mapping[str, Factors], coefficients: Tensor | None = None) -> Iterator[None]:
    """Adds the products of factors to what layers of a model put out, for as long as it is open.

    Args:
        coefficients: `[batch, rank]`, of the middle of the products, where rows of a batch have their own; None: 1.
    """

    def add(down: Tensor, up: Tensor, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        middle = inputs[0].to(down.dtype) @ down.T
        if coefficients is not None:
            middle = middle * coefficients[:, None]
        return output + (middle @ up.T).to(output.dtype)

    handles = [
        model.get_submodule(name).register_forward_hook(partial(add, *of_layer)) for name, of_layer in factors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _factors(model: Any) -> Iterator[tuple[str, Factors]]:
    """The adapter's factors by name of the layer."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            (adapter,) = module.active_adapters
            down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            yield name, Factors(down.detach().float().clone(), module.scaling[adapter] * up.detach().float())
