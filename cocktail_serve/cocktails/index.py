"""Finding cocktails and models: at once and from memory, each tenant its own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from cocktail_serve.cocktails.cocktail import Cocktail, ModelEntry, Served, Status
from cocktail_serve.cocktails.entries import Entries, Entry
from cocktail_serve.cocktails.request import CocktailRequest
from cocktail_serve.cocktails.serving import Serving, no_model
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import CocktailError, NotFoundError
from cocktail_serve.pool import Member, Pool


class Index:
    """All cocktails of all tenants, and the models of the pools, as they are in memory.

    Args:
        pools: by id, as the operator defines them now.
        dtypes: dtype of each pool's engine, which recipes round to.
        clock: seconds since the epoch.
    """

    def __init__(self, pools: Mapping[str, Pool], dtypes: Mapping[str, DType], *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started_at = int(clock())
        self._serving = Serving(pools, dtypes)
        self._entries = Entries(self._serving)

    def now(self) -> float:
        """Seconds since the epoch, as all of its moments are."""
        return self._clock()

    def resolve(self, tenant: str, model_id: str) -> Served:
        """The parameters a model id means now: the hot path, without a single await.

        Raises:
            NotFoundError: unknown, another tenant's, failed, or made of models its pool no longer has.
            ModelNotReadyError: its job has not ended.
        """
        served = self._serving.models.get(model_id)
        if served is not None:
            return served
        entry = self._entries.find(tenant, model_id)
        if entry is None:
            raise no_model(model_id)
        if entry.served is None:
            raise self._serving.why_not_served(entry.cocktail)
        if entry.cocktail.inline:
            self._entries.note_use(entry, self._clock())
        return entry.served

    def get(self, tenant: str, ref: str) -> Cocktail:
        """A snapshot by id; by name, of the current version, or of the newest where none is ready yet.

        Raises:
            NotFoundError: unknown or another tenant's.
        """
        return self._entries.snapshot(self._entry(tenant, ref))

    def by_uid(self, uid: str) -> Cocktail | None:
        """A snapshot by uid, or None where it has been deleted."""
        entry = self._entries.by_uid(uid)
        return None if entry is None else self._entries.snapshot(entry)

    def version(self, tenant: str, request: CocktailRequest) -> Cocktail | None:
        """The version that a request names, or None.

        Raises:
            ConflictError: as `admit`.
        """
        entry = self._entries.version(tenant, request)
        return None if entry is None else self._entries.snapshot(entry)

    def of_tenant(self, tenant: str, name: str | None = None) -> list[Cocktail]:
        """The tenant's cocktails, inline ones left out, the newest first; of one name if given."""
        found = [
            self._entries.snapshot(entry)
            for (owner, of_name), versions in self._entries.names.items()
            if owner == tenant and name in (None, of_name)
            for entry in versions.versions.values()
            if not entry.cocktail.inline
        ]
        return sorted(found, key=lambda cocktail: (-cocktail.created_at, -cocktail.sequence))

    def models(self, tenant: str) -> list[ModelEntry]:
        """Pools, experts, the tenant's names that have a current version, and its ready versions, sorted by id."""
        entries = [
            ModelEntry(id=model_id, created=self._started_at, kind=served.pool.kind, pool=served.pool.id)
            for model_id, served in self._serving.models.items()
        ]
        for (owner, name), versions in self._entries.names.items():
            if owner != tenant:
                continue
            ready = [entry for entry in versions.versions.values() if entry.served and not entry.cocktail.inline]
            entries.extend(_model_entry(entry.cocktail.id, entry.cocktail) for entry in ready)
            if versions.current is not None and versions.current.served and name not in self._serving.pools:
                entries.append(_model_entry(name, versions.current.cocktail))
        return sorted(entries, key=lambda entry: entry.id)

    def statuses(self) -> Counter[Status]:
        """How many cocktails of all tenants, inline ones included, are in each state."""
        return Counter(entry.cocktail.status for entry in self._entries)

    def unfinished(self) -> list[Cocktail]:
        """Snapshots of the cocktails whose jobs have not ended, whoever's they are."""
        return [entry.cocktail for entry in self._entries if not entry.cocktail.is_final]

    def unreported(self) -> list[Cocktail]:
        """Ready versions whose findings are pending."""
        return [
            entry.cocktail
            for entry in self._entries
            if entry.cocktail.findings is not None and entry.cocktail.findings.status == "pending"
        ]

    def uses(self, pool_id: str, recipe_digest: str) -> bool:
        """Whether a model of a pool, or a cocktail of any tenant, is this recipe."""
        is_model = any(
            served.pool.id == pool_id and served.recipe.digest == recipe_digest
            for served in self._serving.models.values()
        )
        return is_model or any(
            entry.cocktail.pool_id == pool_id
            and entry.cocktail.recipe is not None
            and entry.cocktail.recipe.digest == recipe_digest
            for entry in self._entries
        )

    def named(self, pool_id: str, recipe_digests: Collection[str]) -> dict[str, list[tuple[str | None, str]]]:
        """Tenant (None: a model of the pool itself) and model id of all that each recipe is served as."""
        found: dict[str, list[tuple[str | None, str]]] = {digest: [] for digest in recipe_digests}
        for served in self._serving.models.values():
            if served.pool.id == pool_id and served.recipe.digest in found:
                found[served.recipe.digest].append((None, served.model_id))
        for entry in self._entries:
            recipe = entry.cocktail.recipe
            if entry.cocktail.pool_id == pool_id and recipe is not None and recipe.digest in found:
                found[recipe.digest].append((entry.cocktail.tenant, entry.cocktail.id))
        return found

    def made_of(self, pool_id: str, member: Member) -> list[Cocktail]:
        """Cocktails of all tenants that a model of a pool is in, or may be in once their jobs end."""
        return [
            self._entries.snapshot(entry)
            for entry in self._entries
            if entry.cocktail.pool_id == pool_id and _may_hold(entry.cocktail, member)
        ]

    def serve(self, cocktail: Cocktail) -> Served | None:
        """What a snapshot is answered by; None unless it is ready and its pool still has its models."""
        return self._serving.serve(cocktail)

    def why_not_served(self, cocktail: Cocktail) -> CocktailError:
        """The error for a cocktail that `serve` has nothing for."""
        return self._serving.why_not_served(cocktail)

    def change_pool(self, pool: Pool) -> None:
        """Takes experts in or out of the model list; cocktails made of those that are gone are no longer served."""
        self._serving.change_pool(pool)
        self._entries.serve_anew(pool.id)

    async def until_final(self, uid: str, timeout_s: float) -> None:
        """Returns the moment a version is ready, failed, cancelled or deleted, or after `timeout_s`."""
        entry = self._entries.by_uid(uid)
        if entry is None or entry.final.is_set():
            return
        try:
            async with asyncio.timeout(timeout_s):
                await entry.final.wait()
        except TimeoutError:
            return

    def _entry(self, tenant: str, ref: str) -> Entry:
        entry = self._entries.find(tenant, ref)
        if entry is None:
            raise no_cocktail(ref)
        return entry


def no_cocktail(ref: str) -> NotFoundError:
    """The error for an id or a name that means nothing to a tenant."""
    return NotFoundError(
        f"there is no cocktail {ref!r}; GET /v1/cocktails lists those there are", code="cocktail_not_found"
    )


def _may_hold(cocktail: Cocktail, member: Member) -> bool:
    if cocktail.recipe is not None:
        return any(fingerprint == member.fingerprint for fingerprint, _ in cocktail.recipe.coefficients)
    return not cocktail.is_final and cocktail.request.members.get(member.name) == member.fingerprint


def _model_entry(model_id: str, cocktail: Cocktail) -> ModelEntry:
    return ModelEntry(id=model_id, created=int(cocktail.created_at), kind=cocktail.kind, pool=cocktail.pool_id)
