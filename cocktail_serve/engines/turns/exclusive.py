"""The turns of one engine: which recipe its parameters are now, and who may use them.

An engine holds one full-weight recipe at a time. Whoever wants to use it acquires a lease for a recipe and holds it
until its answer is finished. The rules, in the order they bite:

1. A request for the resident recipe is admitted at once while its turn is open and the engine has a slot for its
   tenant (`slots`). Those without a slot wait.
2. When somebody waits for another recipe, the turn ends once the `policy` says so.
3. Then nobody is admitted. What is in flight may finish for `drain_s`; what is left is ended with `DrainedError`. If
   all who waited give up meanwhile, the turn is opened again.
4. The recipe of whoever is next, as the `policy` says, is mixed, and those who wait for it are admitted together.

Background leases (scoring, mixing ahead) take no slot and are charged to nobody. What the operator pins or drains
(`hold`) comes before all of this; background work waits meanwhile.

All state is changed on the event loop between two awaits, and a lease is counted the moment it is granted, not when
the task that waits for it wakes up. So no lease is ever held while another recipe is resident or being mixed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import NoReturn

from cocktail_serve.engines.fairness import ServedTokensByTenant
from cocktail_serve.engines.line_place import LinePlace
from cocktail_serve.engines.load import EngineLoad
from cocktail_serve.engines.scheduler_snapshot import Phase, SchedulerSnapshot, WaitReason
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.engines.turns.base import Mix, loop_time
from cocktail_serve.engines.turns.hold import OperatorHold, operator_drains_error, pinned_error
from cocktail_serve.engines.turns.in_flight import InFlight, engine_lost_error
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.turns.mixing import Mixing
from cocktail_serve.engines.turns.policy import TurnPolicy
from cocktail_serve.engines.turns.slots import Slots
from cocktail_serve.engines.turns.wait_queue import Claim, Waiter, WaitQueues, not_ready_error
from cocktail_serve.errors import (
    CocktailError,
    DrainedError,
    QueueTimeoutError,
)
from cocktail_serve.recipe import Recipe

PATIENCE_SLICES = 10.0
"""How long a tenant in line goes without before it is next, in slices, where nothing else is said."""


class ExclusiveTurns:
    """`Turns` on an engine that holds one recipe at a time.

    Args:
        slice_s: how long the resident recipe keeps its turn while others wait.
        drain_s: how long a turn's end waits for what is in flight.
        background_delay_s: how much later than it came a background lease counts as having arrived, unless the engine
            idles.
        patience_s: how long a tenant in line goes without before it is next; None: `PATIENCE_SLICES`.
        max_in_flight: requests in the engine at once, background work left out; None: no bound.
        served_tokens: what tenants were served: shared by engines among which they are to be treated alike.
        stats: waits, swaps and what was sent away are counted here.
    """

    def __init__(
        self,
        *,
        slice_s: float,
        drain_s: float,
        background_delay_s: float,
        patience_s: float | None = None,
        max_in_flight: int | None = None,
        served_tokens: ServedTokensByTenant | None = None,
        stats: EngineStats | None = None,
    ) -> None:
        self._slice_s = slice_s
        self._drain_s = drain_s
        self._background_delay_s = background_delay_s
        self.stats = stats or EngineStats()
        self._slots = Slots(served_tokens or ServedTokensByTenant(), max_in_flight=max_in_flight, gap_s=slice_s)
        self._policy = TurnPolicy(
            self._slots,
            slice_s=slice_s,
            patience_s=PATIENCE_SLICES * slice_s if patience_s is None else patience_s,
        )
        self._hold = OperatorHold()
        self._queues = WaitQueues()
        self._phase: Phase = "closed"
        self._resident: str | None = None
        self._mixed: str | None = None  # digest of the recipe that is being made resident
        self._turn_started = 0.0
        self._last_mix_s, self._last_mixed_at = 0.0, -math.inf
        self._is_after_background = False
        self._in_flight = InFlight(self._slots)
        self._changed = asyncio.Event()

    @property
    def resident(self) -> str | None:
        """Digest of the recipe in the engine; None while it is being mixed or the engine is down."""
        return self._resident

    @property
    def is_draining(self) -> bool:
        return self._phase == "draining"

    @property
    def is_mixing(self) -> bool:
        return self._phase == "mixing"

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
        is_open = recipe.digest == self._open_to
        if background:
            if is_open:
                return self._in_flight.admit(self, tenant=None)
        else:
            self._hold.check_admits(recipe.digest)
            if is_open and recipe.digest not in self._queues.requests and self._slots.has_one_for(tenant, now):
                self.stats.wait.observe(0.0 if place is None else now - place.asked_at)
                return self._in_flight.admit(self, tenant=tenant, num_tokens=num_tokens)
        try:
            with self._queues.joined(
                recipe,
                tenant=tenant,
                num_tokens=num_tokens,
                background=background,
                now=now,
                delay_s=self._background_delay_s if background else 0.0,
                timeout_s=timeout_s,
                expire=self._expire,
                place=place,
            ) as waiter:
                if is_open:
                    self._fill_slots(recipe.digest)
                self._changed.set()
                return await waiter.lease()
        finally:
            self._changed.set()

    async def run(self, resident: str, mix: Mix) -> NoReturn:
        if self._phase != "closed":
            raise RuntimeError("these turns are given already")
        self._resident = resident
        self._is_after_background = False
        mixing = Mixing(mix, queues=self._queues, hold=self._hold)
        try:
            while True:
                self._open_turn()
                await self._until_turn_ends()
                self._phase = "draining"
                claim = await self._until_drained()
                if claim is not None:
                    await self._swap(claim, mixing)
        finally:
            self._phase = "closed"
            self._resident = None
            self._in_flight.end_all(engine_lost_error)

    def fail_waiting(self, error: Callable[[], CocktailError]) -> None:
        self._queues.fail_all(error)

    def pin(self, recipe: Recipe | None) -> None:
        """Keeps a recipe resident from its next turn on; None: turns are given again.

        Those who wait for another are sent away, background work excepted.
        """
        if recipe is None:
            self._hold.unpin()
        else:
            self._hold.pin(recipe, loop_time())
            self._queues.requests.fail_all(pinned_error, but=recipe.digest)
        self._changed.set()

    def drain(self, is_drained: bool) -> None:
        """Admits nobody from now on, and sends those in line away, background work excepted; or admits again."""
        self._hold.is_drained = is_drained
        if is_drained:
            self._queues.requests.fail_all(operator_drains_error)
        self._admit_waiting()
        self._changed.set()

    def snapshot(self) -> SchedulerSnapshot:
        now = loop_time()
        return SchedulerSnapshot(
            phase=self._phase,
            resident=self._resident,
            num_in_flight=len(self._in_flight),
            turn_s=None if self._phase in ("closed", "mixing") else now - self._turn_started,
            pinned=self._hold.pinned_digest,
            is_drained=self._hold.is_drained,
            queues=self._queues.snapshot(now, reason=self._why_waits),
        )

    def end_in_flight(self, error: Callable[[], CocktailError]) -> None:
        self._in_flight.end_all(error)
        self._changed.set()

    def load(self) -> EngineLoad:
        swap = self.stats.swap
        return EngineLoad(
            is_up=self._phase != "closed",
            num_slots=self._slots.max_in_flight,
            num_in_flight=self._slots.num_taken,
            waiting=self._queues.requests.num_by_recipe(),
            num_background=self._in_flight.num_background,
            background=self._queues.background.num_by_recipe(),
            is_drained=self._hold.is_drained,
            pinned=self._hold.pinned_digest,
            # a turn that ends is no reason to come here
            resident={"open": self._resident, "mixing": self._mixed}.get(self._phase),
            turn_left_s=max(0.0, self._turn_started + self._slice_s - loop_time()) if self._phase == "open" else 0.0,
            swap_s=swap.total / swap.count if swap.count else None,
        )

    def give_back(self, lease: Lease) -> None:
        """Its request has ended: the slot goes to the next in line. Called by the lease, once."""
        if not self._in_flight.give_back(lease):
            return
        if lease.tenant is not None and (digest := self._open_to) is not None:
            self._fill_slots(digest)
        if self._queues or self._hold.pinned is not None:
            self._changed.set()

    def charge(self, tenant: str, num_tokens: int) -> None:
        """What a tenant was served, more or less than was thought when it was let in. Called by the lease."""
        self._slots.charge(tenant, num_tokens, loop_time())

    @property
    def _open_to(self) -> str | None:
        """Digest of the recipe whose requests are admitted now."""
        return self._resident if self._phase == "open" and not self._hold.is_drained else None

    def _why_waits(self, digest: str) -> WaitReason:
        kept_out = self._hold.keeps_out(digest)
        if self._phase == "closed" and kept_out != "drained":
            return "engine_down"
        if kept_out is not None:
            return kept_out
        if self._phase == "mixing":
            return "mixing"
        if self._phase == "draining":
            return "turn_ends"
        return "no_slot" if digest == self._resident else "other_turn"

    def _open_turn(self) -> None:
        self._phase = "open"
        self._turn_started = loop_time()
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        """Admits those who wait for the recipe whose turn is open, requests as far as there are slots."""
        if (digest := self._open_to) is None:
            return
        for waiter in self._queues.background.of(digest):
            self._queues.background.discard(waiter)
            if not waiter.is_answered:
                lease = self._in_flight.admit(self, tenant=None)
                self._grant(waiter, lease)
        self._fill_slots(digest)

    def _fill_slots(self, digest: str) -> None:
        """Gives free slots to those who wait for the recipe whose turn is open, one by one."""
        now = loop_time()
        while (waiter := self._slots.first_in(self._queues.requests.firsts_of(digest), now)) is not None:
            self._queues.requests.discard(waiter)
            if not waiter.is_answered:
                self.stats.wait.observe(now - waiter.made_at)
                lease = self._in_flight.admit(self, tenant=waiter.tenant, num_tokens=waiter.num_tokens)
                self._grant(waiter, lease)

    def _grant(self, waiter: Waiter, lease: Lease) -> None:
        if waiter.made_at <= self._last_mixed_at:
            lease.mixing_s = self._last_mix_s
        waiter.granted.set_result(lease)

    async def _until_turn_ends(self) -> None:
        while True:
            claim = self._next()
            ends_at = None
            if claim is not None:
                now = loop_time()
                ends_at = self._policy.ends_at(claim, now, started=self._turn_started, is_in_use=bool(self._in_flight))
                if now >= ends_at:
                    return
            await self._change(until=ends_at)

    async def _until_drained(self) -> Claim | None:
        """Waits for what is in flight, then names the next in line; None: nobody waits for another recipe any more."""
        deadline = loop_time() + self._drain_s
        while True:
            claim = self._next()
            if claim is None:
                return None
            if not self._in_flight:
                return claim
            if loop_time() >= deadline:
                self.stats.num_drained += len(self._in_flight)
                self._in_flight.end_all(
                    lambda: DrainedError(
                        f"the request ran for more than drain_s={self._drain_s:g} s after its model's turn had ended, "
                        "and requests for other models wait; ask for fewer tokens, or raise engine.drain_s",
                        retry_after_s=self._slice_s,
                    )
                )
            else:
                await self._change(until=deadline)

    async def _swap(self, claim: Claim, mixing: Mixing) -> None:
        before, self._resident = self._resident, None
        self._phase, self._mixed = "mixing", claim.recipe.digest
        started = loop_time()
        mix_s = await mixing.make_resident(claim.recipe)
        if mix_s is None:
            self._resident = before
            return
        self._last_mix_s, self._last_mixed_at = mix_s, loop_time()
        self._resident = claim.recipe.digest
        self._slots.share_anew()
        self._is_after_background = claim.claimant == "background"
        self.stats.observe_swap(loop_time() - started)

    def _next(self) -> Claim | None:
        """Who is next, of those who wait for another recipe than the resident one."""
        if self._hold.is_drained:
            return None
        if self._hold.pinned is not None:
            return None if self._hold.pinned_digest == self._resident else self._hold.pinned
        return self._policy.next(
            self._queues.requests.firsts(other_than=self._resident),
            self._queues.background.firsts(other_than=self._resident),
            loop_time(),
            is_after_background=self._is_after_background,
        )

    async def _change(self, *, until: float | None) -> None:
        """Returns when somebody came or went, or at that time."""
        self._changed.clear()
        try:
            async with asyncio.timeout_at(until):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _expire(self, waiter: Waiter, timeout_s: float) -> None:
        self.stats.num_queue_timeouts += 1
        error: CocktailError
        if self._phase == "closed":
            error = not_ready_error(timeout_s)
        else:
            error = QueueTimeoutError(
                f"the model's turn did not come within queue_timeout_s={timeout_s:g} s: too many models share this "
                "engine now; retry later, or raise engine.queue_timeout_s",
                retry_after_s=self._slice_s,
            )
        self._queues.fail(waiter, error)
