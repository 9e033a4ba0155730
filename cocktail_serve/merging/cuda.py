"""The linear kernel on a GPU, in Triton: the arithmetic of `linear.c`, one pass over all inputs. Not for CPU builds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of one program."""

STAGED_NUMEL = 1 << 24
"""Elements of each input that are copied from the host at a time; twice as many stay on the GPU."""

_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def is_mergeable(params: Sequence[Tensor], out: Tensor) -> bool:
    """Whether `merge` takes them: one dtype, dense, on the GPU of `out` or pinned on the host."""
    first = params[0]
    return all(
        param.dtype == first.dtype
        and param.is_contiguous()
        and (param.device == out.device if first.device == out.device else param.is_pinned())
        for param in params
    )


def merge(params: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """out = sum_i weights[i] * params[i], as `merge_param` defines it.

    Inputs on the GPU are read where they are. Inputs on the host pass through two buffers: a stream of its own copies
    the next part while the kernel sums the last one.

    Args:
        params: contiguous tensors `[*S]` of one dtype, all on the GPU of `out`, or all pinned on the host.
        out: contiguous `[*S]` on a GPU, which the current stream writes.
    """
    flat, target = [param.view(-1) for param in params], out.view(-1)
    with torch.cuda.device(out.device):
        factors = torch.tensor(weights, dtype=torch.float64).to(out.device)
        if params[0].device == out.device:
            launch(flat, factors, target)
        else:
            _merge_from_host(flat, factors, target)


def launch(params: Sequence[Tensor], factors: Tensor, out: Tensor) -> None:
    """Starts the kernel over one-dimensional tensors of one dtype; `factors` is float64 `[N]` beside them."""
    numel = out.numel()
    if numel:
        table = torch.tensor([param.data_ptr() for param in params], dtype=torch.int64).to(out.device)
        _merge_kernel[(triton.cdiv(numel, BLOCK),)](
            table,
            factors,
            out,
            numel,
            len(params),
            DTYPE=_DTYPES[params[0].dtype],
            HALF=out.dtype != torch.float32,
            BLOCK=BLOCK,
            enable_fp_fusion=False,  # a fused multiply-add rounds once where two roundings are promised
        )


def _merge_from_host(params: Sequence[Tensor], factors: Tensor, out: Tensor) -> None:
    size = min(STAGED_NUMEL, out.numel())
    copying = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    computing = torch.cuda.current_stream()
    copying.wait_stream(computing)
    buffers = [torch.empty((len(params), size), dtype=params[0].dtype, device=out.device) for _ in range(2)]
    free: list[torch.cuda.Event | None] = [None, None]
    for turn, begin in enumerate(range(0, out.numel(), size or 1)):
        end = min(begin + size, out.numel())
        buffer = buffers[turn % 2]
        with torch.cuda.stream(copying):
            if (summed := free[turn % 2]) is not None:
                copying.wait_event(summed)
            for row, param in zip(buffer, params, strict=True):
                row[: end - begin].copy_(param[begin:end], non_blocking=True)
            copied = copying.record_event()
        computing.wait_event(copied)
        launch([row[: end - begin] for row in buffer], factors, out[begin:end])
        free[turn % 2] = computing.record_event()
    for buffer in buffers:
        buffer.record_stream(copying)


@triton.jit  # type: ignore[untyped-decorator]
def _merge_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    table,
    factors,
    out,
    numel,
    num_models,
    DTYPE: tl.constexpr,  # noqa: N803  Triton's way to write what it compiles in
    HALF: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    total = tl.full((BLOCK,), -0.0, tl.float64)
    for model in range(num_models):
        param = tl.load(table + model).to(tl.pointer_type(DTYPE))
        values = tl.load(param + offsets, mask=inside, other=0.0).to(tl.float64)
        total = total + values * tl.load(factors + model)
    merged = total.to(tl.float32)
    if HALF:  # rounded to odd first, see `round_to_odd`
        rest = total - merged.to(tl.float64)
        bits = merged.to(tl.int32, bitcast=True)
        step = tl.where((rest > 0) ^ (bits < 0), 1, -1)
        inexact = ((rest > 0) | (rest < 0)) & ((bits & 1) == 0)
        merged = (bits + tl.where(inexact, step, 0)).to(tl.float32, bitcast=True)
    if out.dtype.element_ty == tl.bfloat16:  # by hand, since Triton's interpreter truncates
        pattern = merged.to(tl.uint32, bitcast=True)
        rounded = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
        kept = tl.where(merged == merged, rounded, pattern >> 16)  # noqa: PLR0124  NaN alone differs from itself
        tl.store(out + offsets, kept.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(out + offsets, merged.to(out.dtype.element_ty), mask=inside)
