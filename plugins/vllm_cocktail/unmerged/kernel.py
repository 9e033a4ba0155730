"""The product of a step, `y += ((x A) * c) B`: LoRA factors of many experts, for each row coefficients of its own.

A kernel makes steps and layers and adds: `Step` says once a step which coefficients each row has, a `Layer` holds what
the experts change in one of the model's layers, and `Kernel.add` is called for every layer of every step.

For one row x [in_features] of request i, the slice s of y is
`round(y + sum_e c[i, e] * scaling[e, s] * B[e, s] (A[e, s] x))` over the experts e that have factors there. On a CPU
all sums and what lies between the two products are float32 (bfloat16 subnormals count as zero where the processor's
own products treat them so), and y is rounded once to its dtype, to nearest even. A row whose coefficients there are all
zero keeps its bits, and the factors of experts that no row uses are not read. CUDA's differences are told at
`StackedKernel`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of x, y and the factors, which are of one."""


_IDS = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A layer of the model: `[in_features]` to slices of the output, side by side, each with factors of its own."""

    in_features: int
    """Of an embedding, the number of ids."""
    output_sizes: tuple[int, ...]
    """Widths of the slices: q, k and v of a fused projection; one for a layer that is not fused."""
    dtype: torch.dtype
    is_embedding: bool = False
    """x are ids then, and A has a column for each."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"factors of {self.dtype}: must be one of {', '.join(map(str, DTYPES))}")
        if self.in_features < 1 or not self.output_sizes or min(self.output_sizes) < 1:
            raise ValueError(
                f"a layer of {self.in_features} inputs and {self.output_sizes} outputs: all must be positive"
            )

    @property
    def out_features(self) -> int:
        return sum(self.output_sizes)


