"""Which cocktails exist, whose, and what each model id means: found in memory, changed in the store first."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cocktail_serve.cocktails.cocktail import (
    DIGEST8,
    Cocktail,
    Failure,
    Findings,
    ModelEntry,
    Served,
    Status,
    version_id,
)
from cocktail_serve.cocktails.quotas import check_cocktails, check_jobs
from cocktail_serve.cocktails.request import CocktailRequest
from cocktail_serve.cocktails.store import Beside, News, StaleError, Store
from cocktail_serve.config import Limits
from cocktail_serve.errors import (
    CocktailError,
    ConflictError,
    ModelNotReadyError,
    NotFoundError,
    PermissionDeniedError,
)
from cocktail_serve.pool import BASE, Member, Pool
from cocktail_serve.recipe import DType, one_hot
from cocktail_serve.tenants.limits import UNLIMITED

Admission = Literal["new", "again", "existing"]
"""A version that was not there; one that failed or was cancelled and is queued again; one that is there."""


Heed = Callable[[list[Cocktail], list[Cocktail]], None]
"""Told of cocktails that others changed, and of those that they removed (unfinished ones as cancelled)."""


@dataclass(slots=True)
class _Entry:
    """One version in memory. `cocktail.current` is left False here and filled in when a snapshot is taken."""

    cocktail: Cocktail
    served: Served | None = None
    final: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Name:
    """The versions of a tenant's name, by digest8."""

    versions: dict[str, _Entry] = field(default_factory=dict)
    pinned: _Entry | None = None
    current: _Entry | None = None

    def settle_current(self) -> None:
        """The pinned version, else the newest ready one; a queued or failed version never moves it."""
        ready = [
            entry for entry in self.versions.values() if entry.cocktail.status == "ready" and not entry.cocktail.inline
        ]
        self.current = self.pinned or max(ready, key=lambda entry: entry.cocktail.sequence, default=None)


