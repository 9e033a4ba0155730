"""The product in torch: on CPUs without a C compiler, and on GPUs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding

from vllm_cocktail.unmerged.kernel import Kernel, Layer, LayerShape, Limits, Step


class TorchLayer(Layer):
    def __init__(self, shape: LayerShape, handle: int) -> None:
        super().__init__(shape, handle)
        self.factors: dict[int, dict[int, tuple[Tensor, Tensor, float]]] = {}
        """By expert and slice: A `[rank, in_features]`, B transposed `[rank, width]`, scaling."""

    def _set_factors(self, expert: int, index: int, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        a, b = (factor.to(self.shape.dtype, copy=True) for factor in (lora_a, lora_b.T))
        self.factors.setdefault(expert, {})[index] = a, b, scaling


class TorchStep(Step):
    def __init__(self, handle: int) -> None:
        super().__init__(handle)
        self.units: list[tuple[int, Tensor, Tensor]] = []
        """Of each expert in use: rows `[count]` int64, and their coefficients `[count, 1]` float32."""

    def _set(self, coefficients: NDArray[np.float32], lengths: NDArray[np.int32]) -> int:
        if (lengths < 0).any():
            return -2
        rows = torch.from_numpy(np.repeat(coefficients, lengths, axis=0))
        used = [(expert, rows[:, expert].nonzero()[:, 0]) for expert in range(rows.shape[1])]
        self.units = [(expert, index, rows[index, expert, None]) for expert, index in used if len(index)]
        return len(rows)


class TorchKernel(Kernel):
    """Two matrix products for each expert in use, in float32."""

    name = "torch"

    def new_step(self) -> TorchStep:
        step = TorchStep(len(self.steps))
        self.steps.append(step)
        return step

    def new_layer(self, shape: LayerShape) -> TorchLayer:
        layer = TorchLayer(shape, len(self.layers))
        self.layers.append(layer)
        return layer

    def _add(self, step: TorchStep, layer: TorchLayer, x: Tensor, y: Tensor) -> None:
        begin = 0
        for index, width in enumerate(layer.shape.output_sizes):
            self._add_slice(step, layer, index, x, y[:, begin : begin + width])
            begin += width

    def _add_slice(self, step: TorchStep, layer: TorchLayer, index: int, x: Tensor, y: Tensor) -> None:
        total = torch.zeros(y.shape)
        is_touched = torch.zeros(len(y), dtype=torch.bool)
        for expert, rows, coefficients in step.units:
            found = layer.factors.get(expert, {}).get(index)
            if found is None or not len(found[0]):
                continue
            a, b, scaling = found
            h = embedding(x[rows], a.T).float() if layer.shape.is_embedding else x[rows].float() @ a.float().T
            total[rows] += (h * (coefficients * scaling)) @ b.float()
            is_touched[rows] = True
        y[is_touched] = (y[is_touched].float() + total[is_touched]).to(y.dtype)


class StackedLayer(Layer):
    """Factors of all experts, one after the other, in buffers made once: what captured graphs read stays in place."""

    def __init__(self, shape: LayerShape, handle: int, device: torch.device, limits: Limits) -> None:
        super().__init__(shape, handle)
        self._limits = limits
        count, ranks = len(shape.output_sizes), limits.max_ranks
        size = (shape.in_features, count * ranks) if shape.is_embedding else (count * ranks, shape.in_features)
        self.a = torch.zeros(size, dtype=shape.dtype, device=device)
        self.b = [torch.zeros(ranks, width, dtype=shape.dtype, device=device) for width in shape.output_sizes]
        # column max_experts of the coefficients is always zero
        self.experts = torch.full((count * ranks,), limits.max_experts, device=device)
        self.scales = torch.zeros(count * ranks, device=device)
        self._places: dict[tuple[int, int], slice] = {}
        self._used = [0] * count

    def _set_factors(self, expert: int, index: int, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        rank = len(lora_a)
        place = self._places.get((expert, index))
        if place is None or place.stop - place.start != rank:
            begin, ranks = self._used[index], self._limits.max_ranks
            if begin + rank > ranks or expert >= self._limits.max_experts:
                raise ValueError(f"expert {expert} of rank {rank} is beyond {self._limits}, {begin} ranks are in use")
            if place is not None:
                self.scales[index * ranks + place.start : index * ranks + place.stop] = 0
            place = self._places[expert, index] = slice(begin, begin + rank)
            self._used[index] += rank
        columns = slice(*(index * self._limits.max_ranks + at for at in (place.start, place.stop)))
        (self.a.T if self.shape.is_embedding else self.a)[columns] = lora_a.to(self.a)
        self.b[index][place] = lora_b.T.to(self.a)
        self.scales[columns] = scaling
        self.experts[columns] = expert


class StackedStep(Step):
    def __init__(self, handle: int, device: torch.device, limits: Limits) -> None:
        super().__init__(handle)
        self._limits = limits
        self.coefficients = torch.zeros(limits.max_rows, limits.max_experts + 1, device=device)

    def _set(self, coefficients: NDArray[np.float32], lengths: NDArray[np.int32]) -> int:
        if (lengths < 0).any():
            return -2
        rows = torch.from_numpy(np.repeat(coefficients, lengths, axis=0))
        num_rows, num_experts = rows.shape
        if num_rows > self._limits.max_rows or num_experts > self._limits.max_experts:
            raise ValueError(f"a step of {num_rows} rows and {num_experts} experts is beyond {self._limits}")
        self.coefficients[:num_rows, :num_experts] = rows.to(self.coefficients.device)
        self.coefficients[:num_rows, num_experts:] = 0
        self.coefficients[num_rows : self.num_rows] = 0
        return num_rows


class StackedKernel(Kernel):
    """Two matrix products over the factors of all experts at once, in buffers that never move, of shapes that no step
    changes: may be captured into CUDA graphs.

    Beside float32 sums as the device's matrix products make them, h is rounded to the layer's dtype before and after
    it is scaled. Every row is written, and factors of all experts are read: none may be NaN or infinite.
    """

    name = "torch"

    def __init__(self, device: torch.device, limits: Limits) -> None:
        super().__init__()
        self.device = device
        self.limits = limits

    def new_step(self) -> StackedStep:
        step = StackedStep(len(self.steps), self.device, self.limits)
        self.steps.append(step)
        return step

    def new_layer(self, shape: LayerShape) -> StackedLayer:
        layer = StackedLayer(shape, len(self.layers), self.device, self.limits)
        self.layers.append(layer)
        return layer

    def _add(self, step: StackedStep, layer: StackedLayer, x: Tensor, y: Tensor) -> None:
        h = embedding(x, layer.a) if layer.shape.is_embedding else x @ layer.a.T
        scales = step.coefficients[: len(x)].index_select(1, layer.experts) * layer.scales
        scaled = (h * scales).to(h.dtype).chunk(len(layer.b), dim=1)
        slices = torch.split(y, list(layer.shape.output_sizes), dim=1)
        for part, slice_of_y, b in zip(scaled, slices, layer.b, strict=True):
            slice_of_y.addmm_(part, b)
