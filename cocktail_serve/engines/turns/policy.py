"""Whose turn is next where recipes take turns, and when a turn ends for its sake.

Between tenants it is decided by tokens served lately (see `fairness`), so it makes no difference how many requests,
streams or recipes a tenant spreads its load over:

* Next is the tenant served least lately, with the recipe its oldest request is for. A tenant that has gone without for
  `patience_s` is next whatever it was served, so nobody starves.
* A turn ends `slice_s` after the later of its start and the arrival of who is next; after its start alone if that
  tenant was served less lately than all whom the turn serves; at once when nothing is in flight.
* A tenant that is behind the one in line keeps the turn past its slice, and for a moment (`KEPT_SLICES`) after its
  answers have ended, since a client in a loop asks again at once: the flood of another would make each of its
  requests wait for two swaps. That ends when it has caught up, or when the tenant in line has gone without for
  too long.

Background work is nobody's and waits by two handicaps: each claim counts as having arrived later than it came, and
while traffic waits no two turns in a row are given for background's sake. The first lets traffic go first; because it
is a constant and not a class of its own, background work cannot starve: once it is the oldest in line, it is next.

Knows no clock and no event loop: `now` is any time that only goes forward, in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cocktail_serve.engines.turns.slots import Slots
from cocktail_serve.engines.turns.wait_queue import Claim

KEPT_SLICES = 0.1
"""How long a turn is kept, in slices, for a tenant whose answers have just ended and who is behind the one in line."""


@dataclass(frozen=True, slots=True)
class TurnPolicy:
    """The order of turns. Changes nothing.

    Attributes:
        slots: how tenants stand: what they were served, what they have in flight.
        slice_s: how long a turn lasts while others wait.
        patience_s: how long a tenant in line goes without before it is next.
    """

    slots: Slots
    slice_s: float
    patience_s: float

    def next(
        self, requests: Sequence[Claim], background: Sequence[Claim], now: float, *, is_after_background: bool
    ) -> Claim | None:
        """Who is next; None: nobody waits.

        Args:
            requests: the first of each tenant for each recipe that waits for a turn.
            background: likewise of background work.
            is_after_background: whether the turn that is on was given for background's sake.
        """
        oldest = min(background, key=_arrived, default=None)
        if not requests:
            return oldest
        if oldest is not None and not is_after_background and oldest.ranked_from < min(map(_arrived, requests)):
            return oldest
        return min(requests, key=lambda claim: self.rank(claim, now))

    def rank(self, request: Claim, now: float) -> tuple[float, float, float]:
        """Lower is sooner: tenants that starve, by how long; then those served least lately; then who came first."""
        since = self._without_since(request, now)
        if now - since >= self.patience_s:
            return (0, since, request.ranked_from)
        return (1, self.slots.served(request.tenant, now), request.ranked_from)

    def ends_at(self, claim: Claim, now: float, *, started: float, is_in_use: bool) -> float:
        """When the turn that is on ends for the sake of the next in line, as things stand now.

        Args:
            started: when the turn began.
            is_in_use: whether anything is in flight.
        """
        starts = max(started, claim.ranked_from)
        if claim.claimant != "tenant":
            return starts + self.slice_s if is_in_use else now
        served = self.slots.served(claim.tenant, now)
        kept_s = KEPT_SLICES * self.slice_s
        present = [
            (self.slots.served(tenant, now), presence) for tenant, presence in self.slots.sharing(now, kept_s).items()
        ]
        if all(other > served for other, _ in present):
            starts = started
        ends_at = starts + self.slice_s if is_in_use else now
        starves_at = self._without_since(claim, now) + self.patience_s
        behind = [presence for other, presence in present if other < served]
        if not behind or now >= starves_at:
            return ends_at
        if any(presence.num_in_flight for presence in behind):
            # what each was served changes while they are served: look again before long
            return max(ends_at, min(starves_at, now + self.slice_s))
        return max(ends_at, min(starves_at, max(presence.left_at for presence in behind) + kept_s))

    def _without_since(self, request: Claim, now: float) -> float:
        """Since when the tenant of a request that waits has not been served here."""
        presence = self.slots.of(request.tenant)
        return now if presence.num_in_flight else max(request.ranked_from, presence.left_at)


def _arrived(claim: Claim) -> float:
    return claim.ranked_from