class Layer(ABC):
    """What the experts change in one layer. The factors given are copied: whoever gives them may drop theirs."""

    def __init__(self, shape: LayerShape, handle: int) -> None:
        self.shape = shape
        self.handle = handle
        self.x_width, self.y_width = shape.in_features, shape.out_features

    def set_factors(self, expert: int, index: int, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        """An expert's factors for one slice, in place of what it had there. Not while a step is computed.

        Args:
            expert: its column of coefficients; may be beyond all that were set before.
            index: of the slice.
            lora_a: `[rank, in_features]`, as PEFT keeps it; any floating dtype, rounded to the layer's.
            lora_b: `[out_features of the slice, rank]`.
            scaling: of the product: PEFT's `lora_alpha / r`, for instance.

        Raises:
            ValueError: shapes that are not the layer's.
        """
        rank, in_features = lora_a.shape
        if in_features != self.shape.in_features or lora_b.shape != (self.shape.output_sizes[index], rank):
            raise ValueError(
                f"factors of shapes {tuple(lora_a.shape)} and {tuple(lora_b.shape)}: slice {index} of this layer takes "
                f"(rank, {self.shape.in_features}) and ({self.shape.output_sizes[index]}, rank)"
            )
        if expert < 0:
            raise ValueError(f"expert {expert}: must not be negative")
        self._set_factors(expert, index, lora_a.detach(), lora_b.detach(), scaling)

    @abstractmethod
    def _set_factors(self, expert: int, index: int, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None: ...


class Step(ABC):
    """Whose coefficients each row of x and y has. Empty at first: then nothing is added anywhere."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.num_rows = 0

    def set(self, coefficients: NDArray[np.float32], lengths: NDArray[np.int32] | Sequence[int]) -> None:
        """Lays out a step: the rows of one request after the other. Rows of x beyond them get nothing.

        Args:
            coefficients: `[num_requests, num_experts]`.
            lengths: `[num_requests]`, rows of each request; may be 0.

        Raises:
            ValueError: as many lengths as requests are needed, and none may be negative.
        """
        coefficients = np.ascontiguousarray(coefficients, dtype=np.float32)
        counts = np.ascontiguousarray(lengths, dtype=np.int32)
        is_fit = coefficients.ndim == 2 and counts.shape == coefficients.shape[:1]
        num_rows = self._set(coefficients, counts) if is_fit else -1
        if num_rows < 0:
            raise ValueError(f"coefficients {coefficients.shape} of requests with {counts.shape} lengths >= 0")
        self.num_rows = num_rows

    @abstractmethod
    def _set(self, coefficients: NDArray[np.float32], lengths: NDArray[np.int32]) -> int:
        """Returns the number of rows; a negative one if a length is negative, and nothing is changed then."""


class Kernel(ABC):
    """Makes steps and layers, which belong to it, and adds. For one thread at a time."""

    name: Literal["compiled", "torch"]

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        """Why it is not the compiled one; None for that one itself, and on a GPU."""
        self.steps: list[Any] = []
        self.layers: list[Any] = []

    @abstractmethod
    def new_step(self) -> Step: ...

    @abstractmethod
    def new_layer(self, shape: LayerShape) -> Layer: ...

    def add(self, step: Any, layer: Any, x: Tensor, y: Tensor) -> None:
        """Adds to the rows of y, in place, what the experts make of the rows of x.

        Args:
            step: one of this kernel's; has as many rows as x, or fewer.
            layer: one of this kernel's.
            x: `[num_rows, in_features]` in the layer's dtype, elements of a row one after the other; for an embedding
                contiguous ids `[num_rows]`, int32 or int64.
            y: `[num_rows, out_features]` in the layer's dtype, elements of a row one after the other.

        Raises:
            ValueError: tensors of other shapes, dtypes or strides, or fewer rows than the step has.
        """
        # in the cheapest words: a step makes more than a hundred calls
        shape: LayerShape = layer.shape
        y_size = y.shape
        num_rows = y_size[0]
        if shape.is_embedding:
            is_x = x.shape == (num_rows,) and x.dtype in _IDS and x.is_contiguous()
        else:
            is_x = x.dtype is shape.dtype and x.shape == (num_rows, layer.x_width) and x.stride()[1] == 1
        is_y = y.dtype is shape.dtype and y_size == (num_rows, layer.y_width) and y.stride()[1] == 1
        if not (is_x and is_y and num_rows >= step.num_rows):
            raise ValueError(
                f"x {tuple(x.shape)} {x.dtype} with strides {x.stride()} and y {tuple(y.shape)} {y.dtype} with strides "
                f"{y.stride()} are not rows of {shape}, as many as the step's {step.num_rows} or more"
            )
        self._add(step, layer, x, y)

    @abstractmethod
    def _add(self, step: Any, layer: Any, x: Tensor, y: Tensor) -> None: ...

    def add_by_handle(self, x: Tensor, y: Tensor, layer: int, step: int) -> None:
        """`add` as a custom operator can take it: tensors and numbers, the handles of a layer and a step."""
        self.add(self.steps[step], self.layers[layer], x, y)


@dataclass(frozen=True, slots=True)
class Limits:
    """What buffers are made for that stay where they are, so that CUDA graphs hold."""

    max_rows: int
    """Of a step."""
    max_experts: int
    max_ranks: int
    """Sum of the ranks of all experts in one slice of a layer."""


def load_kernel(device: torch.device, limits: Limits) -> Kernel:
    """A device's kernel: on a CPU the compiled one if it builds and passes `self_check`, else torch's, with why."""
    from vllm_cocktail.unmerged.native_kernel import NativeKernel, load_native
    from vllm_cocktail.unmerged.torch_kernel import StackedKernel, TorchKernel

    if device.type != "cpu":
        return StackedKernel(device, limits)
    library = load_native()
    if isinstance(library, str):
        return TorchKernel(library)
    if wrong := self_check(NativeKernel(library)):
        return TorchKernel(f"the compiled kernel does not compute what it should: {wrong}")
    return NativeKernel(library)


def self_check(kernel: Kernel) -> str | None:
    """What is wrong with a kernel's results on random shapes of every dtype, against float64; None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for in_features, output_sizes, is_embedding in (
            (48, (80,), False),
            (101, (64, 7, 130), False),
            (37, (96,), True),
        ):
            shape = LayerShape(in_features, output_sizes, dtype, is_embedding)
            layer, step, num_experts = kernel.new_layer(shape), kernel.new_step(), 4
            lengths = np.array([1, 70, 0, 3, 2], dtype=np.int32)
            coefficients = np.random.default_rng(0).standard_normal((5, num_experts), dtype=np.float32)
            coefficients[1, :2] = coefficients[3] = coefficients[:, 3] = 0
            factors: Factors = {}
            for expert, rank in enumerate((1, 8, 19, 5)):
                for index, width in enumerate(output_sizes):
                    lora_a = torch.randn(rank, in_features, generator=generator).to(dtype)
                    lora_b = torch.randn(width, rank, generator=generator).to(dtype)
                    factors[expert, index] = lora_a, lora_b, 0.5 / rank
                    layer.set_factors(expert, index, *factors[expert, index])
            step.set(coefficients, lengths)
            x = torch.randn(80, in_features, generator=generator).to(dtype)
            if is_embedding:
                x = torch.randint(in_features, (80,), generator=generator)
            before = torch.randn(80, shape.out_features, generator=generator).to(dtype)
            after = before.clone()
            kernel.add(step, layer, x, after)
            exact, bound = exact_sum(shape, factors, coefficients, lengths, x=x, y=before)
            if not torch.equal(after[71:74], before[71:74]) or not torch.equal(after[76:], before[76:]):
                return f"{shape} touches rows without coefficients"
            if not bool(((after.double() - exact).abs() <= bound).all()):
                return f"{shape} is off by {float((after.double() - exact).abs().max()):.3g}"
    return None


Factors = dict[tuple[int, int], tuple[Tensor, Tensor, float]]
"""By expert and slice: A `[rank, in_features]`, B `[width, rank]`, scaling."""


def exact_sum(
    shape: LayerShape,
    factors: Factors,
    coefficients: NDArray[np.float32],
    lengths: NDArray[np.int32],
    *,
    x: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """y after `add` in float64 `[num_rows, out_features]`, and how far each element may lie from it.

    The bound is half a unit in the last place of y's dtype and, for the float32 sums, 2^-20 of the sum of all terms'
    magnitudes.
    """
    rows = np.repeat(coefficients, lengths, axis=0).astype(np.float64)
    rows = np.concatenate([rows, np.zeros((len(x) - len(rows), rows.shape[1]))])
    exact, terms = y.double(), torch.zeros(y.shape, dtype=torch.float64)
    begins = np.cumsum((0, *shape.output_sizes))
    for (expert, index), (lora_a, lora_b, scaling) in factors.items():
        used = torch.from_numpy(np.flatnonzero(rows[:, expert]))
        scales = torch.from_numpy(rows[:, expert])[used, None] * scaling
        a, b = lora_a.to(shape.dtype).double().T, lora_b.to(shape.dtype).double().T
        chosen = x[used] if shape.is_embedding else x[used].double()
        columns = slice(begins[index], begins[index + 1])
        exact[used, columns] += (a[chosen] if shape.is_embedding else chosen @ a) * scales @ b
        magnitudes = a.abs()[chosen] if shape.is_embedding else chosen.abs() @ a.abs()
        terms[used, columns] += magnitudes * scales.abs() @ b.abs()
    unit = torch.finfo(shape.dtype)
    return exact, exact.abs().clamp_min(unit.tiny) * unit.eps / 2 * 1.01 + terms * 2.0**-20
