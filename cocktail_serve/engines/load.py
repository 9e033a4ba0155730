"""How full an engine is, told to whoever chooses between several of one pool: plain values, of one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One engine at one moment. Nobody is asked for it: it is what its owner knows.

    Attributes:
        is_up: whether it lets requests in now.
        is_failed: whether nobody should wait for it to come up.
        is_drained: whether the operator lets nobody in.
        pinned: digest of the recipe that the operator keeps in it.
        resident: digest of the recipe that is in it or just being mixed into it; None: there is none, or recipes share
            a batch.
        num_in_flight: requests in it, background work left out.
        num_slots: requests that it takes at once.
        waiting: requests in line, by the digest of their recipe.
        num_background: background work in it.
        background: background work in line, likewise by recipe.
        turn_left_s: how long the resident recipe keeps its turn once others wait.
        swap_s: seconds that a swap took so far, on average; None: there was none.
    """

    is_up: bool
    num_slots: int
    num_in_flight: int = 0
    waiting: Mapping[str, int] = field(default_factory=dict)
    num_background: int = 0
    background: Mapping[str, int] = field(default_factory=dict)
    is_failed: bool = False
    is_drained: bool = False
    pinned: str | None = None
    resident: str | None = None
    turn_left_s: float = 0.0
    swap_s: float | None = None

    @property
    def num_waiting(self) -> int:
        """Requests in line."""
        return sum(self.waiting.values())

    @property
    def num_asked(self) -> int:
        """Requests in line or in it."""
        return self.num_in_flight + self.num_waiting

    def keeps_out(self, digest: str) -> bool:
        """Whether the operator has requests for a recipe sent away."""
        return self.is_drained or (self.pinned is not None and self.pinned != digest)
