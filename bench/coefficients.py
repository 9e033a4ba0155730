"""Learned coefficients: ways to descend where an engine tells losses alone, beside exact gradients.

    python -m bench.coefficients                                                  # the demo's decoder pool
    python -m bench.coefficients --config pools.yaml --pool flan --rows data/rte/train.jsonl data/cola/train.jsonl

Draws five examples of a task a few times and learns coefficients from each by the descent of `weighting: "gradient"`,
with each source of slopes: backward passes, differences, differences with secant updates in between (Broyden),
simultaneous perturbation (SPSA); and by two optimizers that take none (CMA-ES, nevergrad's NGOpt). Prints JSON: what is
minimised (`objective`, nats), the loss on rows that were not drawn, and rows scored; what the backward passes of exact
slopes cost is not in the last. In this process, with torch, in float32, so that the sources alone differ. Needs the
extra `blackbox`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import describe_machine
from cocktail_serve.cli.demo.pools import DECODER_POOL, prepare
from cocktail_serve.config import load_settings
from cocktail_serve.examples import parse_examples, read_jsonl
from cocktail_serve.offline.models import TransformersModels
from cocktail_serve.offline.opened import open_with_progress
from cocktail_serve.pool import BASE
from cocktail_serve.recipe import one_hot
from cocktail_serve.scoring.decoder import TokenizedExample, tokenize_examples
from cocktail_serve.weighting.gradient import BOUND, DIFFERENCE, L2, STEPS, Descent
from cocktail_serve.weighting.softmax import softmax_weights

NUM_EXAMPLES = 5
TEMPERATURE = 0.2

Jacobian = Callable[[np.ndarray], np.ndarray]
"""Slopes `[examples, experts]` of each example's loss, where the coefficients `[experts]` stand."""


class Task:
    """A pool and a few examples, with every parameter in memory: small pools alone.

    Attributes:
        rows_scored: examples that were passed forward, each mixture anew.
    """

    def __init__(self, pool: MixedInMemory, examples: Sequence[TokenizedExample]) -> None:
        self._pool = pool
        self.examples = examples
        self.rows_scored = 0
        num = len(pool.names)
        alone = [self.losses(point).mean() for point in (np.zeros(num), *np.eye(num))]
        shares = softmax_weights(dict(zip([BASE, *pool.names], alone, strict=True)), temperature=TEMPERATURE)
        self.start = np.array([shares[name] for name in pool.names])

    def losses(self, coefficients: np.ndarray) -> np.ndarray:
        self.rows_scored += len(self.examples)
        return self._pool.losses(coefficients, self.examples)

    def objective(self, coefficients: np.ndarray) -> float:
        """What is minimised (nats)."""
        return float(self.losses(coefficients).mean() + L2 * np.sum((coefficients - self.start) ** 2))

    def descend(self, jacobian: Jacobian, *, steps: int = STEPS) -> np.ndarray:
        names = self._pool.names
        path = Descent.beginning_at(dict(zip(names, self.start, strict=True)), names)
        for _ in range(steps):
            here = np.array([path.coefficients[name] for name in names])
            path.descend([dict(zip(names, row, strict=True)) for row in jacobian(here)])
        return np.array([path.coefficients[name] for name in names])

    def exact(self, coefficients: np.ndarray) -> np.ndarray:
        self.rows_scored += len(self.examples)
        return self._pool.jacobian(coefficients, self.examples)

    def differences(self, *, in_turn: bool, every: int = 1) -> Jacobian:
        """Differences at one step of so many, in between what Broyden's update makes of the loss at each step.

        Args:
            in_turn: forwards, backwards, forwards, ...; else forwards always.
        """
        known: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

        def jacobian(coefficients: np.ndarray) -> np.ndarray:
            here = self.losses(coefficients)
            if len(known) % every == 0:
                difference = -DIFFERENCE if in_turn and len(known) // every % 2 else DIFFERENCE
                moved = [self.losses(coefficients + difference * unit) for unit in np.eye(len(coefficients))]
                slopes = (np.stack(moved, axis=1) - here[:, None]) / difference
            else:
                before, at, slopes = known[-1]
                step = coefficients - at
                slopes = slopes + np.outer(here - before - slopes @ step, step) / max(float(step @ step), 1e-12)
            known.append((here, coefficients, slopes))
            return slopes

        return jacobian

    def perturbations(self, *, pairs: int) -> Jacobian:
        """Simultaneous perturbation (Spall 1992): all coefficients at once, by random signs, the mean of some pairs."""
        generator = np.random.default_rng(0)

        def jacobian(coefficients: np.ndarray) -> np.ndarray:
            slopes = []
            for _ in range(pairs):
                signs = generator.choice([-1.0, 1.0], len(coefficients))
                ahead, behind = (self.losses(coefficients + side * DIFFERENCE * signs) for side in (1, -1))
                slopes.append(np.outer((ahead - behind) / (2 * DIFFERENCE), signs))
            return np.mean(slopes, axis=0)

        return jacobian

    def cma(self, *, budget: int) -> np.ndarray:
        import cma

        options = {"seed": 1, "bounds": [-BOUND, BOUND], "maxfevals": budget, "verbose": -9}
        best: np.ndarray = cma.fmin2(self.objective, self.start, 0.2, options)[0]
        return best

    def ngopt(self, *, budget: int) -> np.ndarray:
        import nevergrad

        space = nevergrad.p.Array(init=self.start, lower=-BOUND, upper=BOUND)
        space.random_state = np.random.RandomState(1)
        optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget)
        best: np.ndarray = optimizer.minimize(self.objective).value
        return best


