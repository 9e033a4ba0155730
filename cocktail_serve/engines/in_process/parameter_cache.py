"""Which mixed parameters are in memory, within a budget of bytes, and who is using them.

Lives on the event loop: every method runs there, so there are no locks. Evicting takes a mixture off the list at once
(nobody new gets it), but its bytes count until the last user has gone: what is in use is never freed, and the budget
is never exceeded.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from cocktail_serve.errors import ModelNotReadyError
from cocktail_serve.recipe import Recipe

Params = dict[str, Any]
"""A state dict: tensors by name."""


@dataclass(eq=False, slots=True)
class CachedMixture:
    """The parameters of one recipe.

    Attributes:
        params: empty until mixed.
        num_users: requests that hold it.
        is_retired: off the list; freed with its last user.
    """

    digest: str
    params: Params
    num_users: int = 0
    is_retired: bool = False
    mixing: asyncio.Task[None] | None = None


class ParameterCache:
    """An LRU of mixtures of equal size.

    Args:
        mix: makes the parameters of a recipe.
        unbind: returns once the model holds none of these parameters any more.
        mixture_bytes: size of one mixture.
        max_bytes: what all together may take, at least one.
    """

    def __init__(
        self,
        mix: Callable[[Recipe], Awaitable[Params]],
        unbind: Callable[[Params], Awaitable[None]],
        *,
        mixture_bytes: int,
        max_bytes: int,
    ) -> None:
        self._mix = mix
        self._unbind = unbind
        self._mixture_bytes = mixture_bytes
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._is_closed = False
        self._num_leaving = 0  # retired, mixed, not free yet
        self._listed: OrderedDict[str, CachedMixture] = OrderedDict()
        self._pinned: dict[str, CachedMixture] = {}
        self._room = asyncio.Lock()
        self._changed = asyncio.Event()  # a mixture was freed, or can be from now on
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_bytes(self) -> int:
        """Bytes of all mixtures, those on their way in or out included, the pinned ones not."""
        return self._num_bytes

    @property
    def digests(self) -> list[str]:
        """What is listed and mixed, least recently used first; the pinned ones not."""
        return [digest for digest, mixture in self._listed.items() if mixture.mixing is None]

    def is_ready(self, digest: str) -> bool:
        """Whether a lease would not have to wait."""
        mixture = self._pinned.get(digest) or self._listed.get(digest)
        return mixture is not None and mixture.mixing is None

    def pin(self, digest: str, params: Params) -> None:
        """Lists parameters that stay for good and are not counted: the model's own."""
        self._pinned[digest] = CachedMixture(digest, params)

    async def lease(self, recipe: Recipe) -> CachedMixture:
        """The mixture of a recipe, mixed if need be, once for all who wait; give it back with `release`.

        Raises:
            CocktailError: it could not be mixed. The next lease tries again.
            ModelNotReadyError: the cache is closed.
        """
        if self._is_closed:
            raise ModelNotReadyError("the engine is shutting down")
        mixture = self._pinned.get(recipe.digest) or self._listed.get(recipe.digest)
        if mixture is None:
            mixture = self._listed[recipe.digest] = CachedMixture(recipe.digest, {})
            mixture.mixing = self._spawn(self._fill(mixture, recipe))
        elif recipe.digest in self._listed:
            self._listed.move_to_end(recipe.digest)
        mixture.num_users += 1
        if mixture.mixing is not None:
            try:
                await asyncio.shield(mixture.mixing)
            except BaseException as error:
                self.release(mixture)
                if self._is_closed and isinstance(error, asyncio.CancelledError):
                    raise ModelNotReadyError("the engine is shutting down") from None
                raise
        return mixture

    def release(self, mixture: CachedMixture) -> None:
        mixture.num_users -= 1
        self._free_if_unused(mixture)

    def forget(self, digest: str) -> None:
        """Takes a mixture off the list; freed once nothing uses it."""
        mixture = self._listed.pop(digest, None)
        if mixture is not None:
            mixture.is_retired = True
            self._num_leaving += mixture.mixing is None
            self._free_if_unused(mixture)

    async def close(self) -> None:
        """Ends what is being mixed; who waits for it is told so."""
        self._is_closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listed.clear()
        self._pinned.clear()

    async def _fill(self, mixture: CachedMixture, recipe: Recipe) -> None:
        try:
            async with self._room:  # in the order of arrival
                await self._make_room()
                self._num_bytes += self._mixture_bytes
            try:
                mixture.params = await self._mix(recipe)
            except BaseException:
                self._give_back_bytes()
                raise
        except BaseException:
            if self._listed.get(mixture.digest) is mixture:
                del self._listed[mixture.digest]
            raise
        mixture.mixing = None
        self._num_leaving += mixture.is_retired
        self._changed.set()
        self._free_if_unused(mixture)

    async def _make_room(self) -> None:
        """Retires the least recently used mixture, an idle one if there is any, and waits until its bytes are free.

        One in use is retired too where all are: those who ask for it from now on queue behind, so that a mixture
        under constant traffic cannot keep others out for good.
        """
        while self._num_bytes + self._mixture_bytes > self._max_bytes:
            self._changed.clear()
            if not self._num_leaving:
                filled = [mixture for mixture in self._listed.values() if mixture.mixing is None]
                if filled:
                    self.forget(next((mixture for mixture in filled if not mixture.num_users), filled[0]).digest)
            await self._changed.wait()

    def _free_if_unused(self, mixture: CachedMixture) -> None:
        if mixture.is_retired and not mixture.num_users and mixture.params:
            self._spawn(self._free(mixture))

    async def _free(self, mixture: CachedMixture) -> None:
        params, mixture.params = mixture.params, {}
        try:
            await self._unbind(params)
        finally:
            self._num_leaving -= 1
            self._give_back_bytes()

    def _give_back_bytes(self) -> None:
        self._num_bytes -= self._mixture_bytes
        self._changed.set()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)
        return task

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # those who wait for it have seen it; nobody else must be told "never retrieved"
