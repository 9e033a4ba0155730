"""The leases on one engine that are held, and the slots that they take."""

from __future__ import annotations

from collections.abc import Callable

from cocktail_serve.engines.turns.base import loop_time
from cocktail_serve.engines.turns.lease import Lease, LeaseOwner
from cocktail_serve.engines.turns.slots import Slots
from cocktail_serve.errors import CocktailError, EngineError


class InFlight:
    """Leases of one owner, counted in the moment that they are given.

    Args:
        slots: what leases of tenants take; background leases take none.

    Attributes:
        num_background: background leases that are held.
    """

    def __init__(self, slots: Slots) -> None:
        self.num_background = 0
        self._slots = slots
        self._leases: set[Lease] = set()

    def __len__(self) -> int:
        return len(self._leases)

    def admit(self, owner: LeaseOwner, *, tenant: str | None, num_tokens: int = 0) -> Lease:
        """Gives a lease.

        Args:
            tenant: whose request it is for; None: background work, which is nobody's.
            num_tokens: what its answer is expected to take; charged.
        """
        lease = Lease(owner, tenant=tenant, num_tokens=num_tokens)
        self._leases.add(lease)
        if tenant is None:
            self.num_background += 1
        else:
            self._slots.take(tenant, num_tokens, loop_time())
        return lease

    def give_back(self, lease: Lease) -> bool:
        """A lease is no longer used; False: it was given back, or ended, before."""
        if lease not in self._leases:
            return False
        self._leases.discard(lease)
        self._leave(lease)
        return True

    def end_all(self, error: Callable[[], CocktailError]) -> None:
        """Ended leases no longer count: their connections are closed, and the engine's own count guards the mix."""
        leases, self._leases = self._leases, set()
        for lease in leases:
            self._leave(lease)
            lease.end(error())

    def _leave(self, lease: Lease) -> None:
        if lease.tenant is None:
            self.num_background -= 1
        else:
            self._slots.leave(lease.tenant, loop_time())


def engine_lost_error() -> EngineError:
    return EngineError("the engine failed while it held the request; it is being restarted")
