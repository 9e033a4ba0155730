"""Losses of models on examples: measured by the engine once, kept, and measured again only for what is new."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from cocktail_serve.cocktails.score_store import ScoreKey, ScoreStore
from cocktail_serve.digest import digest_of
from cocktail_serve.engines.base import AnyEngine, EmbeddingEngine, ScoringEngine
from cocktail_serve.engines.engine_time import EngineTimeTotal
from cocktail_serve.examples import ExampleSet
from cocktail_serve.pool import Kind
from cocktail_serve.recipe import Recipe, one_hot
from cocktail_serve.scoring import contrastive, decoder, ranking
from cocktail_serve.scoring.finite import require_finite
from cocktail_serve.weighting.candidates import mean

TEXTS_PER_CALL = 256
"""Texts of one call to an embedding engine: short enough to give way to traffic in between."""

_T = TypeVar("_T")


class Retrying(Protocol):
    """How often a call to an engine is tried."""

    async def __call__(self, call: Callable[[], Awaitable[_T]]) -> _T: ...


async def once(call: Callable[[], Awaitable[_T]]) -> _T:
    """Tries a call once: for callers that wait and can try again themselves."""
    return await call()


def score_items(examples: ExampleSet | None, kind: Kind) -> tuple[str, ...]:
    """What scores of these examples are kept for: examples, by digest; for an encoder texts, by `text_item`."""
    if examples is None:
        return ()
    if kind == "encoder":
        return tuple(text_item(item) for item in contrastive.texts_of(examples))
    return tuple(dict.fromkeys(examples.digests))


def text_item(item: str) -> str:
    """SHA-256 of a text, 64 hex characters: what its embedding is kept for."""
    return hashlib.sha256(item.encode()).hexdigest()


@dataclass(slots=True)
class ScoreScope:
    """Whose scores are used, for which cocktail new ones are kept, who pays for them, and how patiently.

    Attributes:
        uid: the cocktail that new scores are kept for, until it is deleted. None: none is kept (a dry run, whose
            examples nobody could delete later).
        spent: grows by what engines work for it.
        retry: how often each model's engine calls are tried.
    """

    tenant: str
    uid: str | None
    spent: EngineTimeTotal = field(default_factory=EngineTimeTotal)
    retry: Retrying = once


class Scores:
    """Losses by model, on whatever the engine is.

    A decoder's or a reranker's loss of an example depends on nothing else, so losses are kept. An encoder's depends on
    the other examples' passages, so embeddings are kept and the losses computed from them. Both are kept per tenant.

    Args:
        executor: where losses are computed from embeddings, away from the event loop.
        truncate: by pool id, whether encoder inputs that are too long are cut.
    """

    def __init__(self, store: ScoreStore, executor: Executor, *, truncate: Mapping[str, bool]) -> None:
        self._store = store
        self._executor = executor
        self._truncate = truncate

    async def model_losses(
        self,
        engine: AnyEngine,
        names: Iterable[str],
        examples: ExampleSet,
        score_scope: ScoreScope,
        *,
        on_loss: Callable[[Mapping[str, float]], Awaitable[None]] | None = None,
    ) -> dict[str, list[float]]:
        """Loss (nats) of each example under models of the pool, by name in the order given.

        All are asked for at once, so that the engine can order its visits; models of equal parameters are one.

        Args:
            on_loss: awaited with the mean losses so far after each model.

        Raises:
            NotFiniteError: a model's loss is not finite.
            CocktailError: what the engine raised last, for the first model that failed; the others are dropped.
        """
        names = list(names)
        names_of: dict[str, list[str]] = {}
        for name in names:
            names_of.setdefault(engine.pool.member(name).fingerprint, []).append(name)
        losses: dict[str, list[float]] = {}

        async def measure(fingerprint: str, same: list[str]) -> None:
            recipe = one_hot(engine.pool, same[0], dtype=engine.dtype)
            example_losses = await self._losses(engine, recipe, examples, score_scope, label=repr(same[0]))
            losses.update(dict.fromkeys(same, example_losses))
            if on_loss is not None:
                await on_loss({name: mean(losses[name]) for name in names if name in losses})

        try:
            async with asyncio.TaskGroup() as group:
                for fingerprint, same in names_of.items():
                    group.create_task(measure(fingerprint, same))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return {name: losses[name] for name in names}

    async def mixture_losses(
        self,
        engine: AnyEngine,
        recipe: Recipe,
        examples: ExampleSet,
        score_scope: ScoreScope,
        rows: Sequence[int] | None = None,
    ) -> list[float]:
        """Loss (nats) of examples under a recipe.

        A decoder's or a reranker's losses are kept under the recipe's digest, so that a search that was broken off goes
        on where it was; an encoder's embeddings are not, since they are large and mixing is cheap.

        Args:
            rows: indices of the examples to score; None: all. An encoder's are scored against the passages of all.

        Raises:
            As `model_losses`.
        """
        return await self._losses(engine, recipe, examples, score_scope, rows, label="the mixture")

    async def _losses(
        self,
        engine: AnyEngine,
        recipe: Recipe,
        examples: ExampleSet,
        score_scope: ScoreScope,
        rows: Sequence[int] | None = None,
        *,
        label: str,
    ) -> list[float]:
        async def measure() -> Sequence[float]:
            if engine.kind == "encoder":
                return await self._from_embeddings(engine, recipe, examples, score_scope, rows)
            asked = examples if rows is None else examples.subset(rows)
            return await self._by_example(engine, recipe, asked, score_scope)

        losses = await score_scope.retry(measure)
        require_finite(losses, label, recipe.dtype, rows)
        return list(losses)

    async def _by_example(
        self, engine: ScoringEngine, recipe: Recipe, examples: ExampleSet, score_scope: ScoreScope
    ) -> Sequence[float]:
        loss_version = ranking.LOSS_VERSION if engine.kind == "reranker" else decoder.LOSS_VERSION
        rounding = {"dtype": recipe.dtype} | ({} if recipe.mode == "merged" else {"form": recipe.mode})
        variant = digest_of({"loss": loss_version, "text": engine.pool.text_digest, **rounding})
        unique = dict(zip(examples.digests, examples, strict=True))
        key = ScoreKey(recipe.only_model or recipe.digest, variant)
        kept = await self._store.losses(score_scope.tenant, key, list(unique))
        missing = {digest: example for digest, example in unique.items() if digest not in kept}
        if missing:
            scored = await score_scope.spent.of(engine.score(recipe, ExampleSet.of(missing.values())))
            new = dict(zip(missing, scored.losses, strict=True))
            if score_scope.uid is not None and all(map(math.isfinite, scored.losses)):
                await self._store.keep_losses(score_scope.uid, key, new)
            kept |= new
        return [kept[digest] for digest in examples.digests]

    async def _from_embeddings(
        self,
        engine: EmbeddingEngine,
        recipe: Recipe,
        examples: ExampleSet,
        score_scope: ScoreScope,
        rows: Sequence[int] | None,
    ) -> Sequence[float]:
        model = recipe.only_model
        truncate_to = engine.max_length if self._truncate.get(engine.pool.id, False) else None
        variant = digest_of(
            {"text": engine.pool.text_digest, "dtype": recipe.dtype, "prompt": "", "truncate_to": truncate_to}
        )
        by_digest = {text_item(item): item for item in contrastive.texts_of(examples, rows)}
        kept = (
            {}
            if model is None
            else await self._store.embeddings(score_scope.tenant, ScoreKey(model, variant), list(by_digest))
        )
        missing = [digest for digest in by_digest if digest not in kept]
        for start in range(0, len(missing), TEXTS_PER_CALL):
            some = missing[start : start + TEXTS_PER_CALL]
            # no prompt: what requests get unless they name one
            texts = [by_digest[digest] for digest in some]
            embedded = await score_scope.spent.of(engine.embed(recipe, texts, truncate_to=truncate_to, background=True))
            new = dict(zip(some, embedded.vectors, strict=True))
            if model is not None and score_scope.uid is not None and np.isfinite(embedded.vectors).all():
                await self._store.keep_embeddings(score_scope.uid, ScoreKey(model, variant), new)
            kept |= new
        embeddings = {item: kept[digest] for digest, item in by_digest.items()}
        loop = asyncio.get_running_loop()
        losses: Sequence[float] = await loop.run_in_executor(
            self._executor, contrastive.contrastive_losses, examples, embeddings, rows
        )
        return losses
