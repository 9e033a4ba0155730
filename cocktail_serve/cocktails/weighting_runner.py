"""Weighs a request on its engine: losses of the models, then of whatever mixtures its weighting asks for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cocktail_serve.cocktails.catalog import Catalog
from cocktail_serve.cocktails.cocktail import CrossValidation, WeightingResult
from cocktail_serve.cocktails.cross_validation import cross_validate
from cocktail_serve.cocktails.options import CocktailOptions
from cocktail_serve.cocktails.scores import Scores, ScoreScope
from cocktail_serve.cocktails.weighting_steps import advance, recipe_of_trial, weigh_by_losses, weighting_steps
from cocktail_serve.engines.base import AnyEngine
from cocktail_serve.examples import ExampleSet
from cocktail_serve.weighting.candidates import Candidate, Trial, Trials, mean

_T = TypeVar("_T")

OnScored = Callable[[Mapping[str, float], float], Awaitable[None]]
"""Awaited with the models' mean losses so far, and the share of the work that is done."""

SCORED_BEFORE_SEARCH = 0.4
"""Share of the work that is done once the models are scored, where mixtures are scored after them."""


@dataclass(frozen=True, slots=True)
class WeightingRunner:
    """Asks engines for the losses that a weighting needs.

    Where recipes take turns, mixtures are tried one at a time and each is a turn of its own, so traffic and other jobs
    go in between. Where they share a batch, those that are known ahead are tried at once, as far as the engine lets in.

    Attributes:
        executor: where a weighting thinks, away from the event loop.
        catalog: says whether a recipe is served: one that was only tried is not kept mixed.
    """

    scores: Scores
    executor: Executor
    catalog: Catalog

    async def weigh(
        self,
        engine: AnyEngine,
        options: CocktailOptions,
        examples: ExampleSet | None,
        score_scope: ScoreScope,
        *,
        on_progress: OnScored | None = None,
    ) -> WeightingResult:
        """Losses and merging weights of a request.

        Raises:
            As `Scores.model_losses`.
        """
        losses: Mapping[str, Sequence[float]] = {}
        scored = SCORED_BEFORE_SEARCH if options.searches else 1.0

        async def on_loss(so_far: Mapping[str, float]) -> None:
            if on_progress is not None:
                await on_progress(so_far, scored * (len(so_far) / len(options.scored)))

        if examples is not None:
            losses = await self.scores.model_losses(engine, options.scored, examples, score_scope, on_loss=on_loss)
        if not options.searches:
            return weigh_by_losses(options, losses)
        means = {name: mean(of_model) for name, of_model in losses.items()}

        async def on_trial(share: float) -> None:
            if on_progress is not None:
                await on_progress(means, scored + (1.0 - scored) * share)

        return await self._answer_all(
            weighting_steps(options, losses), engine, options, examples, score_scope, on_trial=on_trial
        )

    async def cross_validate(
        self,
        engine: AnyEngine,
        options: CocktailOptions,
        chosen: Candidate | None,
        examples: ExampleSet | None,
        score_scope: ScoreScope,
    ) -> CrossValidation:
        """Cross-validates a mixture on its own examples; see `cross_validation.cross_validate`.

        Raises:
            As `Scores.model_losses`.
        """
        losses: Mapping[str, Sequence[float]] = {}
        if examples is not None:
            losses = await self.scores.model_losses(engine, options.scored, examples, score_scope)
        trials = cross_validate(options, losses, chosen, kind=engine.kind)
        return await self._answer_all(trials, engine, options, examples, score_scope)

    async def _answer_all(
        self,
        trials: Trials[_T],
        engine: AnyEngine,
        options: CocktailOptions,
        examples: ExampleSet | None,
        score_scope: ScoreScope,
        *,
        on_trial: Callable[[float], Awaitable[None]] | None = None,
    ) -> _T:
        """Mixes and scores what is asked for until the asker has its result."""
        loop = asyncio.get_running_loop()
        answer: Sequence[float] | None = None
        begun: deque[asyncio.Task[Sequence[float]]] = deque()
        try:
            while True:
                step = await loop.run_in_executor(self.executor, partial(advance, trials, answer))
                if not isinstance(step, Trial):
                    return step
                assert examples is not None
                if on_trial is not None:
                    await on_trial(step.progress)
                if not begun:
                    # where recipes take turns, one at a time: traffic and other jobs go in between
                    ahead = step.ahead if engine.pool.mode == "unmerged" else ()
                    for trial in (step, *ahead):
                        answered = self._answer(trial, engine, options, examples, score_scope)
                        begun.append(asyncio.create_task(answered))
                answer = await begun.popleft()
        finally:
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)

    async def _answer(
        self,
        trial: Trial,
        engine: AnyEngine,
        options: CocktailOptions,
        examples: ExampleSet,
        score_scope: ScoreScope,
    ) -> Sequence[float]:
        recipe = recipe_of_trial(options, engine.pool, trial, dtype=engine.dtype)
        try:
            return await self.scores.mixture_losses(engine, recipe, examples, score_scope, trial.rows)
        finally:
            if not self.catalog.uses(engine.pool.id, recipe.digest):
                engine.forget(recipe.digest)
