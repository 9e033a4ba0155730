"""Merged parameters kept in memory, so that the next mix of the same recipe is a copy."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class MergedParams:
    """Least recently used checkpoint-format parameters by recipe digest, within a byte budget.

    Args:
        max_bytes: bound of what is kept; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._params: OrderedDict[str, list[tuple[str, Tensor]]] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._params

    @property
    def digests(self) -> list[str]:
        """What is kept, least recently used first."""
        return list(self._params)

    def get(self, digest: str) -> list[tuple[str, Tensor]] | None:
        """The parameters of a recipe, which become the most recently used."""
        if digest not in self._params:
            return None
        self._params.move_to_end(digest)
        return self._params[digest]

    def make_room(self, num_bytes: int) -> bool:
        """Drops the least recently used until `num_bytes` more fit; False, and nothing dropped, if they never can."""
        if num_bytes > self.max_bytes:
            return False
        while self.num_bytes + num_bytes > self.max_bytes:
            self.forget(next(iter(self._params)))
        return True

    def put(self, digest: str, params: list[tuple[str, Tensor]]) -> None:
        """Keeps the parameters of a recipe if they fit at all."""
        self.forget(digest)
        if self.make_room(num_bytes_of(params)):
            self._params[digest] = params
            self.num_bytes += num_bytes_of(params)

    def forget(self, digest: str) -> None:
        """Frees the parameters of a recipe, if they are kept."""
        params = self._params.pop(digest, [])
        self.num_bytes -= num_bytes_of(params)


def num_bytes_of(params: list[tuple[str, Tensor]]) -> int:
    """Size of the tensors."""
    return sum(tensor.nbytes for _, tensor in params)
