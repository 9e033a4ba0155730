"""What an engine does now and who waits for it: for the operator, never a prompt or a tenant's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["closed", "open", "draining", "mixing"]
"""Of a turn. closed: the engine is down; draining: the turn is over, and what is in flight finishes."""

WaitReason = Literal["engine_down", "drained", "pinned", "mixing", "turn_ends", "other_turn", "no_slot"]
"""Why a recipe's requests wait: the engine starts or restarts; the operator drains it, or keeps another recipe in it; a
mix runs; the turn of another recipe is ending; it is another's turn; it is their turn, and all slots are taken."""


@dataclass(frozen=True, slots=True)
class Queue:
    """Those who wait for one recipe.

    Attributes:
        num_waiting: requests.
        num_background: scoring and mixing ahead.
        oldest_s: how long the first of them has waited.
    """

    recipe_digest: str
    num_waiting: int
    num_background: int
    oldest_s: float
    reason: WaitReason


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """One engine at one moment.

    Attributes:
        phase, resident, turn_s: of the turn, where recipes take turns: its recipe's digest and its age.
        pinned: digest of the recipe that the operator keeps resident.
        is_drained: whether the operator lets nobody in.
        queues: the longest waiting first.
    """

    phase: Phase | None
    num_in_flight: int
    resident: str | None = None
    turn_s: float | None = None
    pinned: str | None = None
    is_drained: bool = False
    queues: tuple[Queue, ...] = ()