class Registry:
    """All cocktails of all tenants. Reading is synchronous and from memory; changing is durable before it shows.

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
        self._store = store
        self._pools = pools
        self._dtypes = dtypes
        self._max_inline = max_inline
        self._clock = clock
        self._started_at = int(clock())
        self._changing = asyncio.Lock()
        self._by_uid: dict[str, _Entry] = {}
        self._names: dict[tuple[str, str], _Name] = {}
        self._inline: OrderedDict[str, _Entry] = OrderedDict()
        self._used: dict[str, float] = {}
        self._unkept: dict[str, Cocktail] = {}
        self._dry_runs: Counter[str] = Counter()
        self._seen = 0
        self._num_looks = 0
        self._heed: Heed = lambda changed, removed: None
        self.owner: str | None = None
        self._pool_models = {
            served.model_id: served for pool in pools.values() for served in _pool_models(pool, dtypes[pool.id])
        }

    async def load(self) -> None:
        """Reads the store into memory."""
        async with self._changing:
            self._take_in(await self._store.load())
            for uid, _ in sorted(self._inline.items(), key=lambda item: item[1].cocktail.used_at):
                self._inline.move_to_end(uid)

    def listen(self, heed: Heed) -> None:
        """Has a function called, at once, with the cocktails that other gateways changed and those they removed."""
        self._heed = heed

    async def learn(self) -> None:
        """Brings what other gateways changed before this call into memory."""
        before = self._num_looks
        async with self._changing:
            # one look serves all who came before it
            if self._num_looks == before:
                await self._look()

    async def flush(self) -> None:
        """Writes what the hot path only noted, when inline cocktails were last used, and ends not kept so far."""
        if self._used:
            noted, self._used = self._used, {}
            await self._store.touch(noted)
        async with self._changing:
            for uid, before in list(self._unkept.items()):
                entry = self._by_uid.get(uid)
                try:
                    if entry is not None and entry.cocktail.change == before.change:
                        await self._apply(entry, before=before)
                except StaleError:
                    await self._look()
                self._unkept.pop(uid, None)

    def resolve(self, tenant: str, model_id: str) -> Served:
        """The parameters a model id means now: the hot path, without a single await.

        Raises:
            NotFoundError: unknown, another tenant's, failed, or made of models its pool no longer has.
            ModelNotReadyError: its job has not ended.
        """
        served = self._pool_models.get(model_id)
        if served is not None:
            return served
        entry = self._find(tenant, model_id)
        if entry is None:
            raise no_model(model_id)
        if entry.served is None:
            raise self.why_not_served(entry.cocktail)
        if entry.cocktail.inline:
            self._note_use(entry)
        return entry.served

    def get(self, tenant: str, ref: str) -> Cocktail:
        """A snapshot by id; by name, of the current version, or of the newest where none is ready yet.

        Raises:
            NotFoundError: unknown or another tenant's.
        """
        return self._snapshot(self._entry(tenant, ref))

    def of_tenant(self, tenant: str, name: str | None = None) -> list[Cocktail]:
        """The tenant's cocktails, inline ones left out, the newest first; of one name if given."""
        found = [
            self._snapshot(entry)
            for (owner, of_name), versions in self._names.items()
            if owner == tenant and name in (None, of_name)
            for entry in versions.versions.values()
            if not entry.cocktail.inline
        ]
        return sorted(found, key=lambda cocktail: (-cocktail.created_at, -cocktail.sequence))

    def models(self, tenant: str) -> list[ModelEntry]:
        """Pools, experts, the tenant's names that have a current version, and its ready versions, sorted by id."""
        entries = [
            ModelEntry(id=model_id, created=self._started_at, kind=served.pool.kind, pool=served.pool.id)
            for model_id, served in self._pool_models.items()
        ]
        for (owner, name), versions in self._names.items():
            if owner != tenant:
                continue
            ready = [entry for entry in versions.versions.values() if entry.served and not entry.cocktail.inline]
            entries.extend(_model_entry(entry.cocktail.id, entry.cocktail) for entry in ready)
            if versions.current is not None and versions.current.served and name not in self._pools:
                entries.append(_model_entry(name, versions.current.cocktail))
        return sorted(entries, key=lambda entry: entry.id)

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
        async with self._changing:
            await self._look()
            while True:
                try:
                    return await self._admit(
                        tenant,
                        request,
                        items=items,
                        warnings=warnings,
                        limits=limits,
                        key_id=key_id,
                        beside=beside,
                    )
                except StaleError:
                    await self._look()

    async def update(self, uid: str, *, epoch: int | None = None, **changes: Any) -> Cocktail | None:
        """Changes a version, in the store first.

        Args:
            epoch: of the job that asks: one that was given to another gateway since changes nothing.

        Returns:
            The snapshot, or None where it has been deleted, is final, or is no longer the job's.
        """
        async with self._changing:
            while True:
                entry = self._by_uid.get(uid)
                if entry is None or entry.cocktail.is_final or epoch not in (None, entry.cocktail.epoch):
                    return None
                try:
                    await self._apply(entry, **changes)
                    return self._snapshot(entry)
                except StaleError:
                    await self._look()

    async def claim(self, uid: str) -> Cocktail | None:
        """Gives an unfinished cocktail to this gateway, in a new epoch; None: another was first, or it has ended."""
        async with self._changing:
            entry = self._by_uid.get(uid)
            if entry is None or entry.cocktail.is_final:
                return None
            try:
                await self._apply(entry, owner=self.owner, epoch=entry.cocktail.epoch + 1)
                return self._snapshot(entry)
            except StaleError:
                await self._look()
                return None

    async def keep_findings(self, uid: str, findings: Findings) -> Cocktail | None:
        """Writes down what was found out about a ready version. Returns the snapshot, or None where it is gone."""
        async with self._changing:
            while True:
                entry = self._by_uid.get(uid)
                if entry is None or entry.cocktail.status != "ready":
                    return None
                try:
                    # no witness need hear of it: what the cocktail is stays as it was
                    self._show(entry, await self._store.update(replace(entry.cocktail, findings=findings)))
                    return self._snapshot(entry)
                except StaleError:
                    await self._look()

    def unreported(self) -> list[Cocktail]:
        """Ready versions whose findings are pending."""
        return [
            entry.cocktail
            for entry in self._by_uid.values()
            if entry.cocktail.findings is not None and entry.cocktail.findings.status == "pending"
        ]

    def fail_in_memory(self, uid: str, failure: Failure) -> None:
        """Ends a version whose end the store refused to take. `flush` tries again; after a restart its job goes on."""
        entry = self._by_uid.get(uid)
        if entry is not None and not entry.cocktail.is_final:
            self._unkept[uid] = entry.cocktail
            self._show(entry, replace(entry.cocktail, status="failed", error=failure))

    async def pin(self, tenant: str, name: str, ref: str | None) -> Cocktail:
        """Makes a ready version current whatever becomes ready later; None removes the pin.

        Raises:
            NotFoundError: no such name, or no such version of it.
            ConflictError: the version is not ready.
        """
        async with self._changing:
            await self._look()
            while True:
                versions, entry = self._pinnable(tenant, name, ref)
                try:
                    await self._store.pin(tenant, name, None if entry is None else entry.cocktail.uid)
                except StaleError:
                    await self._look()
                    continue
                versions.pinned = entry
                versions.settle_current()
                return self._snapshot(self._entry(tenant, name))

    async def remove(self, tenant: str, ref: str) -> list[Cocktail]:
        """Deletes a version, or all versions of a name. From then on they are unknown.

        Returns:
            The last snapshots; those unfinished as cancelled.

        Raises:
            NotFoundError: unknown or another tenant's.
            PermissionDeniedError: a pool or an expert.
        """
        if ref in self._pool_models:
            raise PermissionDeniedError(f"{ref!r} is the operator's; it can only be taken out of the configuration")
        async with self._changing:
            await self._look()
            if "@" in ref:
                entries = [self._entry(tenant, ref)]
            else:
                versions = self._names.get((tenant, ref))
                entries = [] if versions is None else list(versions.versions.values())
            if not entries:
                raise _no_cocktail(ref)
            return await self._remove(tenant, entries)

    async def remove_failed(self, *, older_than_s: float) -> list[Cocktail]:
        """Deletes the versions that failed or were cancelled and have not been asked for since; the last snapshots."""
        before = self._clock() - older_than_s
        async with self._changing:
            await self._look()
            removed = []
            for entry in list(self._by_uid.values()):
                is_over = entry.cocktail.status in ("failed", "cancelled") and entry.cocktail.uid not in self._unkept
                if is_over and entry.cocktail.used_at < before:
                    removed += await self._remove(entry.cocktail.tenant, [entry])
            return removed

    def uses(self, pool_id: str, recipe_digest: str) -> bool:
        """Whether a model of a pool, or a cocktail of any tenant, is this recipe."""
        return any(
            served.recipe.digest == recipe_digest and served.pool.id == pool_id for served in self._pool_models.values()
        ) or any(
            entry.cocktail.pool_id == pool_id
            and entry.cocktail.recipe is not None
            and entry.cocktail.recipe.digest == recipe_digest
            for entry in self._by_uid.values()
        )

    def change_pool(self, pool: Pool) -> None:
        """Takes experts in or out of the model list; cocktails made of those that are gone are no longer served."""
        self._pool_models = {
            **{model_id: served for model_id, served in self._pool_models.items() if served.pool.id != pool.id},
            **{served.model_id: served for served in _pool_models(pool, self._dtypes[pool.id])},
        }
        for entry in self._by_uid.values():
            if entry.cocktail.pool_id == pool.id:
                entry.served = self.serve(entry.cocktail)

    def made_of(self, pool_id: str, member: Member) -> list[Cocktail]:
        """Cocktails of all tenants that a model of a pool is in, or may be in once their jobs end."""
        return [
            self._snapshot(entry)
            for entry in self._by_uid.values()
            if entry.cocktail.pool_id == pool_id and _may_hold(entry.cocktail, member)
        ]

    def named(self, pool_id: str, recipe_digests: Collection[str]) -> dict[str, list[tuple[str | None, str]]]:
        """Tenant (None: a model of the pool itself) and model id of all that each recipe is served as."""
        found: dict[str, list[tuple[str | None, str]]] = {digest: [] for digest in recipe_digests}
        for served in self._pool_models.values():
            if served.pool.id == pool_id and served.recipe.digest in found:
                found[served.recipe.digest].append((None, served.model_id))
        for entry in self._by_uid.values():
            recipe = entry.cocktail.recipe
            if entry.cocktail.pool_id == pool_id and recipe is not None and recipe.digest in found:
                found[recipe.digest].append((entry.cocktail.tenant, entry.cocktail.id))
        return found

    async def until_final(self, uid: str, timeout_s: float) -> None:
        """Returns the moment a version is ready, failed, cancelled or deleted, or after `timeout_s`."""
        entry = self._by_uid.get(uid)
        if entry is None or entry.final.is_set():
            return
        try:
            async with asyncio.timeout(timeout_s):
                await entry.final.wait()
        except TimeoutError:
            return

    def version(self, tenant: str, request: CocktailRequest) -> Cocktail | None:
        """The version that a request names, or None.

        Raises:
            ConflictError: as `admit`.
        """
        entry = self._version(tenant, request)
        return None if entry is None else self._snapshot(entry)

    def statuses(self) -> Counter[Status]:
        """How many cocktails of all tenants, inline ones included, are in each state."""
        return Counter(entry.cocktail.status for entry in self._by_uid.values())

    def now(self) -> float:
        """Seconds since the epoch, as all of its moments are."""
        return self._clock()

    def by_uid(self, uid: str) -> Cocktail | None:
        """A snapshot by uid, or None where it has been deleted."""
        entry = self._by_uid.get(uid)
        return None if entry is None else self._snapshot(entry)

    def unfinished(self) -> list[Cocktail]:
        """Snapshots of the cocktails whose jobs have not ended, whoever's they are."""
        return [entry.cocktail for entry in self._by_uid.values() if not entry.cocktail.is_final]

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
        entry = self._version(tenant, request)
        if entry is not None:
            again = entry.cocktail.status in ("failed", "cancelled")
            if again:
                self._check_jobs(tenant, limits)
            await self._ask_again(entry, warnings if again else None, beside)
            return self._snapshot(entry), "again" if again else "existing", []
        self._check_jobs(tenant, limits)
        # inline ones make room for each other, where there is room for any
        check_cocktails(0 if request.options.inline else self._count(tenant), limits)
        now = self._clock()
        pool = self._pools[request.options.pool]
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
        return self._snapshot(self._insert(cocktail)), "new", gone

    def _pinnable(self, tenant: str, name: str, ref: str | None) -> tuple[_Name, _Entry | None]:
        versions = self._names.get((tenant, name))
        if versions is None or "@" in name or name in self._pools:
            raise _no_cocktail(name)
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

    async def _look(self) -> None:
        """Brings the news of the store into memory. Called while nothing else changes either."""
        self._num_looks += 1
        news = await self._store.news(self._seen)
        if news is not None:
            changed, removed = self._take_in(news)
            self._heed(changed, removed)

    def _take_in(self, news: News) -> tuple[list[Cocktail], list[Cocktail]]:
        removed = set(news.removed)
        if news.is_all:
            removed = self._by_uid.keys() - {cocktail.uid for cocktail in news.cocktails}
        gone = [self._drop(entry) for entry in map(self._by_uid.get, removed) if entry is not None]
        changed = []
        for stored in news.cocktails:
            entry = self._by_uid.get(stored.uid)
            if stored.uid in removed or (entry is not None and entry.cocktail.change >= stored.change):
                continue
            cocktail = self._adopt(stored)
            if entry is None:
                self._insert(cocktail)
            else:
                self._show(entry, cocktail)
            changed.append(cocktail)
        for key in {(cocktail.tenant, cocktail.name) for cocktail in news.cocktails}:
            versions = self._names.get(key)
            if versions is not None:
                versions.pinned = self._by_uid.get(news.pins.get(key, ""))
                versions.settle_current()
        self._seen = news.last
        return changed, gone

    def _entry(self, tenant: str, ref: str) -> _Entry:
        entry = self._find(tenant, ref)
        if entry is None:
            raise _no_cocktail(ref)
        return entry

    def _find(self, tenant: str, ref: str) -> _Entry | None:
        name, at, digest8 = ref.partition("@")
        versions = self._names.get((tenant, name))
        if versions is None:
            return None
        if at:
            return versions.versions.get(digest8)
        if name in self._pools:
            return None
        if versions.current is not None:
            return versions.current
        named = [entry for entry in versions.versions.values() if not entry.cocktail.inline]
        return max(named, key=lambda entry: entry.cocktail.sequence, default=None)

    def _version(self, tenant: str, request: CocktailRequest) -> _Entry | None:
        versions = self._names.get((tenant, request.options.name))
        digest = request.digest
        entry = None if versions is None else versions.versions.get(digest[:DIGEST8])
        if entry is not None and entry.cocktail.digest != digest:
            raise ConflictError(
                f"another version has the id {version_id(request.options.name, digest)!r}: two digests begin alike; "
                "change 'seed' to get another id",
                param="seed",
            )
        return entry

    def _insert(self, cocktail: Cocktail) -> _Entry:
        entry = _Entry(cocktail)
        self._by_uid[cocktail.uid] = entry
        self._names.setdefault((cocktail.tenant, cocktail.name), _Name()).versions[cocktail.digest[:DIGEST8]] = entry
        if cocktail.inline:
            self._inline[cocktail.uid] = entry
        self._show(entry, cocktail)
        return entry

    async def _apply(
        self,
        entry: _Entry,
        beside: Beside | None = None,
        *,
        before: Cocktail | None = None,
        newest: bool = False,
        **changes: Any,
    ) -> None:
        cocktail = replace(entry.cocktail, **changes)
        cocktail = await self._store.update(cocktail, before=before or entry.cocktail, beside=beside, newest=newest)
        self._unkept.pop(cocktail.uid, None)
        self._show(entry, cocktail)

    def _show(self, entry: _Entry, cocktail: Cocktail) -> None:
        entry.cocktail = cocktail
        entry.served = self.serve(cocktail)
        if cocktail.is_final:
            entry.final.set()
        else:
            entry.final.clear()
        self._names[cocktail.tenant, cocktail.name].settle_current()

    async def _ask_again(self, entry: _Entry, warnings: tuple[str, ...] | None, beside: Beside | None = None) -> None:
        """Makes a version the newest of its name; with warnings, queues it anew."""
        if entry.cocktail.inline:
            self._note_use(entry)
        of_name = self._names[entry.cocktail.tenant, entry.cocktail.name].versions.values()
        newest = entry.cocktail.sequence < max(other.cocktail.sequence for other in of_name)
        changes: dict[str, Any] = {}
        if warnings is not None:
            changes |= {"status": "queued", "progress": 0.0, "error": None, "losses": {}, "warnings": warnings}
            changes |= {"merging_weights": None, "entropy": None, "recipe": None, "candidates": ()}
            changes |= {"mixed_loss": None, "validation_loss": None, "findings": None}
            changes |= {"owner": self.owner, "epoch": entry.cocktail.epoch + 1, "used_at": self._clock()}
        if newest or changes or beside is not None:
            await self._apply(entry, beside, newest=newest, **changes)

    async def _remove(self, tenant: str, entries: list[_Entry]) -> list[Cocktail]:
        await self._store.delete(tenant, [entry.cocktail.uid for entry in entries])
        return [self._drop(entry) for entry in entries]

    def _drop(self, entry: _Entry) -> Cocktail:
        """Forgets a version; its last snapshot, as cancelled if it was unfinished."""
        cocktail = self._snapshot(entry)
        key = (cocktail.tenant, cocktail.name)
        versions = self._names[key]
        del self._by_uid[cocktail.uid]
        if versions.versions.get(cocktail.digest[:DIGEST8]) is entry:
            del versions.versions[cocktail.digest[:DIGEST8]]
        self._inline.pop(cocktail.uid, None)
        self._used.pop(cocktail.uid, None)
        self._unkept.pop(cocktail.uid, None)
        if versions.pinned is entry:
            versions.pinned = None
        versions.settle_current()
        if not versions.versions:
            del self._names[key]
        entry.final.set()
        return cocktail if cocktail.is_final else replace(cocktail, status="cancelled")

    async def _make_room(self, tenant: str, most: int | None) -> list[Cocktail]:
        """Inline cocktails go, least recently used first; one whose job runs has a caller waiting and stays.

        Args:
            most: how many the tenant may have: beyond them its own go, before anybody else's.
        """
        own = [entry for entry in self._inline.values() if entry.cocktail.tenant == tenant]
        surplus = 0 if most is None else max(len(own) + 1 - most, 0)
        going = [entry for entry in own if entry.cocktail.is_final][:surplus]
        surplus = max(len(self._inline) - len(going) + 1 - self._max_inline, 0)
        others = (entry for entry in self._inline.values() if entry.cocktail.is_final and entry not in going)
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
        async with self._changing:
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
        running = sum(
            entry.cocktail.tenant == tenant and not entry.cocktail.is_final for entry in self._by_uid.values()
        )
        check_jobs(running + self._dry_runs[tenant], limits)

    def _count(self, tenant: str) -> int:
        """Versions of a tenant, inline ones left out, whatever their state."""
        return sum(entry.cocktail.tenant == tenant and not entry.cocktail.inline for entry in self._by_uid.values())

    def _note_use(self, entry: _Entry) -> None:
        uid = entry.cocktail.uid
        self._inline.move_to_end(uid)
        self._used[uid] = self._clock()

    def _snapshot(self, entry: _Entry) -> Cocktail:
        versions = self._names.get((entry.cocktail.tenant, entry.cocktail.name))
        is_current = versions is not None and versions.current is entry
        return replace(entry.cocktail, current=True) if is_current else entry.cocktail

    def serve(self, cocktail: Cocktail) -> Served | None:
        """What a snapshot is answered by; None unless it is ready and its pool still has its models."""
        pool = self._pools.get(cocktail.pool_id)
        if cocktail.status != "ready" or cocktail.recipe is None or pool is None:
            return None
        there = {member.fingerprint for member in pool}
        needed = {fingerprint for fingerprint, _ in cocktail.recipe.coefficients}
        if cocktail.recipe.base != pool.base.fingerprint or not needed <= there:
            return None
        return Served(model_id=cocktail.id, pool=pool, recipe=cocktail.recipe)

    def _adopt(self, cocktail: Cocktail) -> Cocktail:
        """A cocktail as this configuration serves it: the operator may have changed the engine's dtype."""
        dtype = self._dtypes.get(cocktail.pool_id)
        if dtype is None or cocktail.recipe is None or cocktail.recipe.dtype == dtype:
            return cocktail
        warning = f"made for {cocktail.recipe.dtype}; the engine runs {dtype} now, so the mixture rounds differently"
        return replace(cocktail, recipe=replace(cocktail.recipe, dtype=dtype), warnings=(*cocktail.warnings, warning))

    def why_not_served(self, cocktail: Cocktail) -> CocktailError:
        """The error for a cocktail that `serve` has nothing for."""
        if not cocktail.is_final:
            return ModelNotReadyError(
                f"{cocktail.id!r} is {cocktail.status}; follow it at /v1/cocktails/{cocktail.id}", param="model"
            )
        if cocktail.status == "ready":
            return NotFoundError(
                f"{cocktail.id!r} is made of models that pool {cocktail.pool_id!r} no longer has; make it again",
                param="model",
                code="model_not_found",
            )
        why = "" if cocktail.error is None else f": {cocktail.error.message}"
        return NotFoundError(
            f"{cocktail.id!r} {'failed' if cocktail.status == 'failed' else 'was cancelled'}{why}; make it again",
            param="model",
            code="model_not_found",
        )


