"""The seam between the engines of one pool and what makes them one: a `GenerationEngine` whose lines can be left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from cocktail_serve.decisions import PosedQuestion
from cocktail_serve.engines.base import Background, Decided, Forwarded, GenerationEngine, MixedAhead, Scored
from cocktail_serve.engines.line_place import LinePlace
from cocktail_serve.engines.load import EngineLoad
from cocktail_serve.examples import ExampleSet
from cocktail_serve.generation_settings import GenerationSettings
from cocktail_serve.recipe import Recipe


class ReplicaEngine(GenerationEngine, Protocol):
    """One of several engines of a pool. What waits in its line can be called away by its place: `RecalledError`."""

    def load(self) -> EngineLoad:
        """How full it is, as its owner knows without asking it."""
        ...

    async def restart(self, *, drain_s: float) -> None:
        """Starts its server again once what is in flight has ended, and returns when it is ready.

        Nobody is kept out: drain it before.

        Args:
            drain_s: how long that may take, before what is left is ended with `DrainedError`.

        Raises:
            EngineError: it did not become ready.
        """
        ...

    async def mix_ahead(self, recipe: Recipe, *, place: LinePlace | None = None) -> MixedAhead: ...

    async def score(self, recipe: Recipe, examples: ExampleSet, *, place: LinePlace | None = None) -> Scored: ...

    async def decide(
        self,
        recipe: Recipe,
        questions: Sequence[PosedQuestion],
        *,
        tenant: str,
        generation: GenerationSettings | None = None,
        cache_salt: str | None = None,
        background: Background | None = None,
        place: LinePlace | None = None,
    ) -> Decided: ...

    def forward(
        self,
        recipe: Recipe,
        path: str,
        body: Mapping[str, Any],
        *,
        tenant: str,
        generation: GenerationSettings | None = None,
        background: Background | None = None,
        place: LinePlace | None = None,
    ) -> AbstractAsyncContextManager[Forwarded]: ...
