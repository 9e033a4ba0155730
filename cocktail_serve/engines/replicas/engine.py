"""Several engines of one pool as one `GenerationEngine`: each is one server, with turns and files of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from cocktail_serve.decisions import PosedQuestion
from cocktail_serve.engines.base import Background, Decided, Forwarded, MixedAhead, Scored
from cocktail_serve.engines.line_place import LinePlace
from cocktail_serve.engines.recipe_names import NamesOf
from cocktail_serve.engines.replica_numbers import check_replica
from cocktail_serve.engines.replicas.base import ReplicaEngine
from cocktail_serve.engines.replicas.combined import combined_snapshot
from cocktail_serve.engines.replicas.dispatcher import Dispatcher
from cocktail_serve.engines.replicas.placement import PlacedRequest, Placement
from cocktail_serve.engines.replicas.rolling_restart import RollingRestart
from cocktail_serve.engines.snapshot import EngineSnapshot
from cocktail_serve.errors import StorageError
from cocktail_serve.examples import ExampleSet
from cocktail_serve.generation_settings import GenerationSettings
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe


class ReplicatedEngine:
    """A `GenerationEngine` over others of the same pool, of which any may answer a request.

    What is asked of an engine as a whole reaches all of them. One that is lost costs what it held; what waited in its
    line goes to the others.

    Args:
        replicas: two or more, in the order of their numbers, of one pool and one dtype.
        placement: says where a request goes.
    """

    kind: ClassVar[Literal["decoder"]] = "decoder"

    def __init__(self, replicas: Sequence[ReplicaEngine], placement: Placement) -> None:
        self.pool = replicas[0].pool
        self.dtype = replicas[0].dtype
        self._replicas = list(replicas)
        self._by_name = {str(number): replica for number, replica in enumerate(replicas)}
        self._dispatcher = Dispatcher(self._by_name, placement)
        self._restart = RollingRestart(self._by_name, self._dispatcher)

    @property
    def max_model_len(self) -> int | None:
        known = (replica.max_model_len for replica in self._replicas)
        return next((length for length in known if length is not None), None)

    def name_recipes(self, names_of: NamesOf) -> None:
        for replica in self._replicas:
            replica.name_recipes(names_of)

    def check_start(self) -> Sequence[str]:
        return self._replicas[0].check_start()  # their command lines are one

    async def start(self) -> None:
        for replica in self._replicas:
            await replica.start()

    async def stop(self) -> None:
        await self._restart.stop()
        self._dispatcher.close()
        await asyncio.gather(*(replica.stop() for replica in self._replicas))

    async def snapshot(self, *, deadline_s: float) -> EngineSnapshot:
        return combined_snapshot(
            await asyncio.gather(*(replica.snapshot(deadline_s=deadline_s) for replica in self._replicas)),
            restart=self._restart.progress,
        )

    async def server_metrics(self, *, deadline_s: float) -> Sequence[Mapping[str, float]]:
        counted = await asyncio.gather(*(replica.server_metrics(deadline_s=deadline_s) for replica in self._replicas))
        return [values for of_replica in counted for values in of_replica]

    def begin_restart(self, *, drain_s: float) -> None:
        self._restart.begin(drain_s=drain_s)

    def drain(self, is_drained: bool, *, replica: int | None = None) -> None:
        for name in self._named(replica):
            if is_drained and replica is not None:
                self._dispatcher.recall(name)
            self._by_name[name].drain(is_drained)

    def pin(self, recipe: Recipe | None, *, replica: int | None = None) -> None:
        for name in self._named(replica):
            if recipe is not None and replica is not None:
                self._dispatcher.recall(name, but=recipe.digest)
            self._by_name[name].pin(recipe)

    async def change_pool(self, pool: Pool) -> None:
        before, told = self.pool, list[ReplicaEngine]()
        try:
            for replica in self._replicas:
                await replica.change_pool(pool)
                told.append(replica)
        except StorageError:
            for replica in told:  # a model more than the others know does no harm
                with contextlib.suppress(StorageError):
                    await replica.change_pool(before)
            raise
        self.pool = pool

    async def check_examples(self, examples: ExampleSet) -> None:
        await self._any.check_examples(examples)

    async def ask_tokenizer(
        self, path: str, body: Mapping[str, Any], *, generation: GenerationSettings | None = None
    ) -> bytes:
        return await self._any.ask_tokenizer(path, body, generation=generation)

    async def mix_ahead(self, recipe: Recipe) -> MixedAhead:
        return await self._dispatcher.send(
            PlacedRequest(recipe.digest, is_background=True),
            lambda at, place: self._by_name[at].mix_ahead(recipe, place=place),
        )

    async def score(self, recipe: Recipe, examples: ExampleSet) -> Scored:
        return await self._dispatcher.send(
            PlacedRequest(recipe.digest, is_background=True),
            lambda at, place: self._by_name[at].score(recipe, examples, place=place),
        )

    def forget(self, recipe_digest: str) -> None:
        for replica in self._replicas:
            replica.forget(recipe_digest)

    async def decide(
        self,
        recipe: Recipe,
        questions: Sequence[PosedQuestion],
        *,
        tenant: str,
        generation: GenerationSettings | None = None,
        cache_salt: str | None = None,
        background: Background | None = None,
    ) -> Decided:
        async def attempt(at: str, place: LinePlace) -> Decided:
            decided = await self._by_name[at].decide(
                recipe,
                questions,
                tenant=tenant,
                generation=generation,
                cache_salt=cache_salt,
                background=background,
                place=place,
            )
            self._dispatcher.observe(asyncio.get_running_loop().time() - place.let_in_at)
            return decided

        request = PlacedRequest(recipe.digest, tenant, is_background=background is not None)
        return await self._dispatcher.send(request, attempt)

    @contextlib.asynccontextmanager
    async def forward(
        self,
        recipe: Recipe,
        path: str,
        body: Mapping[str, Any],
        *,
        tenant: str,
        generation: GenerationSettings | None = None,
        background: Background | None = None,
    ) -> AsyncIterator[Forwarded]:
        async with contextlib.AsyncExitStack() as stack:

            async def attempt(at: str, place: LinePlace) -> tuple[Forwarded, LinePlace]:
                answering = self._by_name[at].forward(
                    recipe, path, body, tenant=tenant, generation=generation, background=background, place=place
                )
                return await stack.enter_async_context(answering), place

            request = PlacedRequest(recipe.digest, tenant, is_background=background is not None)
            forwarded, place = await self._dispatcher.send(request, attempt)
            try:
                yield forwarded
            finally:
                self._dispatcher.observe(asyncio.get_running_loop().time() - place.let_in_at)

    def _named(self, replica: int | None) -> Sequence[str]:
        check_replica(replica, num_replicas=len(self._replicas))
        return list(self._by_name) if replica is None else [str(replica)]

    @property
    def _any(self) -> ReplicaEngine:
        """One whose server answers, the emptiest; where none does, the first."""
        up = [replica for replica in self._replicas if replica.load().is_up]
        return min(up, key=lambda replica: replica.load().num_asked, default=self._replicas[0])
