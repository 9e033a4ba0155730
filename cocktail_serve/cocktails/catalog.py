"""Which cocktails and models there are: in memory, found at once, each tenant its own."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from cocktail_serve.cocktails.cocktail import DIGEST8, FINAL, Cocktail, ModelEntry, ServedModel, Status, version_id
from cocktail_serve.cocktails.entries import Entry, ListPosition, TenantEntries, Versions, position_of, sequence_of
from cocktail_serve.cocktails.options import CocktailRequest
from cocktail_serve.cocktails.pacing import paced
from cocktail_serve.cocktails.pool_models import PoolModels, no_model
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import CocktailError, ConflictError, InvalidRequestError, NotFoundError
from cocktail_serve.ids import Page
from cocktail_serve.pool import Member, Pool
from cocktail_serve.suggestions import did_you_mean

PLACES_KEPT = 10_000
"""Deleted cocktails whose place in their lists is still known: who deletes what it has listed can list on."""


class Catalog:
    """All cocktails of all tenants, indexed by what they are asked by, and the models of the pools.

    No call scans cocktails of other tenants, but `made_of`, which is the operator's. Knows no store: whoever changes
    it (`Registry`) has changed that first.

    Args:
        pools: by id, as the operator defines them now.
        dtypes: dtype of each pool's engine, which recipes round to.
        clock: seconds since the epoch.

    Attributes:
        pools: by id, as they are now.
        pool_models: the models of the pools, and what a cocktail is answered by under them.
        inline: inline cocktails of all tenants by uid, the least recently used first.
        used: when inline cocktails were used, by uid, as far as it is only noted here.
    """

    def __init__(
        self, pools: Mapping[str, Pool], dtypes: Mapping[str, DType], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._started_at = int(clock())
        self.pool_models = PoolModels(pools, dtypes)
        self.pools = pools
        self._by_uid: dict[str, Entry] = {}
        self._tenants: dict[str, TenantEntries] = {}
        self._by_status: defaultdict[Status, dict[str, Entry]] = defaultdict(dict)
        self._by_recipe: defaultdict[tuple[str, str], dict[str, Entry]] = defaultdict(dict)
        self._unreported: dict[str, Entry] = {}
        self._places: OrderedDict[tuple[str, str], ListPosition] = OrderedDict()
        self._changes: dict[str, asyncio.Event] = {}
        self.inline: OrderedDict[str, Entry] = OrderedDict()
        self.used: dict[str, float] = {}

    def now(self) -> float:
        """Seconds since the epoch, as all moments here are."""
        return self._clock()

    def resolve(self, tenant: str, model_id: str, *, visible: Collection[str] | None = None) -> ServedModel:
        """The parameters a model id means now: the hot path, without a single await.

        Args:
            visible: ids of the pools that are there for the tenant; None: all.

        Raises:
            NotFoundError: unknown, another tenant's, failed, or made of models its pool no longer has.
            ModelNotReadyError: its job has not ended.
        """
        served = self.pool_models.by_id.get(model_id)
        entry = None
        if served is None and (entry := self.find_entry(tenant, model_id)) is not None:
            served = self._served(entry)
        if served is None or not (visible is None or served.pool.id in visible):
            raise no_model(model_id, self.names(tenant, visible=visible))
        if entry is not None and entry.cocktail.inline:
            self.note_use(entry)
        return served

    def names(self, tenant: str, *, visible: Collection[str] | None = None) -> Iterator[str]:
        """The tenant's names, the newest last, then pools and experts: what a model id that is none may have meant.

        Args:
            visible: as of `resolve`.
        """
        entries = self._tenants.get(tenant)
        for name, versions in () if entries is None else entries.names.items():
            current = versions.current
            if current is not None and (visible is None or current.cocktail.pool_id in visible):
                yield name
        for model_id, served in self.pool_models.by_id.items():
            if visible is None or served.pool.id in visible:
                yield model_id

    def get(self, tenant: str, ref: str) -> Cocktail:
        """A snapshot by `name@digest8`; by name, of the current version, or of the newest where none is ready yet.

        Raises:
            NotFoundError: unknown or another tenant's.
        """
        entry = self.find_entry(tenant, ref)
        if entry is None:
            raise self.no_cocktail(tenant, ref)
        return entry.cocktail

    def no_cocktail(self, tenant: str, ref: str) -> NotFoundError:
        """The error for an id or a name that means nothing to a tenant."""
        names = (name for name, versions in self.of_tenant(tenant).names.items() if versions.named())
        return NotFoundError(
            f"there is no cocktail {ref!r}; GET /v1/cocktails lists those there are{did_you_mean(ref, names)}",
            code="cocktail_not_found",
        )

    def by_uid(self, uid: str) -> Cocktail | None:
        """A snapshot by uid, or None where it has been deleted."""
        entry = self._by_uid.get(uid)
        return None if entry is None else entry.cocktail

    def list(self, tenant: str, name: str | None = None) -> Sequence[Cocktail]:
        """The tenant's cocktails, inline ones left out, the newest first; of one name if given."""
        return self.page(tenant, name).data

    def page(
        self, tenant: str, name: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> Page[Cocktail]:
        """A part of `list`.

        Args:
            after: id of the version to begin behind; it may have been deleted since it was listed.
            limit: at most so many; None: all.

        Raises:
            InvalidRequestError: `after` neither is nor lately was a version of this tenant.
        """
        before = None if after is None else self._place(tenant, after)
        entries = self._tenants.get(tenant)
        if entries is None:
            return Page(data=[], has_more=False)
        num_wanted = None if limit is None else limit + 1
        if name is None:
            found = entries.newest(before=before, limit=num_wanted)
        else:
            named = entries.names[name].named() if name in entries.names else []
            behind = (entry for entry in named if before is None or position_of(entry) < before)
            found = sorted(behind, key=position_of, reverse=True)[:num_wanted]
        return Page.of([entry.cocktail for entry in found], len(found) if limit is None else limit)

    def models(self, tenant: str) -> Mapping[str, ModelEntry]:
        """Pools, experts, the tenant's names that have a current version, and its ready versions, by id, sorted."""
        entries = self._tenants.get(tenant)
        if entries is None:
            return {entry.id: entry for entry in self._models_of_pools()}
        if entries.models is None:
            found = [*self._models_of_pools(), *self._models_of_tenant(entries)]
            entries.models = {entry.id: entry for entry in sorted(found, key=lambda entry: entry.id)}
        return entries.models

    def statuses(self) -> Mapping[Status, int]:
        """How many cocktails of all tenants, inline ones included, are in each state."""
        return {status: len(entries) for status, entries in self._by_status.items() if entries}

    def unfinished(self) -> Sequence[Cocktail]:
        """Snapshots of the cocktails whose jobs have not ended, whoever's they are."""
        return [
            entry.cocktail
            for status, entries in self._by_status.items()
            if status not in FINAL
            for entry in entries.values()
        ]

    def unreported(self) -> Sequence[Cocktail]:
        """Ready versions whose cross-validation is pending."""
        return [entry.cocktail for entry in self._unreported.values()]

    def uses(self, pool_id: str, recipe_digest: str) -> bool:
        """Whether a model of a pool, or a cocktail of any tenant, is this recipe."""
        return (pool_id, recipe_digest) in self._by_recipe or bool(self.pool_models.ids(pool_id, recipe_digest))

    def named(self, pool_id: str, recipe_digests: Collection[str]) -> Mapping[str, Sequence[tuple[str | None, str]]]:
        """Tenant (None: a model of the pool itself) and model id of all that each recipe is served as."""
        found: dict[str, list[tuple[str | None, str]]] = {}
        for digest in recipe_digests:
            cocktails = (entry.cocktail for entry in self._by_recipe.get((pool_id, digest), {}).values())
            found[digest] = [(None, model_id) for model_id in self.pool_models.ids(pool_id, digest)]
            found[digest] += [(cocktail.tenant, cocktail.id) for cocktail in cocktails]
        return found

    def names_of_recipe(self, pool_id: str, recipe_digest: str) -> Sequence[str]:
        """What a recipe is served as, for people: models of the pool by id, cocktails as `<id> of <tenant>`."""
        named = self.named(pool_id, [recipe_digest])[recipe_digest]
        return [model_id if tenant is None else f"{model_id} of {tenant}" for tenant, model_id in named]

    async def made_of(self, pool_id: str, member: Member) -> Sequence[Cocktail]:
        """Cocktails of all tenants that a model of a pool is in, or may be in once their jobs end."""
        return [
            entry.cocktail
            async for entry in paced(list(self._by_uid.values()), every=500)
            if entry.cocktail.pool_id == pool_id and _may_hold(entry.cocktail, member)
        ]

    async def until(self, uid: str, condition: Callable[[Cocktail], bool], timeout_s: float) -> Cocktail | None:
        """The snapshot of a version the moment a condition holds, or the one after `timeout_s`; None: it was deleted.

        Changes of other gateways count once they are known here.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while (entry := self._by_uid.get(uid)) is not None and not condition(entry.cocktail):
                    await self._changes.setdefault(uid, asyncio.Event()).wait()
        except TimeoutError:
            pass
        return self.by_uid(uid)

    def reread_pools(self) -> None:
        """A pool has other experts now; cocktails made of those that are gone are no longer served."""
        self.pool_models.reread()
        for entries in self._tenants.values():
            entries.models = None

    def uids(self) -> set[str]:
        """Of all versions of all tenants."""
        return set(self._by_uid)

    def entry(self, uid: str) -> Entry | None:
        """None where it has been deleted."""
        return self._by_uid.get(uid)

    def in_state(self, *statuses: Status) -> Sequence[Entry]:
        """The versions of all tenants that are in one of these states."""
        return [entry for status in statuses for entry in self._by_status.get(status, {}).values()]

    def of_tenant(self, tenant: str) -> TenantEntries:
        """What a tenant has; empty, and not kept, where that is nothing."""
        return self._tenants.get(tenant) or TenantEntries()

    def versions(self, tenant: str, name: str) -> Versions | None:
        """The versions of a tenant's name; None: there are none."""
        entries = self._tenants.get(tenant)
        return None if entries is None else entries.names.get(name)

    def find_entry(self, tenant: str, ref: str) -> Entry | None:
        """By id; by name the current version, or the newest where none is ready yet."""
        name, at, digest8 = ref.partition("@")
        versions = self.versions(tenant, name)
        if versions is None:
            return None
        if at:
            return versions.by_digest8.get(digest8)
        if name in self.pools:
            return None
        return versions.current or max(versions.named(), key=sequence_of, default=None)

    def find_version(self, tenant: str, request: CocktailRequest) -> Entry | None:
        """The version that a request names.

        Raises:
            ConflictError: another request of the same name has the same first eight digits of its digest.
        """
        versions = self.versions(tenant, request.options.name)
        digest = request.digest
        entry = None if versions is None else versions.by_digest8.get(digest[:DIGEST8])
        if entry is not None and entry.cocktail.digest != digest:
            raise ConflictError(
                f"another version has the id {version_id(request.options.name, digest)!r}: two digests begin alike; "
                "change 'seed' to get another id",
                param="seed",
            )
        return entry

    def insert(self, cocktail: Cocktail) -> Entry:
        """Takes in a version that was not there."""
        entry = self._by_uid[cocktail.uid] = Entry(cocktail)
        if cocktail.inline:
            self.inline[cocktail.uid] = entry
        self._tenants.setdefault(cocktail.tenant, TenantEntries()).insert(entry)
        self._index(entry)
        return entry

    def update(self, entry: Entry, cocktail: Cocktail) -> None:
        """A version is like this from here on; wakes who waits for a change of it."""
        entries = self._tenants[cocktail.tenant]
        self._unindex(entry)
        entries.take_out(entry)
        entry.cocktail, entry.served = cocktail, None
        entries.add(entry)
        self._index(entry)
        self._wake(cocktail.uid)

    def pin(self, tenant: str, name: str, entry: Entry | None) -> None:
        """A name means this version, whatever becomes ready later; None: the newest again."""
        self._tenants[tenant].pin(name, entry)

    def drop(self, entry: Entry) -> Cocktail:
        """Forgets a version; its last snapshot, as cancelled if it was unfinished."""
        cocktail = entry.cocktail
        self._unindex(entry)
        entries = self._tenants[cocktail.tenant]
        entries.drop(entry)
        if not entries.names:
            del self._tenants[cocktail.tenant]
        del self._by_uid[cocktail.uid]
        self.inline.pop(cocktail.uid, None)
        self.used.pop(cocktail.uid, None)
        if not cocktail.inline:
            self._places[cocktail.tenant, cocktail.id] = position_of(entry)
            while len(self._places) > PLACES_KEPT:
                self._places.popitem(last=False)
        self._wake(cocktail.uid)
        return cocktail if cocktail.is_final else replace(cocktail, status="cancelled")

    def note_use(self, entry: Entry) -> None:
        """An inline cocktail was used."""
        uid = entry.cocktail.uid
        self.inline.move_to_end(uid)
        self._tenants[entry.cocktail.tenant].inline.move_to_end(uid)
        self.used[uid] = self._clock()

    def order_inline(self) -> None:
        """Puts inline cocktails in the order of the uses that are written down."""
        for uid, entry in sorted(self.inline.items(), key=lambda item: item[1].cocktail.used_at):
            self.inline.move_to_end(uid)
            self._tenants[entry.cocktail.tenant].inline.move_to_end(uid)

    def _served(self, entry: Entry) -> ServedModel:
        """What a version is answered by now; raises as `resolve`."""
        served = entry.served
        # `Experts` puts another pool in the place of one whose experts change
        if served is None or served.pool is not self.pools.get(served.pool.id):
            served = entry.served = self.pool_models.served_model(entry.cocktail)
        return served

    def _is_served(self, entry: Entry) -> bool:
        if entry.cocktail.status != "ready":
            return False
        try:
            self._served(entry)
        except CocktailError:
            return False
        return True

    def _models_of_pools(self) -> Iterator[ModelEntry]:
        for model_id, served in self.pool_models.by_id.items():
            yield ModelEntry(id=model_id, created=self._started_at, kind=served.pool.kind, pool=served.pool.id)

    def _models_of_tenant(self, entries: TenantEntries) -> Iterator[ModelEntry]:
        for entry in entries.newest():
            if self._is_served(entry):
                yield _model_entry(entry.cocktail.id, entry.cocktail)
        for name, versions in entries.names.items():
            current = versions.current
            if current is not None and name not in self.pools and self._is_served(current):
                yield _model_entry(name, current.cocktail)

    def _place(self, tenant: str, ref: str) -> ListPosition:
        entry = self.find_entry(tenant, ref) if "@" in ref else None
        if entry is not None and not entry.cocktail.inline:
            return position_of(entry)
        place = self._places.get((tenant, ref))
        if place is None:
            raise InvalidRequestError(
                f"after: {ref!r} is not an id of this list; give the last one you got, or begin without it",
                param="after",
            )
        return place

    def _index(self, entry: Entry) -> None:
        cocktail = entry.cocktail
        self._by_status[cocktail.status][cocktail.uid] = entry
        if cocktail.recipe is not None:
            self._by_recipe[cocktail.pool_id, cocktail.recipe.digest][cocktail.uid] = entry
        if cocktail.cross_validation is not None and cocktail.cross_validation.status == "pending":
            self._unreported[cocktail.uid] = entry

    def _unindex(self, entry: Entry) -> None:
        cocktail = entry.cocktail
        del self._by_status[cocktail.status][cocktail.uid]
        if cocktail.recipe is not None:
            key = (cocktail.pool_id, cocktail.recipe.digest)
            del self._by_recipe[key][cocktail.uid]
            if not self._by_recipe[key]:
                del self._by_recipe[key]
        self._unreported.pop(cocktail.uid, None)

    def _wake(self, uid: str) -> None:
        """Whoever waits for a change of it looks again."""
        changed = self._changes.pop(uid, None)
        if changed is not None:
            changed.set()


def _may_hold(cocktail: Cocktail, member: Member) -> bool:
    if cocktail.recipe is not None:
        return any(fingerprint == member.fingerprint for fingerprint, _ in cocktail.recipe.coefficients)
    return not cocktail.is_final and cocktail.options.members.get(member.name) == member.fingerprint


def _model_entry(model_id: str, cocktail: Cocktail) -> ModelEntry:
    return ModelEntry(id=model_id, created=int(cocktail.created_at), kind=cocktail.kind, pool=cocktail.pool_id)
