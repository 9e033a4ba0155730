"""Leases under which the server answers by their recipe: its turn has come, and its parameters are ready."""

from __future__ import annotations

import time

from cocktail_serve.engines.engine_time import CallTimer
from cocktail_serve.engines.turns.base import Turns
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.vllm.parameters import Parameters
from cocktail_serve.engines.vllm.supervisor import Supervisor
from cocktail_serve.recipe import Recipe


class ReadyLeases:
    """Gives leases on one engine's server.

    Args:
        supervisor: says whether waiting makes sense.
        queue_timeout_s: how long a request waits for its turn.
    """

    def __init__(self, supervisor: Supervisor, turns: Turns, parameters: Parameters, *, queue_timeout_s: float) -> None:
        self._supervisor = supervisor
        self._turns = turns
        self._parameters = parameters
        self._queue_timeout_s = queue_timeout_s

    async def acquire(self, recipe: Recipe, *, tenant: str, num_tokens: int) -> Lease:
        """For a request that is expected to take so many tokens.

        Raises:
            As `Supervisor.check_available`, `Turns.acquire` and `Parameters.until_ready`.
        """
        self._supervisor.check_available()
        since = time.monotonic()
        lease = await self._turns.acquire(recipe, tenant=tenant, num_tokens=num_tokens, timeout_s=self._queue_timeout_s)
        await self._until_ready(recipe, lease, since=since)
        return lease

    async def acquire_background(self, recipe: Recipe, timer: CallTimer) -> Lease:
        """For what gives way to requests; what was mixed for it is added to the timer. Raises as `acquire`."""
        self._supervisor.check_available()
        since = time.monotonic()
        lease = await self._turns.acquire(recipe, background=True)
        timer.add(mixing_s=await self._until_ready(recipe, lease, since=since))
        return lease

    async def _until_ready(self, recipe: Recipe, lease: Lease, *, since: float) -> float:
        """As `Parameters.until_ready`; the lease is given back where the recipe does not become ready."""
        try:
            with lease.interruptible():
                return await self._parameters.until_ready(recipe, since=since)
        except BaseException:
            lease.release()
            raise
