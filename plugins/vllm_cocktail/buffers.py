"""Memory for mixed tensors that is used again: new pages cost more time than the sums that fill them. Knows no vLLM."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SMALLEST = 1 << 18
"""Bytes from which on a tensor gets a buffer; the C library keeps what is smaller itself."""


class Buffers:
    """Tensors whose memory returns here when the last view of them has gone, whoever held it.

    Args:
        max_bytes: bound of all buffers, in use and idle. One more tensor in use than that is still made; what is idle
            goes first, and what comes back beyond it is given to the system.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._idle: dict[int, list[mmap.mmap]] = {}
        # a finalizer may run in any thread at any time, in the middle of `empty` too: all it does is append
        self._returned: deque[mmap.mmap] = deque()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of any contents, on the CPU. To be called by one thread at a time."""
        import torch

        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(tuple(shape), dtype=dtype)
        buffer = self._take(size)
        content = memoryview(buffer)
        # the tensor's storage holds this very object for as long as anything lies in it
        weakref.finalize(content, self._returned.append, buffer).atexit = False
        return torch.frombuffer(content, dtype=dtype).view(tuple(shape))

    def _take(self, size: int) -> mmap.mmap:
        while self._returned:
            buffer = self._returned.popleft()
            self._idle.setdefault(len(buffer), []).append(buffer)
        if not self._idle.get(size):
            self._make_room(size)
            self._idle.setdefault(size, []).append(_new_buffer(size))
            self.num_bytes += size
        return self._idle[size].pop()

    def _make_room(self, size: int) -> None:
        for buffers in self._idle.values():
            while buffers and self.num_bytes + size > self.max_bytes:
                self.num_bytes -= len(buffers.pop())


def _new_buffer(size: int) -> mmap.mmap:
    # private: the kernel joins neighbours to one mapping, of which a process may have some 65,000
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
