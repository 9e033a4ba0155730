"""Changing which cocktails exist: in the store first, then in memory, beside other gateways that change them too."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import islice
from typing import Literal, TypeVar, Unpack

from cocktail_serve.cocktails.catalog import Catalog
from cocktail_serve.cocktails.cocktail import Cocktail, CocktailChanges, CrossValidation, Failure
from cocktail_serve.cocktails.entries import Entry, sequence_of
from cocktail_serve.cocktails.options import CocktailRequest
from cocktail_serve.cocktails.pacing import paced
from cocktail_serve.cocktails.quotas import check_cocktails, check_jobs
from cocktail_serve.cocktails.store import ExtraWrites, RemoteChanges, StaleError, Store
from cocktail_serve.config import Limits
from cocktail_serve.errors import ConflictError, NotFoundError, PermissionDeniedError
from cocktail_serve.tenants.limits import UNLIMITED
from cocktail_serve.usage.actor import SERVER, Actor

CreateOutcome = Literal["new", "again", "existing"]
"""A version that was not there; one that failed or was cancelled and is queued again; one that is there."""

OnChange = Callable[[Sequence[Cocktail], Sequence[Cocktail]], None]
"""Told of cocktails that other gateways changed, and of those that are gone, whoever removed them (unfinished ones as
cancelled)."""

_T = TypeVar("_T")


class Registry:
    """The catalog and the store it is read from, which change together: durable before it shows.

    Other gateways may change the same store: `sync` brings what they did into memory, and a change that goes back to
    something older than the store holds is decided again.

    Args:
        max_inline: inline cocktails kept over all tenants; the least recently used go first.

    Attributes:
        catalog: what the store holds, as far as known here.
        on_change: called in the moment in which the catalog has changed.
    """

    def __init__(self, catalog: Catalog, store: Store, *, max_inline: int, on_change: OnChange | None = None) -> None:
        self.catalog = catalog
        self._store = store
        self._max_inline = max_inline
        self._changing = asyncio.Lock()
        self._last_change = 0
        self._num_syncs = 0
        self._unsaved: dict[str, Cocktail] = {}
        self._dry_runs: Counter[str] = Counter()
        self._owner: str | None = None
        self._on_change = on_change or _ignored

    def join_as(self, gateway: str) -> None:
        """Jobs that begin here are this gateway's from now on, by the id that `GatewayHeartbeats` gave it."""
        self._owner = gateway

    async def load(self) -> None:
        """Reads the store into memory."""
        async with self._changing:
            await self._apply_changes(await self._store.load())
            self.catalog.order_inline()

    async def sync(self) -> None:
        """Brings what other gateways changed before this call into memory.

        Raises:
            StorageError: the store cannot be asked.
        """
        before = self._num_syncs
        async with self._changing:
            # one look serves all who came before it
            if self._num_syncs == before:
                await self._sync()

    async def flush(self) -> None:
        """Writes what the hot path only noted, when inline cocktails were last used, and ends not kept so far."""
        if self.catalog.used:
            noted, self.catalog.used = self.catalog.used, {}
            await self._store.touch(noted)
        async with self._changing:
            for uid, before in list(self._unsaved.items()):
                entry = self.catalog.entry(uid)
                try:
                    if entry is not None and entry.cocktail.change == before.change:
                        await self._apply(entry, before=before)
                except StaleError:
                    await self._sync()
                self._unsaved.pop(uid, None)

    async def find_or_add(
        self,
        tenant: str,
        request: CocktailRequest,
        *,
        score_items: tuple[str, ...],
        warnings: tuple[str, ...],
        limits: Limits = UNLIMITED,
        actor: Actor = SERVER,
        extra_writes: ExtraWrites | None = None,
    ) -> tuple[Cocktail, CreateOutcome]:
        """Finds the version that a request names, or adds it as queued.

        A version asked for again is the newest again, so it becomes current once ready; a pin stands.

        Args:
            score_items: what its scores will be kept for.
            limits: of the tenant; what is counted and what is added are one step.
            actor: who asks.
            extra_writes: writes rows of its own in the transaction that this is done in.

        Returns:
            A snapshot, and how it was found.

        Raises:
            ConflictError: another request of the same name has the same first eight digits of its digest.
            QuotaExceededError: the tenant keeps as many cocktails, or bytes of examples, as it may.
            RateLimitError: as many of its jobs as may be have not ended.
        """

        async def decide() -> tuple[Cocktail, CreateOutcome]:
            entry = self.catalog.find_version(tenant, request)
            if entry is not None:
                again = entry.cocktail.status in ("failed", "cancelled")
                if again:
                    self._check_jobs(tenant, limits)
                await self._ask_again(entry, warnings if again else None, extra_writes)
                return entry.cocktail, "again" if again else "existing"
            self._check_jobs(tenant, limits)
            # inline ones make room for each other, where there is room for any
            num_kept = 0 if request.options.inline else self.catalog.of_tenant(tenant).num_listed
            check_cocktails(num_kept, limits)
            if request.options.inline:
                await self._make_room(tenant, limits.cocktails, actor)
            queued = self._queued(tenant, request, warnings=warnings, key_id=actor.key_id)
            cocktail = await self._store.add(
                queued,
                request.examples,
                score_items,
                actor=actor,
                validation=request.validation,
                max_example_bytes=limits.example_bytes,
                extra_writes=extra_writes,
            )
            entry = self.catalog.insert(cocktail)
            return entry.cocktail, "new"  # as the catalog shows it: `current` is settled there

        async with self._changing:
            await self._sync()
            return await self._until_not_stale(decide)

    async def update(
        self, uid: str, *, of_epoch: int | None = None, **changes: Unpack[CocktailChanges]
    ) -> Cocktail | None:
        """Changes a version, in the store first.

        Args:
            of_epoch: of the job that asks: one that was given to another gateway since changes nothing.

        Returns:
            The snapshot, or None where it has been deleted, is final, or is no longer the job's.
        """

        async def decide() -> Cocktail | None:
            entry = self.catalog.entry(uid)
            if entry is None or entry.cocktail.is_final or of_epoch not in (None, entry.cocktail.epoch):
                return None
            await self._apply(entry, **changes)
            return entry.cocktail

        async with self._changing:
            return await self._until_not_stale(decide)

    async def claim(self, uid: str) -> Cocktail | None:
        """Gives an unfinished cocktail to this gateway, in a new epoch; None: another was first, or it has ended."""
        async with self._changing:
            entry = self.catalog.entry(uid)
            if entry is None or entry.cocktail.is_final:
                return None
            try:
                await self._apply(entry, owner=self._owner, epoch=entry.cocktail.epoch + 1)
                return entry.cocktail
            except StaleError:
                await self._sync()
                return None

    async def keep_cross_validation(self, uid: str, found: CrossValidation) -> Cocktail | None:
        """Writes down what was found out about a ready version. Returns the snapshot, or None where it is gone."""

        async def decide() -> Cocktail | None:
            entry = self.catalog.entry(uid)
            if entry is None or entry.cocktail.status != "ready":
                return None
            kept = await self._store.keep_cross_validation(replace(entry.cocktail, cross_validation=found))
            self.catalog.update(entry, kept)
            return entry.cocktail

        async with self._changing:
            return await self._until_not_stale(decide)

    def fail_in_memory(self, uid: str, failure: Failure) -> None:
        """Ends a version whose end the store refused to take. `flush` tries again; after a restart its job goes on."""
        entry = self.catalog.entry(uid)
        if entry is not None and not entry.cocktail.is_final:
            self._unsaved[uid] = entry.cocktail
            self.catalog.update(entry, replace(entry.cocktail, status="failed", error=failure))

    async def pin(self, tenant: str, name: str, ref: str | None, *, actor: Actor = SERVER) -> Cocktail:
        """Makes a ready version current whatever becomes ready later; None removes the pin.

        Raises:
            NotFoundError: no such name, or no such version of it.
            ConflictError: the version is not ready.
        """

        async def decide() -> Cocktail:
            entry = self._pinnable(tenant, name, ref)
            await self._store.pin(tenant, name, None if entry is None else entry.cocktail.uid, actor=actor)
            self.catalog.pin(tenant, name, entry)
            return self.catalog.get(tenant, name)

        async with self._changing:
            await self._sync()
            return await self._until_not_stale(decide)

    async def remove(self, tenant: str, ref: str, *, actor: Actor = SERVER) -> list[Cocktail]:
        """Deletes a version, or all versions of a name. From then on they are unknown.

        Returns:
            The last snapshots; those unfinished as cancelled.

        Raises:
            NotFoundError: unknown or another tenant's.
            PermissionDeniedError: a pool or an expert.
        """
        if ref in self.catalog.pool_models.by_id:
            raise PermissionDeniedError(f"{ref!r} is the operator's; it can only be taken out of the configuration")
        async with self._changing:
            await self._sync()
            if "@" in ref:
                entry = self.catalog.find_entry(tenant, ref)
                entries = [] if entry is None else [entry]
            else:
                versions = self.catalog.versions(tenant, ref)
                entries = [] if versions is None else list(versions.by_digest8.values())
            if not entries:
                raise self.catalog.no_cocktail(tenant, ref)
            return await self._remove(tenant, entries, actor)

    async def remove_failed(self, *, older_than_s: float) -> None:
        """Deletes the versions that failed or were cancelled and have not been asked for since."""
        before = self.catalog.now() - older_than_s
        async with self._changing:
            await self._sync()
            async for entry in paced(self.catalog.in_state("failed", "cancelled"), every=500):
                if entry.cocktail.used_at < before and entry.cocktail.uid not in self._unsaved:
                    await self._remove(entry.cocktail.tenant, [entry], SERVER)

    @asynccontextmanager
    async def dry_run(self, tenant: str, limits: Limits) -> AsyncIterator[None]:
        """Counts as one of the tenant's jobs while the block runs.

        Raises:
            RateLimitError: as many of them as may be have not ended.
        """
        async with self._changing:
            self._check_jobs(tenant, limits)
            self._dry_runs[tenant] += 1
        try:
            yield
        finally:
            self._dry_runs[tenant] -= 1
            if not self._dry_runs[tenant]:
                del self._dry_runs[tenant]

    async def _until_not_stale(self, decide: Callable[[], Awaitable[_T]]) -> _T:
        """The outcome of a change, decided again for as long as it goes back to something older than the store holds.

        Called by who holds `_changing`, as `_sync`.
        """
        while True:
            try:
                return await decide()
            except StaleError:
                await self._sync()

    async def _sync(self) -> None:
        self._num_syncs += 1
        changes = await self._store.changes_since(self._last_change)
        if changes is not None:
            await self._apply_changes(changes)

    async def _apply_changes(self, changes: RemoteChanges) -> None:
        """Brings what changed in the store into memory name by name, each as it was at one moment."""
        removed = set(changes.removed)
        if changes.is_all:
            removed = self.catalog.uids() - {cocktail.uid for cocktail in changes.cocktails}
        changes_by_name: defaultdict[tuple[str, str], tuple[list[Entry], list[Cocktail]]] = defaultdict(
            lambda: ([], [])
        )
        for entry in map(self.catalog.entry, removed):
            if entry is not None:
                changes_by_name[entry.cocktail.tenant, entry.cocktail.name][0].append(entry)
        for stored in changes.cocktails:
            if stored.uid not in removed:
                changes_by_name[stored.tenant, stored.name][1].append(stored)
        async for (tenant, name), (entries, cocktails) in paced(changes_by_name.items()):
            dropped = [self.catalog.drop(entry) for entry in entries]
            # the newest first: what the name means is settled with it
            changed = [cocktail for cocktail in map(self._take_in, reversed(cocktails)) if cocktail is not None]
            if cocktails:
                self.catalog.pin(tenant, name, self.catalog.entry(changes.pins.get((tenant, name), "")))
            # before the loop goes on to others: a caller who leaves meanwhile takes no change with it
            self._on_change(changed, dropped)
        self._last_change = changes.last

    def _take_in(self, stored: Cocktail) -> Cocktail | None:
        """Puts a cocktail of the store into the catalog, as that shows it; None: what the catalog has is as new."""
        entry = self.catalog.entry(stored.uid)
        if entry is not None and entry.cocktail.change >= stored.change:
            return None
        cocktail = self.catalog.pool_models.as_configured(stored)
        if entry is None:
            self.catalog.insert(cocktail)
        else:
            self.catalog.update(entry, cocktail)
        return cocktail

    def _queued(
        self, tenant: str, request: CocktailRequest, *, warnings: tuple[str, ...], key_id: str | None
    ) -> Cocktail:
        """A new version, which the store will number."""
        now = self.catalog.now()
        pool = self.catalog.pools[request.options.pool]
        return Cocktail(
            uid=uuid.uuid4().hex,
            tenant=tenant,
            name=request.options.name,
            pool_id=pool.id,
            kind=pool.kind,
            digest=request.digest,
            options=request.options,
            created_at=now,
            used_at=now,
            sequence=0,
            warnings=warnings,
            owner=self._owner,
            epoch=1,
            key_id=key_id,
        )

    def _pinnable(self, tenant: str, name: str, ref: str | None) -> Entry | None:
        versions = self.catalog.versions(tenant, name)
        if versions is None or "@" in name or name in self.catalog.pools:
            raise self.catalog.no_cocktail(tenant, name)
        if ref is None:
            return None
        entry = versions.by_digest8.get(ref.removeprefix(f"{name}@"))
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
        return entry

    async def _apply(
        self,
        entry: Entry,
        extra_writes: ExtraWrites | None = None,
        *,
        before: Cocktail | None = None,
        newest: bool = False,
        **changes: Unpack[CocktailChanges],
    ) -> None:
        cocktail = replace(entry.cocktail, **changes)
        cocktail = await self._store.update(
            cocktail, before=before or entry.cocktail, extra_writes=extra_writes, newest=newest
        )
        self._unsaved.pop(cocktail.uid, None)
        self.catalog.update(entry, cocktail)

    async def _ask_again(
        self, entry: Entry, warnings: tuple[str, ...] | None, extra_writes: ExtraWrites | None = None
    ) -> None:
        """Makes a version the newest of its name; with warnings, queues it anew."""
        if entry.cocktail.inline:
            self.catalog.note_use(entry)
        versions = self.catalog.versions(entry.cocktail.tenant, entry.cocktail.name)
        assert versions is not None
        newest = entry is not max(versions.by_digest8.values(), key=sequence_of)
        changes: CocktailChanges = {}
        if warnings is not None:
            changes |= {"status": "queued", "progress": 0.0, "error": None, "losses": {}, "warnings": warnings}
            changes |= {"merging_weights": None, "entropy": None, "recipe": None, "candidates": ()}
            changes |= {"mixed_loss": None, "validation_loss": None, "cross_validation": None}
            changes |= {"owner": self._owner, "epoch": entry.cocktail.epoch + 1, "used_at": self.catalog.now()}
        if newest or changes or extra_writes is not None:
            await self._apply(entry, extra_writes, newest=newest, **changes)

    async def _remove(self, tenant: str, entries: list[Entry], actor: Actor) -> list[Cocktail]:
        await self._store.delete(tenant, [entry.cocktail.uid for entry in entries], actor=actor)
        dropped = [self.catalog.drop(entry) for entry in entries]
        self._on_change((), dropped)
        return dropped

    async def _make_room(self, tenant: str, most: int | None, actor: Actor) -> None:
        """Inline cocktails go, least recently used first; one whose job runs has a caller waiting and stays.

        Args:
            most: how many the tenant may have: beyond them its own go, before anybody else's.
        """
        own = self.catalog.of_tenant(tenant).inline
        surplus = 0 if most is None else max(len(own) + 1 - most, 0)
        going = dict(islice(((uid, entry) for uid, entry in own.items() if entry.cocktail.is_final), surplus))
        surplus = max(len(self.catalog.inline) - len(going) + 1 - self._max_inline, 0)
        others = (
            (uid, entry) for uid, entry in self.catalog.inline.items() if entry.cocktail.is_final and uid not in going
        )
        going |= islice(others, surplus)
        for entry in going.values():
            await self._remove(entry.cocktail.tenant, [entry], actor)

    def _check_jobs(self, tenant: str, limits: Limits) -> None:
        check_jobs(self.catalog.of_tenant(tenant).num_unfinished + self._dry_runs[tenant], limits)


def _ignored(changed: Sequence[Cocktail], removed: Sequence[Cocktail]) -> None:
    """Nobody asked to be told."""
