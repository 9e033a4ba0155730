"""An engine whose recipes share a batch: nobody waits for another recipe, and tenants share the slots alone.

1. A request is admitted at once while the engine has a slot for its tenant (`slots`), whatever its recipe. Half of the
   slots are anybody's; beyond them each tenant has its share. While others ask for less, a tenant has no more than
   `max_beside`: each row of a step slows all the others.
2. A slot that gets free goes to the tenant that was served least lately, of those in line that may have one more; of
   its requests to the first.
3. Background leases (scoring) take no slot and are charged to nobody. They are bounded; and while requests are in line
   only one is let in, so that neither waits for the end of the other.

What the operator drains (`hold`) comes before all of this. A pin has no meaning here. All state is changed on the event
loop between two awaits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

from cocktail_serve.engines.fairness import ServedTokensByTenant
from cocktail_serve.engines.line_place import LinePlace
from cocktail_serve.engines.load import EngineLoad
from cocktail_serve.engines.scheduler_snapshot import SchedulerSnapshot, WaitReason
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.engines.turns.base import Mix, loop_time
from cocktail_serve.engines.turns.hold import OperatorHold, operator_drains_error
from cocktail_serve.engines.turns.in_flight import InFlight, engine_lost_error
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.turns.slots import Slots
from cocktail_serve.engines.turns.wait_queue import Waiter, WaitQueues, not_ready_error
from cocktail_serve.errors import (
    CocktailError,
    InvalidRequestError,
    QueueTimeoutError,
)
from cocktail_serve.recipe import Recipe

SHARE_GAP_S = 2.0
"""How long the slots of a tenant without requests in flight are kept for it: one that asks again and again is between
two requests only for a moment."""

BACKGROUND_PART = 2
"""One background lease for so many slots."""

RETRY_S = 2.0
"""What a client is told to wait that waited for a slot in vain."""


class SharedTurns:
    """`Turns` on an engine that answers by any number of recipes at a time.

    Args:
        max_in_flight: requests in the engine at once, background work left out.
        max_beside: of these, of a tenant beside others that ask for less; see `Slots`. None: no bound but its share.
        max_background: background leases at once, while no request is in line; None: by `BACKGROUND_PART`.
        served_tokens: what tenants were served: shared by engines among which they are to be treated alike.
        stats: waits and what was sent away are counted here.
    """

    is_mixing = False

    def __init__(
        self,
        *,
        max_in_flight: int,
        max_beside: int | None = None,
        max_background: int | None = None,
        served_tokens: ServedTokensByTenant | None = None,
        stats: EngineStats | None = None,
    ) -> None:
        self._max_background = max_background or max(1, max_in_flight // BACKGROUND_PART)
        self.stats = stats or EngineStats()
        self._slots = Slots(
            served_tokens or ServedTokensByTenant(),
            max_in_flight=max_in_flight,
            gap_s=SHARE_GAP_S,
            num_unshared=max_in_flight // 2,
            max_beside=max_beside,
        )
        self._hold = OperatorHold()
        self._queues = WaitQueues()
        self._is_up = False
        self._in_flight = InFlight(self._slots)
        self._look_again: asyncio.TimerHandle | None = None

    @property
    def is_draining(self) -> bool:
        """Whether background work should give its leases back: requests are in line, and more than one has none."""
        return bool(self._queues.requests) and self._in_flight.num_background > 1

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_waiting(self) -> int:
        return len(self._queues.requests)

    @property
    def num_asked(self) -> int:
        return len(self._queues.requests) + self._slots.num_taken

    async def acquire(
        self,
        recipe: Recipe,
        *,
        tenant: str = "",
        num_tokens: int = 0,
        background: bool = False,
        timeout_s: float | None = None,
        place: LinePlace | None = None,
    ) -> Lease:
        now = loop_time()
        if background:
            if self._has_room_for_background and not self._queues.background:
                return self._in_flight.admit(self, tenant=None)
        else:
            self._hold.check_admits(recipe.digest)
            if self._is_open and not self._queues.requests and self._slots.has_one_for(tenant, now):
                self.stats.wait.observe(0.0 if place is None else now - place.asked_at)
                return self._in_flight.admit(self, tenant=tenant, num_tokens=num_tokens)
        try:
            with self._queues.joined(
                recipe,
                tenant=tenant,
                num_tokens=num_tokens,
                background=background,
                now=now,
                timeout_s=timeout_s,
                expire=self._expire,
                place=place,
            ) as waiter:
                self._admit_waiting()
                return await waiter.lease()
        finally:
            self._admit_waiting()  # who has left the line may be what kept background work out

    async def run(self, resident: str, mix: Mix) -> NoReturn:
        if self._is_up:
            raise RuntimeError("these turns are given already")
        self._is_up = True
        try:
            self._admit_waiting()
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")
        finally:
            self._is_up = False
            if self._look_again is not None:
                self._look_again.cancel()
                self._look_again = None
            self._in_flight.end_all(engine_lost_error)

    def fail_waiting(self, error: Callable[[], CocktailError]) -> None:
        self._queues.fail_all(error)

    def pin(self, recipe: Recipe | None) -> None:
        if recipe is not None:
            raise InvalidRequestError(
                "the engine's recipes share a batch: there are no turns to pin one in", param="pin"
            )

    def drain(self, is_drained: bool) -> None:
        """Admits nobody from now on, and sends those in line away, background work excepted; or admits again."""
        self._hold.is_drained = is_drained
        if is_drained:
            self._queues.requests.fail_all(operator_drains_error)
        self._admit_waiting()

    def snapshot(self) -> SchedulerSnapshot:
        return SchedulerSnapshot(
            phase=None,
            num_in_flight=len(self._in_flight),
            is_drained=self._hold.is_drained,
            queues=self._queues.snapshot(loop_time(), reason=lambda _: self._why_wait),
        )

    def end_in_flight(self, error: Callable[[], CocktailError]) -> None:
        self._in_flight.end_all(error)

    def load(self) -> EngineLoad:
        return EngineLoad(
            is_up=self._is_up,
            num_slots=self._slots.max_in_flight,
            num_in_flight=self._slots.num_taken,
            waiting=self._queues.requests.num_by_recipe(),
            num_background=self._in_flight.num_background,
            background=self._queues.background.num_by_recipe(),
            is_drained=self._hold.is_drained,
        )

    def give_back(self, lease: Lease) -> None:
        """Its request has ended: the slot goes to the next in line. Called by the lease, once."""
        if self._in_flight.give_back(lease):
            self._admit_waiting()

    def charge(self, tenant: str, num_tokens: int) -> None:
        """What a tenant was served, more or less than was thought when it was let in. Called by the lease."""
        self._slots.charge(tenant, num_tokens, loop_time())

    @property
    def _is_open(self) -> bool:
        return self._is_up and not self._hold.is_drained

    @property
    def _has_room_for_background(self) -> bool:
        most = 1 if self._queues.requests else self._max_background
        return self._is_open and self._in_flight.num_background < most

    @property
    def _why_wait(self) -> WaitReason:
        if self._hold.is_drained:
            return "drained"
        return "no_slot" if self._is_up else "engine_down"

    def _admit_waiting(self) -> None:
        """Admits those in line as far as there is room: requests by their tenants' shares, then background work."""
        if not self._is_open:
            return
        now = loop_time()
        requests, background = self._queues.requests, self._queues.background
        while (waiter := self._slots.first_in(requests.firsts_of_tenants(), now)) is not None:
            requests.discard(waiter)
            if not waiter.is_answered:
                self.stats.wait.observe(now - waiter.made_at)
                lease = self._in_flight.admit(self, tenant=waiter.tenant, num_tokens=waiter.num_tokens)
                waiter.granted.set_result(lease)
        while self._has_room_for_background and (first := next(iter(background.firsts_of_tenants()), None)) is not None:
            background.discard(first)
            if not first.is_answered:
                first.granted.set_result(self._in_flight.admit(self, tenant=None))
        if requests and self._look_again is None:
            # a tenant's share is given to the others some time after its last request: nobody comes or goes then
            self._look_again = asyncio.get_running_loop().call_later(SHARE_GAP_S, self._admit_again)

    def _admit_again(self) -> None:
        self._look_again = None
        self._admit_waiting()

    def _expire(self, waiter: Waiter, timeout_s: float) -> None:
        self.stats.num_queue_timeouts += 1
        error: CocktailError
        if self._is_up:
            error = QueueTimeoutError(
                f"no slot of the engine was free within queue_timeout_s={timeout_s:g} s: too many requests share it "
                "now; retry later, or raise engine.max_concurrency",
                retry_after_s=RETRY_S,
            )
        else:
            error = not_ready_error(timeout_s)
        self._queues.fail(waiter, error)
