"""The product of a step beside what torch needs for it, and beside the base's own product of the layer.

Every case has `--layers` layers of factors of its own, walked through in turn as a model does, so that factors come out
of the memory that a model's would come out of. Prints JSON: microseconds a layer, medians of `--runs` walks, all in
turn, and ratios. Needs torch alone.

- `kernel`: `Kernel.add` of the compiled kernel, or of torch's where there is none.
- `stacked`: two matrix products over the factors of all experts (`StackedKernel`).
- `by_expert`: two matrix products for each expert in use, over all rows.
- `base`: `torch.nn.functional.linear` with the layer's weights, which stays as it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.machine import describe_machine
from vllm_cocktail.unmerged.kernel import Kernel, LayerShape, Limits, load_kernel
from vllm_cocktail.unmerged.torch_kernel import StackedKernel

CPU = torch.device("cpu")

MAX_ELEMENTS = 1 << 26
"""Of the factors of a case: what has larger ones gets fewer layers."""


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of one request each, unless told."""

    in_features: int
    output_sizes: tuple[int, ...]
    rows: int
    rank: int = 8
    experts: int = 8
    used: int = 5
    """Experts that a request uses, any of them."""
    dtype: torch.dtype = torch.bfloat16
    rows_of_request: int = 1

    @property
    def elements(self) -> int:
        """Of one layer's factors."""
        return self.experts * self.rank * sum(self.in_features + width for width in self.output_sizes)

    def coefficients(self) -> np.ndarray:
        generator = np.random.default_rng(0)
        rows = np.zeros((self.rows // self.rows_of_request, self.experts), np.float32)
        for row in rows:
            row[generator.choice(self.experts, self.used, replace=False)] = 1 / self.used
        return rows


CASES: dict[str, Case] = {
    **{f"qkv, {rows} rows": Case(576, (576, 192, 192), rows) for rows in (1, 4, 16, 64)},
    "o, 16 rows": Case(576, (576,), 16),
    "gate_up, 1 row": Case(576, (1536, 1536), 1),
    "gate_up, 16 rows": Case(576, (1536, 1536), 16),
    "down, 16 rows": Case(1536, (576,), 16),
    "qkv, 256 rows of 4 requests": Case(576, (576, 192, 192), 256, rows_of_request=64),
    "gate_up, 256 rows of 4 requests": Case(576, (1536, 1536), 256, rows_of_request=64),
    "gate_up, 1024 rows of 4 requests": Case(576, (1536, 1536), 1024, rows_of_request=256),
    "hidden 256, rank 16, float32, qkv, 16 rows": Case(256, (256, 128, 128), 16, rank=16, dtype=torch.float32),
    "hidden 256, rank 16, float32, gate_up, 16 rows": Case(256, (768, 768), 16, rank=16, dtype=torch.float32),
    "64 experts of rank 64, 2048 wide, 16 rows": Case(2048, (2048,), 16, rank=64, experts=64),
}


def ways(case: Case, layers: int) -> dict[str, Callable[[int], object]]:
    """By name, what computes layer i."""
    limits = Limits(case.rows, case.experts, case.rank * case.experts)
    kernels: dict[str, Kernel] = {"kernel": load_kernel(CPU, limits), "stacked": StackedKernel(CPU, limits)}
    shape = LayerShape(case.in_features, case.output_sizes, case.dtype)
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(case.dtype)

    x, y = random(case.rows, case.in_features), random(case.rows, shape.out_features)
    factors = [
        [
            [(random(case.rank, case.in_features), random(width, case.rank) / 1000) for width in case.output_sizes]
            for _ in range(case.experts)
        ]
        for _ in range(layers)
    ]
    weights = [random(shape.out_features, case.in_features) for _ in range(layers)]
    found: dict[str, Callable[[int], object]] = {}
    rows = case.coefficients()
    for name, kernel in kernels.items():
        step = kernel.new_step()
        step.set(rows, np.full(len(rows), case.rows_of_request, np.int32))
        made = [kernel.new_layer(shape) for _ in range(layers)]
        for layer, experts in zip(made, factors, strict=True):
            for expert, slices in enumerate(experts):
                for index, (lora_a, lora_b) in enumerate(slices):
                    layer.set_factors(expert, index, lora_a, lora_b, 1.0)
        found[name] = lambda i, kernel=kernel, step=step, made=made: kernel.add(step, made[i], x, y)  # type: ignore[misc]
    columns = torch.from_numpy(np.repeat(rows, case.rows_of_request, axis=0)).to(case.dtype)
    parts = y.split(case.output_sizes, dim=1)  # type: ignore[no-untyped-call]

    def by_expert(i: int) -> None:
        for expert, slices in enumerate(factors[i]):
            for part, (lora_a, lora_b) in zip(parts, slices, strict=True):
                part.addmm_((x @ lora_a.T) * columns[:, expert, None], lora_b.T)

    return {**found, "by_expert": by_expert, "base": lambda i: torch.nn.functional.linear(x, weights[i])}


def measure(case: Case, layers: int, runs: int) -> dict[str, float]:
    layers = min(layers, max(1, MAX_ELEMENTS // case.elements))
    works = ways(case, layers)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs + 2):
        for name, work in works.items():
            begin_s = time.perf_counter()
            for i in range(layers):
                work(i)
            seconds[name].append((time.perf_counter() - begin_s) / layers)
    medians = {name: 1e6 * statistics.median(values[2:]) for name, values in seconds.items()}
    return {
        **{f"{name}_us": round(median, 1) for name, median in medians.items()},
        "kernel_over_stacked": round(medians["kernel"] / medians["stacked"], 3),
        "kernel_over_by_expert": round(medians["kernel"] / medians["by_expert"], 3),
        "kernel_over_base": round(medians["kernel"] / medians["base"], 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="cases whose names contain it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    kernel = load_kernel(CPU, Limits(1, 1, 1))
    figures = {
        name: measure(case, options.layers, options.runs) for name, case in CASES.items() if options.only in name
    }
    head = {"machine": describe_machine(), "threads": options.threads, "kernel": kernel.name, "reason": kernel.reason}
    print(json.dumps({**head, "cases": figures}, indent=2))


if __name__ == "__main__":
    main()
