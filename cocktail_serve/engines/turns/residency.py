"""The turns of one engine: which recipe its parameters are now, and who may use them.

An engine holds one full-weight recipe at a time. Whoever wants to use it acquires a lease for a recipe and holds it
until its answer is finished. The rules, in the order they bite:

1. A request for the resident recipe is admitted at once while its turn is open and the engine has a slot for its
   tenant (of `max_in_flight`; while several tenants use the turn, each has an equal share of the slots). Those without
   a slot wait; one that gets free goes to the tenant served least lately.
2. When somebody waits for another recipe, the turn ends as soon as nothing is in flight, or `slice_s` after the later
   of the turn's start and that arrival; after the turn's start alone if the tenant who waits was served less lately
   than all whom the turn serves.
3. Then nobody is admitted. What is in flight may finish for `drain_s`; what is left is ended with `DrainedError`. If
   all who waited give up meanwhile, the turn is opened again.
4. Next is the tenant served least lately, with the recipe its oldest request is for. That recipe is mixed, and those
   who wait for it are admitted together.

"Served lately" is in tokens (see `fairness`), so it makes no difference how many requests, streams or recipes a tenant
spreads its load over. A tenant that is behind the one in line keeps the turn past its slice, and for a moment
(`HOLD_SLICES`) after its answers have ended, since a client in a loop asks again at once: the flood of another would
otherwise make each of its requests wait for two swaps. That ends when it has caught up, or when a tenant in line has
gone without for `patience_s`: such a tenant is next whatever it was served, so nobody starves.

Background leases (scoring, mixing ahead) are nobody's, take no slot, and wait by two handicaps: each counts as having
arrived `background_delay_s` later than it did unless the engine idles, and while traffic waits no two turns in a row
are given for background's sake. The first lets traffic go first; because it is a constant and not a class of its own,
background work cannot starve: once it is the oldest in line, it is next.

The operator may pin a recipe, which then keeps its turn while requests for others are sent away, and may drain the
engine: what is in flight ends and nobody is admitted. Background work waits meanwhile.

All state is changed on the event loop between two awaits, and an admission is counted in the moment it is decided, not
when the admitted task wakes up. So no lease is ever held while another recipe is resident or being mixed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn

from cocktail_serve.engines.fairness import Account, Accounts
from cocktail_serve.engines.occupancy import OPERATOR_RETRY_S, Occupancy, Phase, Queue, WaitReason
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.turns.line import Line, Waiter
from cocktail_serve.errors import (
    ClientError,
    CocktailError,
    DrainedError,
    EngineError,
    ModelNotReadyError,
    QueueTimeoutError,
)
from cocktail_serve.recipe import Recipe

Mix = Callable[[Recipe], Awaitable[bool]]
"""Makes a recipe resident. True: done. False: the engine was still busy and nothing changed.

A `ClientError` means that this recipe cannot be mixed and nothing changed; any other error, that the engine is lost.
"""

MAX_BUSY_MIXES = 3
"""Mixes refused as busy in a row, with nothing in flight on our side, before the engine counts as lost."""

MAX_LOST_MIXES = 2
"""Engines lost in the mix of one recipe before those who wait for it are sent away.