def _pool_models(pool: Pool, dtype: DType) -> Iterator[Served]:
    for member in pool:
        model_id = pool.id if member.name == BASE else f"{pool.id}/{member.name}"
        yield Served(model_id, pool, one_hot(pool, member.name, dtype=dtype))


def _may_hold(cocktail: Cocktail, member: Member) -> bool:
    if cocktail.recipe is not None:
        return any(fingerprint == member.fingerprint for fingerprint, _ in cocktail.recipe.coefficients)
    return not cocktail.is_final and cocktail.request.members.get(member.name) == member.fingerprint


def _model_entry(model_id: str, cocktail: Cocktail) -> ModelEntry:
    return ModelEntry(id=model_id, created=int(cocktail.created_at), kind=cocktail.kind, pool=cocktail.pool_id)


def no_model(model_id: str) -> NotFoundError:
    """The error for a model id that means nothing to a tenant."""
    return NotFoundError(
        f"the model {model_id!r} does not exist; GET /v1/models lists those that do",
        param="model",
        code="model_not_found",
    )


def _no_cocktail(ref: str) -> NotFoundError:
    return NotFoundError(
        f"there is no cocktail {ref!r}; GET /v1/cocktails lists those there are", code="cocktail_not_found"
    )


__all__ = ["Admission", "Cocktail", "ModelEntry", "Registry", "Served"]
