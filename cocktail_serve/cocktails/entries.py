"""Cocktails in memory: each version by uid and by name, and which version a name means."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cocktail_serve.cocktails.cocktail import DIGEST8, Cocktail, Served, version_id
from cocktail_serve.cocktails.request import CocktailRequest
from cocktail_serve.cocktails.serving import Serving
from cocktail_serve.errors import ConflictError


@dataclass(slots=True)
class Entry:
    """One version in memory. `cocktail.current` is left False here and filled in when a snapshot is taken."""

    cocktail: Cocktail
    served: Served | None = None
    final: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Name:
    """The versions of a tenant's name, by digest8."""

    versions: dict[str, Entry] = field(default_factory=dict)
    pinned: Entry | None = None
    current: Entry | None = None

    def settle_current(self) -> None:
        """The pinned version, else the newest ready one; a queued or failed version never moves it."""
        ready = [
            entry for entry in self.versions.values() if entry.cocktail.status == "ready" and not entry.cocktail.inline
        ]
        self.current = self.pinned or max(ready, key=lambda entry: entry.cocktail.sequence, default=None)


class Entries:
    """All versions of all tenants. Knows no store: who changes it has changed that first.

    Attributes:
        names: by (tenant, name).
        inline: inline cocktails by uid, the least recently used first.
        used: when inline cocktails were used, by uid, as far as it is only noted here.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._by_uid: dict[str, Entry] = {}
        self.names: dict[tuple[str, str], Name] = {}
        self.inline: OrderedDict[str, Entry] = OrderedDict()
        self.used: dict[str, float] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._by_uid.values())

    def uids(self) -> set[str]:
        return set(self._by_uid)

    def by_uid(self, uid: str) -> Entry | None:
        """None where it has been deleted."""
        return self._by_uid.get(uid)

    def find(self, tenant: str, ref: str) -> Entry | None:
        """By id; by name the current version, or the newest where none is ready yet."""
        name, at, digest8 = ref.partition("@")
        versions = self.names.get((tenant, name))
        if versions is None:
            return None
        if at:
            return versions.versions.get(digest8)
        if name in self._serving.pools:
            return None
        if versions.current is not None:
            return versions.current
        named = [entry for entry in versions.versions.values() if not entry.cocktail.inline]
        return max(named, key=lambda entry: entry.cocktail.sequence, default=None)

    def version(self, tenant: str, request: CocktailRequest) -> Entry | None:
        """The version that a request names.

        Raises:
            ConflictError: another request of the same name has the same first eight digits of its digest.
        """
        versions = self.names.get((tenant, request.options.name))
        digest = request.digest
        entry = None if versions is None else versions.versions.get(digest[:DIGEST8])
        if entry is not None and entry.cocktail.digest != digest:
            raise ConflictError(
                f"another version has the id {version_id(request.options.name, digest)!r}: two digests begin alike; "
                "change 'seed' to get another id",
                param="seed",
            )
        return entry

    def snapshot(self, entry: Entry) -> Cocktail:
        """The cocktail as it stands, which knows whether the bare name means it."""
        versions = self.names.get((entry.cocktail.tenant, entry.cocktail.name))
        is_current = versions is not None and versions.current is entry
        return replace(entry.cocktail, current=True) if is_current else entry.cocktail

    def insert(self, cocktail: Cocktail) -> Entry:
        """Takes in a version that was not there."""
        entry = Entry(cocktail)
        self._by_uid[cocktail.uid] = entry
        self.names.setdefault((cocktail.tenant, cocktail.name), Name()).versions[cocktail.digest[:DIGEST8]] = entry
        if cocktail.inline:
            self.inline[cocktail.uid] = entry
        self.show(entry, cocktail)
        return entry

    def show(self, entry: Entry, cocktail: Cocktail) -> None:
        """A version is like this from here on; wakes who waits for its end."""
        entry.cocktail = cocktail
        entry.served = self._serving.serve(cocktail)
        if cocktail.is_final:
            entry.final.set()
        else:
            entry.final.clear()
        self.names[cocktail.tenant, cocktail.name].settle_current()

    def drop(self, entry: Entry) -> Cocktail:
        """Forgets a version; its last snapshot, as cancelled if it was unfinished."""
        cocktail = self.snapshot(entry)
        key = (cocktail.tenant, cocktail.name)
        versions = self.names[key]
        del self._by_uid[cocktail.uid]
        if versions.versions.get(cocktail.digest[:DIGEST8]) is entry:
            del versions.versions[cocktail.digest[:DIGEST8]]
        self.inline.pop(cocktail.uid, None)
        self.used.pop(cocktail.uid, None)
        if versions.pinned is entry:
            versions.pinned = None
        versions.settle_current()
        if not versions.versions:
            del self.names[key]
        entry.final.set()
        return cocktail if cocktail.is_final else replace(cocktail, status="cancelled")

    def serve_anew(self, pool_id: str) -> None:
        """The pool has other models now: what serves its cocktails may have come or gone."""
        for entry in self:
            if entry.cocktail.pool_id == pool_id:
                entry.served = self._serving.serve(entry.cocktail)

    def note_use(self, entry: Entry, now: float) -> None:
        """An inline cocktail was used."""
        uid = entry.cocktail.uid
        self.inline.move_to_end(uid)
        self.used[uid] = now

    def order_inline(self) -> None:
        """Puts inline cocktails in the order of the uses that are written down."""
        for uid, _ in sorted(self.inline.items(), key=lambda item: item[1].cocktail.used_at):
            self.inline.move_to_end(uid)
