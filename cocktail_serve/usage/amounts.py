"""What use is counted under, and what is counted."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, slots=True)
class UsageAccount:
    """What use is counted under.

    Attributes:
        key_id: of the key that asked; empty where none was asked for.
        model: canonical model id, `name@digest8` for a cocktail.
    """

    day: date
    tenant: str
    key_id: str
    model: str
    pool: str


@dataclass(slots=True)
class UsageAmount:
    """How much was used.

    Attributes:
        requests: answers of which the engine said how many tokens they took, those that broke off too.
        tokens_in: tokens read, as the engine said.
        tokens_out: tokens generated, likewise.
        scoring_s: seconds that scoring held the engine.
        mixing_s: seconds of mixing for jobs.
    """

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    scoring_s: float = 0.0
    mixing_s: float = 0.0

    def add(self, other: UsageAmount) -> None:
        self.requests += other.requests
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.scoring_s += other.scoring_s
        self.mixing_s += other.mixing_s