One is bad luck (a process was killed just then), two look like the recipe's doing, and waiting on would never end.
"""


HOLD_SLICES = 0.1
"""How long a turn is held, in slices, for a tenant whose answers have just ended and who is behind the one in line."""


class Residency:
    """Decides whose turn it is on one engine. Lives on one event loop, whose clock is its clock.

    The owner of the engine calls `run` for each life of the engine; everybody else calls `acquire`.

    Args:
        mix: makes a recipe resident in the engine.
        slice_s: how long the resident recipe keeps its turn while others wait.
        drain_s: how long a turn's end waits for what is in flight.
        background_delay_s: how much later than it came a background lease counts as having arrived.
        patience_s: how long a tenant in line goes without before it is next; None: ten slices.
        max_in_flight: requests in the engine at once, background work left out; None: no bound.
    """

    def __init__(
        self,
        mix: Mix,
        *,
        slice_s: float,
        drain_s: float,
        background_delay_s: float,
        patience_s: float | None = None,
        max_in_flight: int | None = None,
        stats: EngineStats | None = None,
    ) -> None:
        self._mix = mix
        self._slice_s = slice_s
        self._patience_s = 10.0 * slice_s if patience_s is None else patience_s
        self._max_in_flight = max_in_flight or sys.maxsize
        self._drain_s = drain_s
        self._background_delay_s = background_delay_s
        self.stats = stats or EngineStats()
        self._phase: Phase = "closed"
        self._resident: str | None = None
        self._turn_started = 0.0
        self._last_was_visit = False
        self._in_flight: set[Lease] = set()
        self._num_serving = 0  # those in flight that take a slot
        self._accounts = Accounts()
        self._serving: dict[str, Account] = {}  # accounts of the tenants whom the turn serves, or did a moment ago
        self._pin: Waiter | None = None
        self._is_drained = False
        self._traffic = Line()
        self._background = Line()
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
        """Requests in line, background work left out."""
        return len(self._traffic)

    async def acquire(
        self,
        recipe: Recipe,
        *,
        tenant: str = "",
        num_tokens: int = 0,
        background: bool = False,
        timeout_s: float | None = None,
    ) -> Lease:
        """Waits for the recipe's turn.

        Args:
            tenant: whose request it is; not read for background work.
            num_tokens: what its answer is expected to take; settle what it took with the lease.
            background: give way to those who are not.
            timeout_s: None: waits as long as it takes.

        Raises:
            QueueTimeoutError: the turn did not come in time.
            ModelNotReadyError: the operator drains the engine, or keeps another recipe resident.
            ModelNotReadyError: as above, and the engine was down at the end of that time.
            EngineError: mixing this recipe lost the engine, more than once.
            ClientError: this recipe cannot be mixed; nothing else was disturbed.
        """
        loop = asyncio.get_running_loop()
        is_open = self._phase == "open" and recipe.digest == self._resident and not self._is_drained
        if background:
            if is_open:
                return self._admit(None, 0)
        else:
            self._check_admits(recipe)
            if is_open and recipe.digest not in self._traffic and self._has_slot(tenant, loop.time()):
                self.stats.wait.observe(0.0)
                return self._admit(tenant, num_tokens)
        waiter = Waiter(
            recipe,
            loop.create_future(),
            came=loop.time(),
            delay_s=self._background_delay_s if background else None,
            tenant="" if background else tenant,
            num_tokens=num_tokens,
        )
        line = self._background if background else self._traffic
        line.add(waiter)
        if is_open:
            self._fill_slots()
        if timeout_s is not None:
            waiter.timer = loop.call_later(timeout_s, self._expire, waiter, timeout_s)
        self._changed.set()
        try:
            lease = await waiter.lease
            lease.raise_if_ended()  # between the admission and our waking up
            return lease
        except asyncio.CancelledError:
            # admitted, but cancelled before it could wake up
            if waiter.lease.done() and not waiter.lease.cancelled() and waiter.lease.exception() is None:
                waiter.lease.result().release()
            raise
        finally:
            line.discard(waiter)
            if waiter.timer is not None:
                waiter.timer.cancel()
            self._changed.set()

    async def run(self, resident: str) -> NoReturn:
        """Gives turns during one life of the engine. Cancel it when the engine is gone.

        Whoever holds a lease when it ends gets `EngineError`; whoever waits goes on waiting for the next life.

        Args:
            resident: digest of the recipe that the engine started with.

        Raises:
            EngineError: a mix failed, so that nobody knows what the parameters are: kill the engine.
        """
        if self._phase != "closed":
            raise RuntimeError("this residency already runs")
        self._resident = resident
        self._last_was_visit = False
        try:
            while True:
                self._open_turn()
                await self._until_turn_ends()
                self._phase = "draining"
                waiter = await self._drain()
                if waiter is not None:
                    await self._swap(waiter)
        finally:
            self._phase = "closed"
            self._resident = None
            self._end_in_flight(
                lambda: EngineError("the engine failed while it held the request; it is being restarted")
            )

    def fail_waiting(self, error: Callable[[], CocktailError]) -> None:
        """Sends everybody in line away: the engine will not come back soon."""
        for waiter in [*self._traffic, *self._background]:
            self._fail(waiter, error())

    def pin(self, recipe: Recipe | None) -> None:
        """Keeps a recipe resident from its next turn on; None: turns are given again.

        Those who wait for another are sent away, background work excepted.
        """
        if recipe is None:
            self._pin = None
        else:
            loop = asyncio.get_running_loop()
            self._pin = Waiter(recipe, loop.create_future(), came=loop.time(), delay_s=None)
            for waiter in [each for each in self._traffic if each.recipe.digest != recipe.digest]:
                self._fail(waiter, self._pinned_error())
        self._changed.set()

    def drain(self, is_drained: bool) -> None:
        """Admits nobody from now on, and sends those in line away, background work excepted; or admits again."""
        self._is_drained = is_drained
        if is_drained:
            for waiter in list(self._traffic):
                self._fail(waiter, _drained_error())
        elif self._phase == "open":
            self._admit_waiting()
        self._changed.set()

    def occupancy(self) -> Occupancy:
        """What the engine does now, and for whom it does not."""
        now = asyncio.get_running_loop().time()
        digests = {waiter.recipe.digest: None for line in (self._traffic, self._background) for waiter in line}
        queues = []
        for digest in digests:
            traffic, background = self._traffic.of(digest), self._background.of(digest)
            queues.append(
                Queue(
                    recipe_digest=digest,
                    num_waiting=len(traffic),
                    num_background=len(background),
                    oldest_s=now - min(waiter.came for waiter in [*traffic, *background]),
                    reason=self._why_waits(digest),
                )
            )
        return Occupancy(
            phase=self._phase,
            resident=self._resident,
            num_in_flight=len(self._in_flight),
            turn_s=None if self._phase in ("closed", "mixing") else now - self._turn_started,
            pinned=None if self._pin is None else self._pin.recipe.digest,
            is_drained=self._is_drained,
            queues=tuple(sorted(queues, key=lambda queue: -queue.oldest_s)),
        )

    def give_back(self, lease: Lease) -> None:
        """For the lease."""
        if lease not in self._in_flight:
            return
        self._in_flight.discard(lease)
        if lease.tenant is not None:
            self._leave(lease.tenant)
            if self._phase == "open":
                self._fill_slots()
        if self._traffic or self._background or self._pin is not None:
            self._changed.set()

    def charge(self, tenant: str, num_tokens: int) -> None:
        """For the lease."""
        now = asyncio.get_running_loop().time()
        self._accounts.of(tenant, now).charge(num_tokens, now)

    def _check_admits(self, recipe: Recipe) -> None:
        if self._is_drained:
            raise _drained_error()
        if self._pin is not None and self._pin.recipe.digest != recipe.digest:
            raise self._pinned_error()

    def _pinned_error(self) -> ModelNotReadyError:
        return ModelNotReadyError(
            "the operator keeps another model in this engine for now; ask again later", retry_after_s=OPERATOR_RETRY_S
        )

    def _why_waits(self, digest: str) -> WaitReason:
        if self._is_drained:
            return "drained"
        if self._phase == "closed":
            return "engine_down"
        if self._pin is not None and self._pin.recipe.digest != digest:
            return "pinned"
        if self._phase == "mixing":
            return "mixing"
        if self._phase == "draining":
            return "turn_ends"
        return "no_slot" if digest == self._resident else "other_turn"

    def _admit(self, tenant: str | None, num_tokens: int) -> Lease:
        lease = Lease(self, tenant=tenant, num_tokens=num_tokens)
        self._in_flight.add(lease)
        if tenant is not None:
            now = asyncio.get_running_loop().time()
            account = self._accounts.of(tenant, now)
            account.num_in_flight += 1
            account.charge(num_tokens, now)
            self._serving[tenant] = account
            self._num_serving += 1
        return lease

    def _leave(self, tenant: str) -> None:
        now = asyncio.get_running_loop().time()
        account = self._accounts.of(tenant, now)
        account.num_in_flight -= 1
        account.left_at = now
        self._num_serving -= 1

    def _has_slot(self, tenant: str, now: float) -> bool:
        """Whether a tenant may have one more request in the engine."""
        if self._num_serving >= self._max_in_flight:
            return False
        account = self._accounts.of(tenant, now)
        if not account.num_in_flight:
            return True
        if account.num_in_flight < self._max_in_flight // (len(self._serving) or 1):
            return True
        # a tenant that asks again and again is between two requests only for a moment: its share is kept that long
        for other in [name for name, each in self._serving.items() if not _is_present(each, now, self._slice_s)]:
            del self._serving[other]
        return account.num_in_flight < self._max_in_flight // (len(self._serving) or 1)

    def _open_turn(self) -> None:
        """Admits those who wait for the resident recipe, as far as there are slots."""
        if self._resident is None:
            raise RuntimeError("a turn was opened with nothing resident")
        self._phase = "open"
        self._turn_started = asyncio.get_running_loop().time()
        if not self._is_drained:
            self._admit_waiting()

    def _admit_waiting(self) -> None:
        assert self._resident is not None
        for waiter in self._background.of(self._resident):
            self._background.discard(waiter)
            if not waiter.lease.done():  # else cancelled or expired; its task has not woken up yet
                waiter.lease.set_result(self._admit(None, 0))
        self._fill_slots()

    def _fill_slots(self) -> None:
        """Gives free slots to those who wait for the resident recipe, one by one to the tenant served least lately."""
        if self._resident is None or self._is_drained:
            return
        now = asyncio.get_running_loop().time()
        while True:
            firsts = [w for w in self._traffic.firsts_of(self._resident) if self._has_slot(w.tenant, now)]
            if not firsts:
                return
            waiter = min(firsts, key=lambda first: (self._recent(first.tenant, now), first.arrived))
            self._traffic.discard(waiter)
            if not waiter.lease.done():
                self.stats.wait.observe(now - waiter.came)
                waiter.lease.set_result(self._admit(waiter.tenant, waiter.num_tokens))

    async def _until_turn_ends(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            waiter = self._next()
            ends_at = None if waiter is None else self._turn_ends_at(waiter, loop.time())
            if ends_at is not None and loop.time() >= ends_at:
                return
            await self._change(until=ends_at)

    def _turn_ends_at(self, waiter: Waiter, now: float) -> float:
        """When the turn ends for the sake of the next in line, as things stand now."""
        starts = max(self._turn_started, waiter.arrived)
        if waiter.is_background or waiter is self._pin:
            return starts + self._slice_s if self._in_flight else now
        claim = self._recent(waiter.tenant, now)
        hold_s = HOLD_SLICES * self._slice_s
        present = [account for account in self._serving.values() if _is_present(account, now, hold_s)]
        if all(account.recent(now) > claim for account in present):
            starts = self._turn_started
        ends_at = starts + self._slice_s if self._in_flight else now
        starves_at = self._without_since(waiter, now) + self._patience_s
        behind = [account for account in present if account.recent(now) < claim]
        if not behind or now >= starves_at:
            return ends_at
        if any(account.num_in_flight for account in behind):
            # what each was served changes while they are served: look again before long
            return max(ends_at, min(starves_at, now + self._slice_s))
        return max(ends_at, min(starves_at, max(account.left_at for account in behind) + hold_s))

    async def _drain(self) -> Waiter | None:
        """Waits for what is in flight, then names the next in line; None: nobody waits for another recipe any more."""
        deadline = asyncio.get_running_loop().time() + self._drain_s
        while True:
            waiter = self._next()
            if waiter is None:
                return None
            if not self._in_flight:
                return waiter
            if asyncio.get_running_loop().time() >= deadline:
                self.stats.num_drained += len(self._in_flight)
                self._end_in_flight(
                    lambda: DrainedError(
                        f"the request ran for more than drain_s={self._drain_s:g} s after its model's turn had ended, "
                        "and requests for other models wait; ask for fewer tokens, or raise engine.drain_s",
                        retry_after_s=self._slice_s,
                    )
                )
            else:
                await self._change(until=deadline)

    async def _swap(self, waiter: Waiter) -> None:
        recipe = waiter.recipe
        before, self._resident = self._resident, None
        self._phase = "mixing"
        started = asyncio.get_running_loop().time()
        try:
            for _ in range(MAX_BUSY_MIXES):
                if await self._mix(recipe):
                    break
            else:
                raise EngineError(f"the engine stayed busy with nothing in flight, {MAX_BUSY_MIXES} times in a row")
        except ClientError as error:
            self._resident = before
            self._fail_recipe(recipe.digest, error)
            return
        except (CocktailError, asyncio.CancelledError) as error:
            self._give_up_on(recipe.digest, error)
            raise
        self._resident = recipe.digest
        self._serving.clear()
        self._last_was_visit = waiter.is_background
        self.stats.observe_swap(asyncio.get_running_loop().time() - started)

    def _next(self) -> Waiter | None:
        """Who is next, of those who wait for another recipe than the resident one."""
        if self._is_drained:
            return None
        if self._pin is not None:
            return None if self._pin.recipe.digest == self._resident else self._pin
        background = self._background.oldest(other_than=self._resident)
        oldest = self._traffic.oldest(other_than=self._resident)
        if oldest is None:
            return background
        if background is not None and not self._last_was_visit and background.arrived < oldest.arrived:
            return background
        now = asyncio.get_running_loop().time()
        return min(self._traffic.firsts(other_than=self._resident), key=lambda waiter: self._rank(waiter, now))

    def _rank(self, waiter: Waiter, now: float) -> tuple[float, float, float]:
        """Lower is sooner: tenants that starve, by how long; then those served least lately; then who came first."""
        since = self._without_since(waiter, now)
        if now - since >= self._patience_s:
            return (0, since, waiter.arrived)
        return (1, self._recent(waiter.tenant, now), waiter.arrived)

    def _without_since(self, waiter: Waiter, now: float) -> float:
        """Since when the waiter's tenant, which waits, has not been served."""
        account = self._accounts.of(waiter.tenant, now)
        return now if account.num_in_flight else max(waiter.arrived, account.left_at)

    def _recent(self, tenant: str, now: float) -> float:
        return self._accounts.of(tenant, now).recent(now)

    async def _change(self, *, until: float | None) -> None:
        """Returns when somebody came or went, or at that time."""
        self._changed.clear()
        try:
            async with asyncio.timeout_at(until):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _end_in_flight(self, error: Callable[[], CocktailError]) -> None:
        """Ended leases no longer count: their connections are closed, and the engine's own count guards the mix."""
        leases, self._in_flight = self._in_flight, set()
        for lease in leases:
            if lease.tenant is not None:
                self._leave(lease.tenant)
            lease.end(error())

    def _expire(self, waiter: Waiter, timeout_s: float) -> None:
        self.stats.num_queue_timeouts += 1
        if self._phase == "closed":
            self._fail(
                waiter,
                ModelNotReadyError(f"the engine is starting or restarting and was not ready within {timeout_s:g} s"),
            )
        else:
            self._fail(
                waiter,
                QueueTimeoutError(
                    f"the model's turn did not come within queue_timeout_s={timeout_s:g} s: too many models share this "
                    "engine now; retry later, or raise engine.queue_timeout_s",
                    retry_after_s=self._slice_s,
                ),
            )

    def _give_up_on(self, digest: str, error: BaseException) -> None:
        """Sends those away who saw the engine lost in a mix of their recipe before: the recipe may be the cause."""
        pinned = [] if self._pin is None or self._pin.recipe.digest != digest else [self._pin]
        for waiter in [*self._traffic.of(digest), *self._background.of(digest), *pinned]:
            waiter.num_lost_mixes += 1
            if waiter is self._pin and waiter.num_lost_mixes == MAX_LOST_MIXES:
                self._pin = None
            elif waiter.num_lost_mixes == MAX_LOST_MIXES:
                self._fail(
                    waiter,
                    EngineError(
                        f"the engine was lost {MAX_LOST_MIXES} times in a row while it mixed this model: {error!r}"
                    ),
                )

    def _fail_recipe(self, digest: str, error: CocktailError) -> None:
        if self._pin is not None and self._pin.recipe.digest == digest:
            self._pin = None
        for waiter in [*self._traffic.of(digest), *self._background.of(digest)]:
            self._fail(waiter, error)

    def _fail(self, waiter: Waiter, error: CocktailError) -> None:
        (self._background if waiter.is_background else self._traffic).discard(waiter)
        if not waiter.lease.done():
            waiter.lease.set_exception(error)


def _is_present(account: Account, now: float, gap_s: float) -> bool:
    """Whether a tenant is served, or was until a moment ago."""
    return account.num_in_flight > 0 or now - account.left_at < gap_s


def _drained_error() -> ModelNotReadyError:
    return ModelNotReadyError("the operator drains this engine; ask again later", retry_after_s=OPERATOR_RETRY_S)
