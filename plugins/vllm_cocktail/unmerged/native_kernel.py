"""The kernel `native_kernel.c`, built for this machine at its first use, on the threads that torch computes with."""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cocktail_serve.merging.native import DTYPE_CODES, load_library
from vllm_cocktail.unmerged.kernel import Kernel, Layer, LayerShape, Step

_SOURCE = Path(__file__).with_name("native_kernel.c")

_FLAGS = ("-ffp-contract=fast",)
"""Products and sums become one instruction."""

_OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_num_threads", "omp_get_thread_num", "omp_get_max_threads")
"""In the order of `cocktail_set_runtime`. GNU's runtime has them, and LLVM's and Intel's for its sake."""

_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "cocktail_tile": (None, (ctypes.POINTER(ctypes.c_size_t),) * 4),
    "cocktail_set_runtime": (None, (ctypes.c_void_p,) * 5),
    "cocktail_new_layer": (
        ctypes.c_void_p,
        (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t)),
    ),
    "cocktail_free_layer": (None, (ctypes.c_void_p,)),
    "cocktail_set_factors": (
        ctypes.c_int,
        (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_size_t,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_float,
        ),
    ),
    "cocktail_new_step": (ctypes.c_void_p, ()),
    "cocktail_free_step": (None, (ctypes.c_void_p,)),
    "cocktail_set_step": (
        ctypes.c_int64,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p),
    ),
    "cocktail_add": (
        ctypes.c_int,
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t),
    ),
}


class NativeLayer(Layer):
    """Factors in the order in which the kernel reads them, filled up with zeros to whole tiles."""

    def __init__(self, library: ctypes.CDLL, shape: LayerShape, handle: int) -> None:
        super().__init__(shape, handle)
        self._library = library
        sizes = (ctypes.c_size_t * len(shape.output_sizes))(*shape.output_sizes)
        dtype = DTYPE_CODES[str(shape.dtype).removeprefix("torch.")]
        self.address = library.cocktail_new_layer(dtype, shape.is_embedding, shape.in_features, len(sizes), sizes)
        if not self.address:
            raise MemoryError
        weakref.finalize(self, library.cocktail_free_layer, self.address)
        tile = [ctypes.c_size_t() for _ in range(4)]
        library.cocktail_tile(*map(ctypes.byref, tile))
        self._ranks, self._inputs, self._columns, self._lanes = (size.value for size in tile)
        self._factors: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def _set_factors(self, expert: int, index: int, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        rank = len(lora_a)
        if self.shape.is_embedding:
            a = self._tiled(lora_a.T, 1, rank)
        else:
            a = self._tiled(lora_a, self._ranks, self._inputs)
        b = self._tiled(lora_b.T, rank, self._columns)
        if self.shape.dtype is torch.bfloat16:  # a half of a pair is then every other element
            b = b.view(-1, 2, self._lanes).transpose(1, 2).contiguous()
        if self._library.cocktail_set_factors(self.address, expert, index, a.data_ptr(), b.data_ptr(), rank, scaling):
            raise MemoryError
        self._factors[expert, index] = a, b

    def _tiled(self, matrix: Tensor, rows: int, columns: int) -> Tensor:
        """Tiles `[rows, columns]` of a matrix one after the other."""
        if not matrix.numel():
            return torch.empty(0)
        down, across = (-(-size // tile) for size, tile in zip(matrix.shape, (rows, columns), strict=True))
        padded = torch.zeros(down * rows, across * columns, dtype=self.shape.dtype)
        padded[: len(matrix), : matrix.shape[1]] = matrix
        return padded.view(down, rows, across, columns).transpose(1, 2).contiguous()


class NativeStep(Step):
    def __init__(self, library: ctypes.CDLL, handle: int) -> None:
        super().__init__(handle)
        self._library = library
        self.address = library.cocktail_new_step()
        if not self.address:
            raise MemoryError
        weakref.finalize(self, library.cocktail_free_step, self.address)

    def _set(self, coefficients: NDArray[np.float32], lengths: NDArray[np.int32]) -> int:
        addresses = coefficients.ctypes.data, *coefficients.shape, lengths.ctypes.data
        num_rows: int = self._library.cocktail_set_step(self.address, *addresses)
        if num_rows == -1:
            raise MemoryError
        return num_rows


class NativeKernel(Kernel):
    """The compiled kernel. Small calls run on one thread, the others on those of torch's OpenMP runtime."""

    name = "compiled"

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self._library = library
        self._native_add = library.cocktail_add

    def new_step(self) -> NativeStep:
        step = NativeStep(self._library, len(self.steps))
        self.steps.append(step)
        return step

    def new_layer(self, shape: LayerShape) -> NativeLayer:
        layer = NativeLayer(self._library, shape, len(self.layers))
        self.layers.append(layer)
        return layer

    def _add(self, step: NativeStep, layer: NativeLayer, x: Tensor, y: Tensor) -> None:
        stride = x.element_size() if layer.shape.is_embedding else x.stride()[0]
        if self._native_add(step.address, layer.address, x.data_ptr(), stride, y.data_ptr(), y.stride()[0]):
            raise MemoryError


@cache
def load_native() -> ctypes.CDLL | str:
    """The compiled kernel's library, built where it is not yet (in seconds), or why there is none."""
    library = load_library(_SOURCE, _FLAGS)
    if isinstance(library, str):
        return library
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if runtime := _openmp():
        library.cocktail_set_runtime(*runtime)
    return library


def _openmp() -> list[int] | None:
    """Addresses of the runtime that torch itself computes with: found in the order in which the loader bound torch to
    it, so that a preloaded one goes first. None where torch has another kind of threads: calls then run on one."""
    for path in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            library = ctypes.CDLL(path)
            return [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _OPENMP]
        except (OSError, AttributeError):
            continue
    return None
