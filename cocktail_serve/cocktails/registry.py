"""Changing which cocktails exist: in the store first, then in memory."""

from __future__ import annotations

import itertools
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

from cocktail_serve.cocktails.cocktail import Cocktail, Failure, Findings
from cocktail_serve.cocktails.entries import Entry, Name
from cocktail_serve.cocktails.index import Index, no_cocktail
from cocktail_serve.cocktails.learning import Heed, Learning
from cocktail_serve.cocktails.quotas import check_cocktails, check_jobs
from cocktail_serve.cocktails.request import CocktailRequest
from cocktail_serve.cocktails.store import Beside, StaleError, Store
from cocktail_serve.config import Limits
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import ConflictError, NotFoundError, PermissionDeniedError
from cocktail_serve.pool import Pool
from cocktail_serve.tenants.limits import UNLIMITED

Admission = Literal["new", "again", "existing"]
"""A version that was not there; one that failed or was cancelled and is queued again; one that is there."""


class Registry(Index):
    """An index that changes: durable before it shows.

    Other gateways may change the same store: `learn` brings what they did into memory, and a change that goes back to
    something older than the store holds is decided again.

    Args:
        pools: by id, as the operator defines them now.
        dtypes: dtype of each pool's engine, which recipes round to.
        max_inline: inline cocktails kept over all tenants; the least recently used go first.
        clock: seconds since the epoch.

    Attributes:
        owner: id of this gateway, whose the jobs are that begin here.
    """

    def __init__(
        self,
        store: Store,
        pools: Mapping[str, Pool],
        dtypes: Mapping[str, DType],
        *,
        max_inline: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(pools, dtypes, clock=clock)
        self._store = store
        self._max_inline = max_inline
        self._learning = Learning(store, self._entries, self._serving)
        self._unkept: dict[str, Cocktail] = {}
        self._dry_runs: Counter[str] = Counter()
        self.owner: str | None = None

    async def load(self) -> None:
        """Reads the store into memory."""
        await self._learning.load()

    def listen(self, heed: Heed) -> None:
        """Has a function called, at once, with the cocktails that other gateways changed and those they removed."""
        self._learning.listen(heed)

    async def learn(self) -> None:
        """Brings what other gateways changed before this call into memory."""
        await self._learning.learn()

    async def flush(self) -> None:
        """Writes what the hot path only noted, when inline cocktails were last used, and ends not kept so far."""
        if self._entries.used:
            noted, self._entries.used = self._entries.used, {}
            await self._store.touch(noted)
        async with self._learning.changing:
            for uid, before in list(self._unkept.items()):
                entry = self._entries.by_uid(uid)
                try:
                    if entry is not None and entry.cocktail.change == before.change:
                        await self._apply(entry, before=before)
                except StaleError:
                    await self._learning.look()
                self._unkept.pop(uid, None)

    async def admit(
        self,
        tenant: str,
        request: CocktailRequest,
        *,
        items: tuple[str, ...],
        warnings: tuple[str, ...],
        limits: Limits = UNLIMITED,
        key_id: str | None = None,
        beside: Beside | None = None,
    ) -> tuple[Cocktail, Admission, list[Cocktail]]:
        """Finds the version that a request names, or adds it as queued.

        A version asked for again is the newest again, so it becomes current once ready; a pin stands.

        Args:
            items: keys that its scores will be kept under.
            limits: of the tenant; what is counted and what is added are one step.
            key_id: of the key that asks.
            beside: writes rows of its own in the transaction that this is done in.

        Returns:
            A snapshot, how it was found, and the inline cocktails that had to go for it.

        Raises:
            ConflictError: another request of the same name has the same first eight digits of its digest.
            QuotaExceededError: the tenant keeps as many cocktails, or bytes of examples, as it may.
            RateLimitError: as many of its jobs as may be have not ended.
        """
        async with self._learning.changing:
            await self._learning.look()
            return await self._learning.decided(
                lambda: self._admit(
                    tenant, request, items=items, warnings=warnings, limits=limits, key_id=key_id, beside=beside
                )
            )

    async def update(self, uid: str, *, epoch: int | None = None, **changes: Any) -> Cocktail | None:
        """Changes a version, in the store first.

        Args:
            epoch: of the job that asks: one that was given to another gateway since changes nothing.

        Returns:
            The snapshot, or None where it has been deleted, is final, or is no longer the job's.
        """

        async def decide() -> Cocktail | None:
            entry = self._entries.by_uid(uid)
            if entry is None or entry.cocktail.is_final or epoch not in (None, entry.cocktail.epoch):
                return None
            await self._apply(entry, **changes)
            return self._entries.snapshot(entry)

        async with self._learning.changing:
            return await self._learning.decided(decide)

    async def claim(self, uid: str) -> Cocktail | None:
        """Gives an unfinished cocktail to this gateway, in a new epoch; None: another was first, or it has ended."""
        async with self._learning.changing:
            entry = self._entries.by_uid(uid)
            if entry is None or entry.cocktail.is_final:
                return None
            try:
                await self._apply(entry, owner=self.owner, epoch=entry.cocktail.epoch + 1)
                return self._entries.snapshot(entry)
            except StaleError:
                await self._learning.look()
                return None

    async def keep_findings(self, uid: str, findings: Findings) -> Cocktail | None:
        """Writes down what was found out about a ready version. Returns the snapshot, or None where it is gone."""

        async def decide() -> Cocktail | None:
            entry = self._entries.by_uid(uid)
            if entry is None or entry.cocktail.status != "ready":
                return None
            # no witness need hear of it: what the cocktail is stays as it was
            self._entries.show(entry, await self._store.update(replace(entry.cocktail, findings=findings)))
            return self._entries.snapshot(entry)

        async with self._learning.changing:
            return await self._learning.decided(decide)

    def fail_in_memory(self, uid: str, failure: Failure) -> None:
        """Ends a version whose end the store refused to take. `flush` tries again; after a restart its job goes on."""
        entry = self._entries.by_uid(uid)
        if entry is not None and not entry.cocktail.is_final:
            self._unkept[uid] = entry.cocktail
            self._entries.show(entry, replace(entry.cocktail, status="failed", error=failure))

    async def pin(self, tenant: str, name: str, ref: str | None) -> Cocktail:
        """Makes a ready version current whatever becomes ready later; None removes the pin.

        Raises:
            NotFoundError: no such name, or no such version of it.
            ConflictError: the version is not ready.
        """

        async def decide() -> Cocktail:
            versions, entry = self._pinnable(tenant, name, ref)
            await self._store.pin(tenant, name, None if entry is None else entry.cocktail.uid)
            versions.pinned = entry
            versions.settle_current()
            return self._entries.snapshot(self._entry(tenant, name))

        async with self._learning.changing:
            await self._learning.look()
            return await self._learning.decided(decide)

    async def remove(self, tenant: str, ref: str) -> list[Cocktail]:
        """Deletes a version, or all versions of a name. From then on they are unknown.

        Returns:
            The last snapshots; those unfinished as cancelled.

        Raises:
            NotFoundError: unknown or another tenant's.
            PermissionDeniedError: a pool or an expert.
        """
        if ref in self._serving.models:
            raise PermissionDeniedError(f"{ref!r} is the operator's; it can only be taken out of the configuration")
        async with self._learning.changing:
            await self._learning.look()
            if "@" in ref:
                entries = [self._entry(tenant, ref)]
            else:
                versions = self._entries.names.get((tenant, ref))
                entries = [] if versions is None else list(versions.versions.values())
            if not entries:
                raise no_cocktail(ref)
            return await self._remove(tenant, entries)

    async def remove_failed(self, *, older_than_s: float) -> list[Cocktail]:
        """Deletes the versions that failed or were cancelled and have not been asked for since; the last snapshots."""
        before = self._clock() - older_than_s
        async with self._learning.changing:
            await self._learning.look()
            removed = []
            for entry in list(self._entries):
                is_over = entry.cocktail.status in ("failed", "cancelled") and entry.cocktail.uid not in self._unkept
                if is_over and entry.cocktail.used_at < before:
                    removed += await self._remove(entry.cocktail.tenant, [entry])
            return removed

    async def _admit(
        self,
        tenant: str,
        request: CocktailRequest,
        *,
        items: tuple[str, ...],
        warnings: tuple[str, ...],
        limits: Limits,
        key_id: str | None,
        beside: Beside | None,
    ) -> tuple[Cocktail, Admission, list[Cocktail]]:
        entry = self._entries.version(tenant, request)
        if entry is not None:
            again = entry.cocktail.status in ("failed", "cancelled")
            if again:
                self._check_jobs(tenant, limits)
            await self._ask_again(entry, warnings if again else None, beside)
            return self._entries.snapshot(entry), "again" if again else "existing", []
        self._check_jobs(tenant, limits)
        # inline ones make room for each other, where there is room for any
        check_cocktails(0 if request.options.inline else self._count(tenant), limits)
        now = self._clock()
        pool = self._serving.pools[request.options.pool]
        cocktail = Cocktail(
            uid=uuid.uuid4().hex,
            tenant=tenant,
            name=request.options.name,
            pool_id=pool.id,
            kind=pool.kind,
            digest=request.digest,
            request=request.options,
            created_at=now,
            used_at=now,
            sequence=0,  # the store numbers it
            warnings=warnings,
            owner=self.owner,
            epoch=1,
            key_id=key_id,
        )
        gone = await self._make_room(tenant, limits.cocktails) if cocktail.inline else []
        cocktail = await self._store.add(
            cocktail,
            request.examples,
            items,
            validation=request.validation,
            max_example_bytes=limits.example_bytes,
            beside=beside,
        )
        return self._entries.snapshot(self._entries.insert(cocktail)), "new", gone

    def _pinnable(self, tenant: str, name: str, ref: str | None) -> tuple[Name, Entry | None]:
        versions = self._entries.names.get((tenant, name))
        if versions is None or "@" in name or name in self._serving.pools:
            raise no_cocktail(name)
        if ref is None:
            return versions, None
        entry = versions.versions.get(ref.removeprefix(f"{name}@"))
        if entry is None or entry.cocktail.id != ref:
            raise NotFoundError(
                f"{name!r} has no version {ref!r}; give an id of the form {name}@digest8, or null",
                param="current",
                code="cocktail_not_found",
            )
        if entry.cocktail.status != "ready":
            raise ConflictError(
                f"{ref!r} is {entry.cocktail.status}; only a ready version can be current", param="current"
            )
        return versions, entry

    async def _apply(
        self,
        entry: Entry,
        beside: Beside | None = None,
        *,
        before: Cocktail | None = None,
        newest: bool = False,
        **changes: Any,
    ) -> None:
        cocktail = replace(entry.cocktail, **changes)
        cocktail = await self._store.update(cocktail, before=before or entry.cocktail, beside=beside, newest=newest)
        self._unkept.pop(cocktail.uid, None)
        self._entries.show(entry, cocktail)

    async def _ask_again(self, entry: Entry, warnings: tuple[str, ...] | None, beside: Beside | None = None) -> None:
        """Makes a version the newest of its name; with warnings, queues it anew."""
        if entry.cocktail.inline:
            self._entries.note_use(entry, self._clock())
        of_name = self._entries.names[entry.cocktail.tenant, entry.cocktail.name].versions.values()
        newest = entry.cocktail.sequence < max(other.cocktail.sequence for other in of_name)
        changes: dict[str, Any] = {}
        if warnings is not None:
            changes |= {"status": "queued", "progress": 0.0, "error": None, "losses": {}, "warnings": warnings}
            changes |= {"merging_weights": None, "entropy": None, "recipe": None, "candidates": ()}
            changes |= {"mixed_loss": None, "validation_loss": None, "findings": None}
            changes |= {"owner": self.owner, "epoch": entry.cocktail.epoch + 1, "used_at": self._clock()}
        if newest or changes or beside is not None:
            await self._apply(entry, beside, newest=newest, **changes)

    async def _remove(self, tenant: str, entries: list[Entry]) -> list[Cocktail]:
        await self._store.delete(tenant, [entry.cocktail.uid for entry in entries])
        return [self._entries.drop(entry) for entry in entries]

    async def _make_room(self, tenant: str, most: int | None) -> list[Cocktail]:
        """Inline cocktails go, least recently used first; one whose job runs has a caller waiting and stays.

        Args:
            most: how many the tenant may have: beyond them its own go, before anybody else's.
        """
        own = [entry for entry in self._entries.inline.values() if entry.cocktail.tenant == tenant]
        surplus = 0 if most is None else max(len(own) + 1 - most, 0)
        going = [entry for entry in own if entry.cocktail.is_final][:surplus]
        surplus = max(len(self._entries.inline) - len(going) + 1 - self._max_inline, 0)
        others = (entry for entry in self._entries.inline.values() if entry.cocktail.is_final and entry not in going)
        going += itertools.islice(others, surplus)
        gone: list[Cocktail] = []
        for entry in going:
            gone += await self._remove(entry.cocktail.tenant, [entry])
        return gone

    @asynccontextmanager
    async def dry_run(self, tenant: str, limits: Limits) -> AsyncIterator[None]:
        """Counts as one of the tenant's jobs while the block runs.

        Raises:
            RateLimitError: as many of them as may be have not ended.
        """
        async with self._learning.changing:
            self._check_jobs(tenant, limits)
            self._dry_runs[tenant] += 1
        try:
            yield
        finally:
            self._dry_runs[tenant] -= 1
            if not self._dry_runs[tenant]:
                del self._dry_runs[tenant]

    def _check_jobs(self, tenant: str, limits: Limits) -> None:
        if limits.scoring_jobs is None:
            return
        running = sum(entry.cocktail.tenant == tenant and not entry.cocktail.is_final for entry in self._entries)
        check_jobs(running + self._dry_runs[tenant], limits)

    def _count(self, tenant: str) -> int:
        """Versions of a tenant, inline ones left out, whatever their state."""
        return sum(entry.cocktail.tenant == tenant and not entry.cocktail.inline for entry in self._entries)
