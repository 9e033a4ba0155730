"""The linear mixture of LM-Cocktail: a weighted sum of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cocktail_serve.errors import IncompatibleModelsError, InvalidMixError
from cocktail_serve.merging.native import Kernel, Operand, load_kernel
from cocktail_serve.merging.threads import in_parallel

CHUNK_NUMEL = 1 << 20
"""Elements that a thread takes at a time: about a millisecond for ten models, so threads end together."""

TORCH_CHUNK_NUMEL = 1 << 17
"""Elements summed at a time by torch: the float64 sum and one converted input, 1 MB each, stay in cache."""

_OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def merge_param(
    params: Sequence[Tensor], merging_weights: Sequence[float], *, out_dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Weighted sum of one parameter over N models, sum_i w_i * theta_i (LM-Cocktail, arXiv 2311.13534).

    Every product and every sum is rounded to float64 on its own (no fused multiply-add), in the order given, and the
    sum once to `out_dtype`, to nearest even. So the bits depend on neither threads, chunks nor device, and the result
    lies within 0.5 ulp of the exact sum, plus N + 1 roundings of relative size 2**-53 of sum_i |w_i * theta_i|: below
    0.51 ulp unless terms cancel to a 10**5th of their size (float32) or a 10**9th (half precision).

    On a CPU the compiled kernel reads all inputs in one pass, on a GPU Triton's. Where there is no C compiler, no
    Triton, or dtypes vary on a GPU, torch does the same arithmetic.

    Args:
        params: N floating tensors of one shape `[*S]` on one device; dtypes may differ. Left unchanged.
        merging_weights: N finite floats, used as float64; the rule for their sum is the method's, checked before.
        out_dtype: dtype of the result: float32, float16 or bfloat16.
        out: contiguous tensor `[*S]` of `out_dtype` to write to, which is then what is returned; on the same device,
            or on a GPU with the inputs on the host (pinned, they are copied while the last part is summed).

    Returns:
        Contiguous tensor `[*S]` of `out_dtype`, sharing no memory with the inputs. Where the sum is NaN, so is the
        element, with any payload.

    Raises:
        InvalidMixError: no parameters, another number of weights, a weight that is not finite, or another dtype.
        IncompatibleModelsError: shapes differ, or a tensor is not floating.
    """
    check_params(params, merging_weights, out_dtype)
    if out is None:
        out = torch.empty(params[0].shape, dtype=out_dtype, device=params[0].device)
    elif out.shape != params[0].shape or out.dtype != out_dtype or not out.is_contiguous():
        raise InvalidMixError(f"out must be a contiguous {out_dtype} tensor of shape {list(params[0].shape)}")
    weights = [float(weight) for weight in merging_weights]
    if out.device.type == "cpu" and isinstance(kernel := load_kernel(), Kernel):
        _merge_natively(kernel, params, weights, out)
    elif not (out.device.type == "cuda" and _merge_with_triton(params, weights, out)):
        _merge_with_torch([param.to(out.device, non_blocking=True) for param in params], weights, out)
    return out


def _merge_natively(kernel: Kernel, params: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    dense = [param.contiguous() for param in params]  # kept alive while their addresses are used
    operands = [operand_of(param) for param in dense]
    target = operand_of(out)

    def merge(begin: int, end: int) -> None:
        kernel.merge([operand.at(begin) for operand in operands], weights, target.at(begin), end - begin)

    in_parallel(merge, out.numel(), CHUNK_NUMEL)


def _merge_with_triton(params: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> bool:
    try:
        from cocktail_serve.merging import cuda
    except ImportError:  # torch was installed without it
        return False
    if not cuda.is_mergeable(params, out):
        return False
    cuda.merge(params, weights, out)
    return True


def operand_of(tensor: Tensor) -> Operand:
    """A contiguous CPU tensor as the kernel takes it."""
    return Operand(tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."))


def _merge_with_torch(params: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    flat = [param.reshape(-1) for param in params]
    target = out.view(-1)
    numel = target.numel()
    chunk = min(numel, TORCH_CHUNK_NUMEL) if out.device.type == "cpu" else numel
    if chunk == 0:
        return
    total = torch.empty(chunk, dtype=torch.float64, device=out.device)
    term = torch.empty_like(total)
    for begin in range(0, numel, chunk):
        size = min(chunk, numel - begin)
        total_view, term_view = total[:size], term[:size]
        total_view.copy_(flat[0][begin : begin + size]).mul_(weights[0])
        for param, weight in zip(flat[1:], weights[1:], strict=True):
            total_view.add_(term_view.copy_(param[begin : begin + size]).mul_(weight))
        target[begin : begin + size].copy_(total_view if out.dtype == torch.float32 else round_to_odd(total_view))


def round_to_odd(total: Tensor) -> Tensor:
    """float64 to float32, rounded to odd: what is then rounded to half precision is as if rounded once.

    torch goes from float64 to half precision by way of float32, and rounds twice. Rounding the first time to the
    neighbour whose last bit is 1, unless the value is exact, keeps on which side of a tie it lies (Boldo and
    Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).

    Args:
        total: float64 `[*S]`.

    Returns:
        float32 `[*S]`; what is infinite or NaN stays so.
    """
    nearest = total.float()
    rest = total - nearest.double()
    bits = nearest.view(torch.int32)
    away = (rest > 0) ^ (bits < 0)  # from zero
    step = torch.where(away, 1, -1) * ((rest != 0) & ~rest.isnan() & (bits & 1 == 0))
    return (bits + step.to(torch.int32)).view(torch.float32)


def check_params(params: Sequence[Tensor], merging_weights: Sequence[float], out_dtype: torch.dtype) -> None:
    """Raises what `merge_param` says it raises, for any method."""
    if not params or len(params) != len(merging_weights):
        raise InvalidMixError(f"{len(params)} parameters need as many merging weights, got {len(merging_weights)}")
    for index, weight in enumerate(merging_weights):
        if not math.isfinite(weight):
            raise InvalidMixError(f"merging weight {index} is {weight}; all must be finite")
    if out_dtype not in _OUT_DTYPES:
        raise InvalidMixError(f"out_dtype must be the floating dtype float32, float16 or bfloat16, got {out_dtype}")
    for index, param in enumerate(params):
        if param.shape != params[0].shape:
            raise IncompatibleModelsError(
                f"parameter {index} has shape {list(param.shape)}, parameter 0 has {list(params[0].shape)}; "
                "only models of one architecture can be mixed"
            )
        if not param.is_floating_point():
            raise IncompatibleModelsError(f"parameter {index} is {param.dtype}; only floating tensors are mixed")
