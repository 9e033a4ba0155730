"""What one gateway knows of the changes in the store: its own, and those of the gateways beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cocktail_serve.cocktails.cocktail import Cocktail
from cocktail_serve.cocktails.entries import Entries
from cocktail_serve.cocktails.serving import Serving
from cocktail_serve.cocktails.store import News, StaleError, Store

Heed = Callable[[list[Cocktail], list[Cocktail]], None]
"""Told of cocktails that others changed, and of those that they removed (unfinished ones as cancelled)."""

_T = TypeVar("_T")


class Learning:
    """Brings into memory what the store has and memory has not.

    Attributes:
        changing: held by whoever changes store and memory: one at a time.
    """

    def __init__(self, store: Store, entries: Entries, serving: Serving) -> None:
        self._store = store
        self._entries = entries
        self._serving = serving
        self.changing = asyncio.Lock()
        self._seen = 0
        self._num_looks = 0
        self._heed: Heed = lambda changed, removed: None

    def listen(self, heed: Heed) -> None:
        """Has a function called, at once, with the cocktails that other gateways changed and those they removed."""
        self._heed = heed

    async def load(self) -> None:
        """Reads the store into memory."""
        async with self.changing:
            self._take_in(await self._store.load())
            self._entries.order_inline()

    async def learn(self) -> None:
        """Brings what other gateways changed before this call into memory."""
        before = self._num_looks
        async with self.changing:
            # one look serves all who came before it
            if self._num_looks == before:
                await self.look()

    async def decided(self, decide: Callable[[], Awaitable[_T]]) -> _T:
        """The outcome of a change, decided again for as long as it goes back to something older than the store holds.

        Called by who holds `changing`.
        """
        while True:
            try:
                return await decide()
            except StaleError:
                await self.look()

    async def look(self) -> None:
        """Brings the news of the store into memory. Called by who holds `changing`."""
        self._num_looks += 1
        news = await self._store.news(self._seen)
        if news is not None:
            changed, removed = self._take_in(news)
            self._heed(changed, removed)

    def _take_in(self, news: News) -> tuple[list[Cocktail], list[Cocktail]]:
        removed = set(news.removed)
        if news.is_all:
            removed = self._entries.uids() - {cocktail.uid for cocktail in news.cocktails}
        gone = [self._entries.drop(entry) for entry in map(self._entries.by_uid, removed) if entry is not None]
        changed = []
        for stored in news.cocktails:
            entry = self._entries.by_uid(stored.uid)
            if stored.uid in removed or (entry is not None and entry.cocktail.change >= stored.change):
                continue
            cocktail = self._serving.adopt(stored)
            if entry is None:
                self._entries.insert(cocktail)
            else:
                self._entries.show(entry, cocktail)
            changed.append(cocktail)
        for key in {(cocktail.tenant, cocktail.name) for cocktail in news.cocktails}:
            versions = self._entries.names.get(key)
            if versions is not None:
                versions.pinned = self._entries.by_uid(news.pins.get(key, ""))
                versions.settle_current()
        self._seen = news.last
        return changed, gone