class MixedInMemory:
    """A pool's base and differences to it, mixed by torch in a graph.

    Attributes:
        names: of the experts.
    """

    def __init__(self, config: Path, pool_id: str) -> None:
        settings = load_settings(config)
        described = settings.pool(pool_id)
        pool = open_with_progress(settings, described, lambda *_, **__: None)
        self.models = TransformersModels(pool, described)
        self.names = list(pool.experts)
        self._model = self.models.make(one_hot(pool, BASE, dtype="float32")).float().requires_grad_(False)
        self._shapes = {key: value.shape for key, value in self._model.named_parameters()}
        self._base = _flat(self._model)
        self._differences = torch.stack(
            [_flat(self.models.make(one_hot(pool, name, dtype="float32")).float()) - self._base for name in self.names]
        )

    def _losses(self, coefficients: torch.Tensor, examples: Sequence[TokenizedExample]) -> torch.Tensor:
        flat = self._base + coefficients @ self._differences
        parts = flat.split([shape.numel() for shape in self._shapes.values()])
        mixed = {key: part.view(shape) for (key, shape), part in zip(self._shapes.items(), parts, strict=True)}
        longest = max(len(example.token_ids) for example in examples)
        ids = torch.tensor([[*example.token_ids, *[0] * (longest - len(example.token_ids))] for example in examples])
        logits = torch.func.functional_call(self._model, mixed, (ids,), {"use_cache": False}).logits
        losses = []
        for row, example in enumerate(examples):
            start, end = example.output_start, len(example.token_ids)
            losses.append(torch.nn.functional.cross_entropy(logits[row, start - 1 : end - 1], ids[row, start:end]))
        return torch.stack(losses)

    def losses(self, coefficients: np.ndarray, examples: Sequence[TokenizedExample]) -> np.ndarray:
        """Loss (nats) of each example."""
        with torch.no_grad():
            return self._losses(torch.tensor(coefficients, dtype=torch.float32), examples).double().numpy()

    def jacobian(self, coefficients: np.ndarray, examples: Sequence[TokenizedExample]) -> np.ndarray:
        point = torch.tensor(coefficients, dtype=torch.float32)
        found: torch.Tensor = torch.autograd.functional.jacobian(lambda c: self._losses(c, examples), point)
        return found.double().numpy()


