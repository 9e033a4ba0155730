"""The gateways on one store: who is there, told from who is dead without comparing clocks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from math import inf

from sqlalchemy import delete, insert, select, update

from cocktail_serve.database import tables
from cocktail_serve.database.database import Database, shielded

BEATS_PER_LEASE = 5
"""How often a gateway gives a sign of life within the time after which the others take it for dead."""


class GatewayHeartbeats:
    """One gateway among those that work with a store.

    Each raises a number of its own in the store, again and again. Whoever sees another's number stand still for
    `lease_s`, by its own clock and while it could look, takes that one for dead. A gateway that was only slow finds
    out by its next sign of life; what it writes meanwhile about cocktails that others took over changes nothing, since
    such writes name the change that they go back to.

    Args:
        place: name of what only one process at a time can hold (its cache_dir): whoever was there before is dead.
        lease_s: how long a gateway may give no sign of life.
        clock: seconds, never going back.

    Attributes:
        me: id of this gateway's present life; empty before it joined.
    """

    def __init__(
        self, database: Database, *, place: str | None, lease_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._place = place or uuid.uuid4().hex
        self._lease_s = lease_s
        self._clock = clock
        self._beats: dict[str, tuple[int, float]] = {}
        self._looked_at = -inf
        self.me = ""

    @property
    def beat_s(self) -> float:
        """Seconds between two signs of life."""
        return self._lease_s / BEATS_PER_LEASE

    @shielded
    async def join(self) -> None:
        """Begins a life under a new id; the first time, whoever held the place before is struck off."""
        me = uuid.uuid4().hex
        async with self._database.write() as connection:
            if not self.me:
                await connection.execute(delete(tables.gateways).where(tables.gateways.c.place == self._place))
            await connection.execute(insert(tables.gateways).values(id=me, place=self._place, beat=0))
        self.me = me

    @shielded
    async def beat(self) -> bool:
        """Gives a sign of life. False: the others have taken this gateway for dead; it must `join` again."""
        gateways = tables.gateways
        async with self._database.write() as connection:
            beaten = await connection.execute(
                update(gateways).where(gateways.c.id == self.me).values(beat=gateways.c.beat + 1)
            )
        return bool(beaten.rowcount)

    @shielded
    async def alive(self) -> frozenset[str]:
        """Ids of the gateways that are there, this one among them; the dead are struck off."""
        gateways = tables.gateways
        rows = await self._database.rows(select(gateways.c.id, gateways.c.beat))
        now = self._clock()
        if now - self._looked_at > self._lease_s / 2:
            # this gateway stood still, or the store was gone: then it did not see the others beat, and cannot tell
            self._beats.clear()
        self._looked_at = now
        before, self._beats = self._beats, {}
        for row in rows:
            beat, since = before.get(row["id"], (None, now))
            self._beats[row["id"]] = (row["beat"], since if beat == row["beat"] else now)
        for gateway, (beat, since) in list(self._beats.items()):
            if gateway != self.me and now - since >= self._lease_s and await self._strike_off(gateway, beat):
                del self._beats[gateway]
        return frozenset(self._beats)

    @shielded
    async def leave(self) -> None:
        """Ends this life at once, so that the others need not wait to go on with its jobs."""
        async with self._database.write() as connection:
            await connection.execute(delete(tables.gateways).where(tables.gateways.c.id == self.me))

    async def _strike_off(self, gateway: str, beat: int) -> bool:
        gateways = tables.gateways
        async with self._database.write() as connection:
            struck = await connection.execute(delete(gateways).where(gateways.c.id == gateway, gateways.c.beat == beat))
        return bool(struck.rowcount)
