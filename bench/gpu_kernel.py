"""The linear kernel on a GPU: over models in device memory against a measured copy, and from pinned host memory.

Eight models of Llama-7B's shapes in bfloat16, as many layers of them as `--layers` says, since the kernel sees one
parameter at a time anyway. Prints JSON. Needs CUDA and Triton, and nothing else: no vLLM, no checkpoint.

- `copy`: `Tensor.copy_` of one large tensor, device to device; a byte read and a byte written count one each.
- `kernel`: all inputs read once, the output written once.
- `from_host`: the same from pinned host memory, its copies overlapped with the sums; beside it one bare host-to-device
  copy of as many bytes.
- `torch`: what torch does without Triton.
- `agreement`: the largest distance from float64, in units of bfloat16's last place, over one matrix.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.machine import describe_machine
from bench.mixing import weights_of
from cocktail_serve.merging.linear import merge_param

HIDDEN, INTERMEDIATE = 4096, 11008
Parameters = Sequence[Sequence[Tensor]]
"""For each parameter the tensors of all models."""

LAYER: tuple[tuple[int, int], ...] = (*((HIDDEN, HIDDEN),) * 4, *((INTERMEDIATE, HIDDEN),) * 3)
"""Shapes of one layer of Llama 7B: q, k, v, o, gate, up, and down, which has as many elements the other way round."""


def seconds_of(work: Callable[[], object], runs: int) -> float:
    """Median time on the device, the first two runs left out: they compile and allocate."""
    found = []
    for _ in range(runs + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(float(begin.elapsed_time(end)) / 1e3)
    return statistics.median(found[2:])


def copy_bytes_per_s(runs: int) -> float:
    """Of one large tensor on the device, bytes read and bytes written."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), runs)


def merge_all(inputs: Parameters, weights: Sequence[float], outs: Sequence[Tensor]) -> None:
    for params, out in zip(inputs, outs, strict=True):
        merge_param(params, weights, out_dtype=out.dtype, out=out)


def sum_with_torch(inputs: Parameters, weights: Sequence[float], outs: Sequence[Tensor]) -> None:
    """The least that torch's own operators need: a float64 sum, one term after the other."""
    for params, out in zip(inputs, outs, strict=True):
        total = params[0].double() * weights[0]
        for param, weight in zip(params[1:], weights[1:], strict=True):
            total += param.double() * weight
        out.copy_(total)


def on_device(models: Parameters, weights: Sequence[float], outs: Sequence[Tensor], runs: int) -> dict[str, float]:
    num_bytes = sum(param.nbytes for params in models for param in params) + sum(out.nbytes for out in outs)
    copy = copy_bytes_per_s(runs)
    kernel = num_bytes / seconds_of(lambda: merge_all(models, weights, outs), runs)
    plain = num_bytes / seconds_of(lambda: sum_with_torch(models, weights, outs), runs)
    return {
        "copy_gb_per_s": copy / 1e9,
        "kernel_gb_per_s": kernel / 1e9,
        "kernel_over_copy": kernel / copy,
        "torch_gb_per_s": plain / 1e9,
        "agreement_max_ulp": _agreement(models[0], weights),
    }


def from_host(models: Parameters, weights: Sequence[float], outs: Sequence[Tensor], runs: int) -> dict[str, float]:
    """Inputs pinned on the host: what of their copies' time the sums hide."""
    pinned = [[param.cpu().pin_memory() for param in params] for params in models]
    staged = [[torch.empty_like(param, device="cuda") for param in params] for params in pinned]
    num_bytes = sum(param.nbytes for params in pinned for param in params)

    def copy() -> None:
        for params, buffers in zip(pinned, staged, strict=True):
            for param, buffer in zip(params, buffers, strict=True):
                buffer.copy_(param, non_blocking=True)

    bare = num_bytes / seconds_of(copy, runs)
    merged = num_bytes / seconds_of(lambda: merge_all(pinned, weights, outs), runs)
    return {
        "host_copy_gb_per_s": bare / 1e9,
        "from_host_gb_per_s": merged / 1e9,
        "from_host_over_host_copy": merged / bare,
    }


def measure(num_models: int, num_layers: int, runs: int) -> dict[str, float]:
    weights = weights_of(num_models)
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = LAYER * num_layers
    models = [
        [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(num_models)]
        for shape in shapes
    ]
    outs = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    found = on_device(models, weights, outs, runs)
    # one layer: pinned memory is dear
    return found | from_host(models[: len(LAYER)], weights, outs[: len(LAYER)], runs)


def _agreement(params: Sequence[Tensor], weights: Sequence[float]) -> float:
    merged = merge_param(params, weights, out_dtype=torch.bfloat16).double()
    exact = torch.zeros_like(merged)
    for param, weight in zip(params, weights, strict=True):
        exact += param.double() * weight
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.ones_like(exact), exponent.clamp_min(-125) - 8)
    return float(((merged - exact).abs() / unit).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4, help="Each takes 0.4 GB per model, and once more.")
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use")
    found = measure(arguments.models, arguments.layers, arguments.runs)
    device = torch.cuda.get_device_name()
    print(json.dumps({"machine": describe_machine() | {"gpu": device}, **found}, indent=2))


if __name__ == "__main__":
    main()