def _flat(model: torch.nn.Module) -> torch.Tensor:
    """All parameters of a model, one behind another."""
    return torch.cat([value.detach().reshape(-1) for value in model.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="the demo's pool if left out")
    parser.add_argument("--pool", default=DECODER_POOL)
    parser.add_argument("--rows", type=Path, nargs="+", help="JSON lines of each task")
    parser.add_argument("--draws", type=int, default=8, help="of each task")
    parser.add_argument("--test-rows", type=int, default=40)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore", message="COBYLA")
    if chosen.config is None:
        demo = prepare(Path.home() / ".cache" / "cocktail-serve" / "demo")
        asked = [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in demo.questions
        ]
        config, tasks = demo.config, {"questions": asked}
    else:
        config, tasks = chosen.config, {path.parent.name: read_jsonl(path.read_text()) for path in chosen.rows}
    pool = MixedInMemory(config, chosen.pool)
    found: dict[str, list[dict[str, float]]] = {}
    for draw, (task, rows) in itertools.product(range(chosen.draws), tasks.items()):
        for name, figures in measure(pool, rows, seed=draw, num_test=chosen.test_rows).items():
            found.setdefault(name, []).append(figures)
            print(task, draw, name, figures, file=sys.stderr, flush=True)
    means = {
        name: {key: float(np.mean([figures[key] for figures in of])) for key in of[0]} for name, of in found.items()
    }
    print(
        json.dumps(
            {"machine": describe_machine(), "experts": pool.names, "tasks": list(tasks), "means": means, "each": found},
            indent=2,
        )
    )


def measure(pool: MixedInMemory, rows: Sequence[Any], *, seed: int, num_test: int) -> dict[str, dict[str, float]]:
    """The figures of every way, of one draw of examples."""
    drawn = random.Random(seed).sample(range(len(rows)), min(len(rows), NUM_EXAMPLES + num_test))
    parsed = parse_examples([_texts(rows[index]) for index in drawn], "decoder", max_examples=len(drawn))
    assert pool.models.max_tokens is not None
    tokenized = tokenize_examples(pool.models.tokenizer, parsed, max_tokens=pool.models.max_tokens - 1)
    examples, test = tokenized[:NUM_EXAMPLES], tokenized[NUM_EXAMPLES:]
    num = len(pool.names)
    budget = STEPS * (num + 1)
    ways: dict[str, Callable[[Task], np.ndarray]] = {
        "base": lambda task: np.zeros(num),
        "start": lambda task: task.start,
        "exact": lambda task: task.descend(task.exact),
        "differences forwards": lambda task: task.descend(task.differences(in_turn=False)),
        "differences in turn": lambda task: task.descend(task.differences(in_turn=True)),
        "differences in turn, secants at every 2nd step": lambda task: task.descend(
            task.differences(in_turn=True, every=2)
        ),
        "perturbation, a pair a step": lambda task: task.descend(task.perturbations(pairs=1)),
        "perturbation, at equal cost": lambda task: task.descend(task.perturbations(pairs=(num + 1) // 2)),
        "CMA-ES, at equal cost": lambda task: task.cma(budget=budget),
        "NGOpt, at equal cost": lambda task: task.ngopt(budget=budget),
    }
    figures = {}
    for name, way in ways.items():
        task = Task(pool, examples)
        before, started_at = task.rows_scored, time.monotonic()
        coefficients = way(task)
        figures[name] = {
            "rows scored": task.rows_scored - before,
            "seconds": time.monotonic() - started_at,
            "objective": task.objective(coefficients),
            "test loss": float(pool.losses(coefficients, test).mean()),
        }
    return figures


def _texts(row: Any) -> Any:
    """Without what a task's file holds beside input and output."""
    return row if "messages" in row else {"input": row["input"], "output": row["output"]}


if __name__ == "__main__":
    main()
