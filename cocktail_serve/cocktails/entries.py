"""One tenant's cocktails in memory: by name and version, in the order they were made, and what a name means."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cocktail_serve.cocktails.cocktail import DIGEST8, Cocktail, ModelEntry, ServedModel

ListPosition = tuple[float, int, str]
"""Where a cocktail stands in the list of its tenant: by the moment it was made, then by when it was asked for."""


@dataclass(slots=True, eq=False)
class Entry:
    """One version in memory.

    Attributes:
        cocktail: as it stands; `current` is what `Versions` says it is.
        served: what it was last answered by; its pool may have changed since.
    """

    cocktail: Cocktail
    served: ServedModel | None = None


def position_of(entry: Entry) -> ListPosition:
    """Where it stands in its tenant's list."""
    return entry.cocktail.created_at, entry.cocktail.sequence, entry.cocktail.uid


def sequence_of(entry: Entry) -> int:
    """Where it stands in the order in which versions were last asked for."""
    return entry.cocktail.sequence


@dataclass(slots=True)
class Versions:
    """The versions of a name, by digest8."""

    by_digest8: dict[str, Entry] = field(default_factory=dict)
    pinned: Entry | None = None
    current: Entry | None = None

    def named(self) -> list[Entry]:
        """Those that the bare name can mean: an inline cocktail has no name."""
        return [entry for entry in self.by_digest8.values() if not entry.cocktail.inline]

    def settle_current(self) -> None:
        """The pinned version, else the newest ready one; a queued or failed version never moves it."""
        ready = [entry for entry in self.named() if entry.cocktail.status == "ready"]
        before, self.current = self.current, self.pinned or max(ready, key=sequence_of, default=None)
        for entry in (before, self.current):
            if entry is not None and entry.cocktail.current != (entry is self.current):
                entry.cocktail = replace(entry.cocktail, current=entry is self.current)


class TenantEntries:
    """The cocktails of one tenant.

    Attributes:
        names: by name; inline cocktails are under their pool's id.
        inline: inline cocktails by uid, the least recently used first.
        num_unfinished: how many have jobs that have not ended.
        models: its model list by id, sorted; None: to be made anew.
    """

    def __init__(self) -> None:
        self.names: dict[str, Versions] = {}
        self.inline: OrderedDict[str, Entry] = OrderedDict()
        self.num_unfinished = 0
        self.models: dict[str, ModelEntry] | None = None
        self._listed: list[Entry] = []

    @property
    def num_listed(self) -> int:
        """Versions, inline ones left out, whatever their state."""
        return len(self._listed)

    def insert(self, entry: Entry) -> None:
        """Takes in a version that was not there."""
        cocktail = entry.cocktail
        self.names.setdefault(cocktail.name, Versions()).by_digest8[cocktail.digest[:DIGEST8]] = entry
        if cocktail.inline:
            self.inline[cocktail.uid] = entry
        self.add(entry)

    def drop(self, entry: Entry) -> None:
        """Forgets a version."""
        self.take_out(entry)
        cocktail = entry.cocktail
        versions = self.names[cocktail.name]
        if versions.by_digest8.get(cocktail.digest[:DIGEST8]) is entry:
            del versions.by_digest8[cocktail.digest[:DIGEST8]]
        self.inline.pop(cocktail.uid, None)
        if versions.pinned is entry:
            versions.pinned = None
        self.settle(cocktail.name)
        if not versions.by_digest8:
            del self.names[cocktail.name]

    def add(self, entry: Entry) -> None:
        """Counts and lists a version by what it shows."""
        self.num_unfinished += not entry.cocktail.is_final
        if not entry.cocktail.inline:
            insort(self._listed, entry, key=position_of)
            self.settle(entry.cocktail.name)

    def take_out(self, entry: Entry) -> None:
        """Undoes `add`, before a version shows something else."""
        self.num_unfinished -= not entry.cocktail.is_final
        if not entry.cocktail.inline:
            del self._listed[self._index(position_of(entry))]

    def pin(self, name: str, entry: Entry | None) -> None:
        """A name means this version, whatever becomes ready later; None: the newest again."""
        self.names[name].pinned = entry
        self.settle(name)

    def settle(self, name: str) -> None:
        """A version of a name came, went or changed, or was pinned."""
        self.names[name].settle_current()
        self.models = None

    def newest(self, *, before: ListPosition | None = None, limit: int | None = None) -> Sequence[Entry]:
        """Versions by the moment they were made, the newest first, inline ones left out.

        Args:
            before: made before the one at this place; None: from the newest on.
            limit: at most so many; None: all.
        """
        end = len(self._listed) if before is None else self._index(before)
        start = 0 if limit is None else max(end - limit, 0)
        return self._listed[start:end][::-1]

    def _index(self, place: ListPosition) -> int:
        return bisect_left(self._listed, place, key=position_of)
