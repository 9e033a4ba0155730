"""What was used, counted in memory and written in batches: no request waits for the database.

A batch has a number, and the store takes each number once: one whose commit was lost on the way to us is sent again
and counts once. A batch that the store refuses is kept and tried again. What is lost is what a killed process had
counted since its last batch: about `FLUSH_S` seconds' worth, or what it had while the store was gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from cocktail_serve.errors import StorageError
from cocktail_serve.usage.amounts import UsageAccount, UsageAmount
from cocktail_serve.usage.store import UsageStore

logger = logging.getLogger(__name__)

FLUSH_S = 1.0

MAX_ACCOUNTS = 50_000
"""Accounts of one batch. While the store is gone, further ones are counted under their tenant and day alone."""

OTHER_MODELS = "*"
"""Model of what was counted without its model, for lack of room."""


class Ledger:
    """Counts what tenants use.

    Args:
        clock: seconds since the epoch; days are UTC's.
    """

    def __init__(self, store: UsageStore, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._writer = uuid.uuid4().hex
        self._number = 0
        self._counting: dict[UsageAccount, UsageAmount] = {}
        self._sending: Mapping[UsageAccount, UsageAmount] | None = None
        self._flushing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._is_failing = False

    def start(self) -> None:
        """Begins to write now and then."""
        self._task = asyncio.create_task(self._keep_flushing(), name="usage")

    async def stop(self) -> None:
        """Writes what is left. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self.flush()
            await self._store.leave(self._writer)
        except StorageError as error:
            lost = [*(self._sending or {}).items(), *self._counting.items()]
            logger.error("usage of %d accounts could not be written at the end: %s", len(lost), error.message)

    def add(self, tenant: str, key_id: str | None, model: str, pool: str, use: UsageAmount) -> None:
        """Counts some use, now. Synchronous and cheap: requests call it."""
        day = datetime.fromtimestamp(self._clock(), UTC).date()
        account = UsageAccount(day, tenant, key_id or "", model, pool)
        counted = self._counting.get(account)
        if counted is None:
            if len(self._counting) >= MAX_ACCOUNTS:
                account = UsageAccount(day, tenant, "", OTHER_MODELS, "")
            counted = self._counting.setdefault(account, UsageAmount())
        counted.add(use)

    async def flush(self) -> None:
        """Writes what was counted before this call.

        Raises:
            StorageError: the store refused; it is kept, and written with the next flush.
        """
        async with self._flushing:
            await self._send()
            if self._counting:
                self._sending, self._counting = self._counting, {}
                self._number += 1
                await self._send()

    async def _send(self) -> None:
        if self._sending is not None:
            await self._store.write(self._writer, self._number, self._sending)
            self._sending = None

    async def _keep_flushing(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except StorageError as error:
                if not self._is_failing:
                    logger.error("usage could not be written and is kept to be tried again: %s", error.message)
                self._is_failing = True
            else:
                if self._is_failing:
                    logger.info("usage is written again")
                self._is_failing = False
