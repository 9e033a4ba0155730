"""Scores of documents for a query, by a cross-encoder in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from cocktail_serve.engines.base import Reranked, Scored
from cocktail_serve.engines.engine_time import CallTimer
from cocktail_serve.engines.in_process.batching import Batch
from cocktail_serve.engines.in_process.engine import PROBES, SentenceTransformersEngine
from cocktail_serve.engines.in_process.input_tokenizer import TextPair
from cocktail_serve.engines.in_process.pipeline import ModelJob
from cocktail_serve.engines.in_process.reranker_model import Reranker
from cocktail_serve.errors import ContextLengthError
from cocktail_serve.examples import ExampleSet
from cocktail_serve.recipe import Recipe
from cocktail_serve.scoring.ranking import pairs_of, ranking_losses

PAIRS_PER_CALL = 256
"""Pairs of one pass through the tokenizer while examples are scored: short enough to give way to traffic in between."""


@dataclass(eq=False, slots=True, kw_only=True)
class RerankingJob(ModelJob[Reranker]):
    """Pairs to score.

    Attributes:
        is_raw: logits are wanted, not the scores that the model's activation makes of them.
        max_tokens: to which the first and the second text of each pair are cut before they are paired; None: not.
        type_ids: token types by pair, where the model reads them.
    """

    param: ClassVar[str] = "documents"

    pairs: Sequence[TextPair]
    is_raw: bool = False
    max_tokens: tuple[int | None, int | None] = (None, None)
    type_ids: list[list[int]] | None = field(default=None, init=False)

    @property
    def features_key(self) -> None:
        return None

    def tokenize(self, model: Reranker) -> Sequence[Sequence[int]]:
        pairs = model.tokenizer.shorten_pairs(self.pairs, self.max_tokens)
        token_ids, self.type_ids = model.tokenize(pairs, truncate_to=self.truncate_to)
        model.tokenizer.check_length(token_ids, field=self.param, what=" together with the query")
        return token_ids

    def forward(self, model: Reranker, batch: Batch[RerankingJob]) -> np.ndarray:
        if self.type_ids is None:
            return model.forward(batch.token_ids)
        type_ids = [job.type_ids[index] for job, indices in batch.entries if job.type_ids for index in indices]
        return model.forward(batch.token_ids, type_ids)

    def finish(self, model: Reranker) -> None:
        if not self.is_raw and self.vectors is not None:
            self.vectors = model.activate(self.vectors)


class RerankerEngine(SentenceTransformersEngine[Reranker]):
    """A `RerankingEngine`."""

    kind: ClassVar[Literal["reranker"]] = "reranker"

    def _open_model(self) -> Reranker:
        return Reranker(self.pool.base.path, dtype=self.dtype, device=self._device)

    def _check_model(self, reranker: Reranker) -> None:
        pairs = [(PROBES[0], text) for text in PROBES]
        self._check_rows(reranker.forward(*reranker.tokenize(pairs, truncate_to=reranker.max_length)))

    async def check_examples(self, examples: ExampleSet) -> None:
        if self._truncates:
            return
        reranker = await self._ready()
        for number, pairs in enumerate(map(pairs_of, examples), start=1):
            tokenize = partial(reranker.tokenize, pairs)
            encoded, _ = await asyncio.wrap_future(self._pipeline.with_tokenizer(tokenize))
            longest = max(map(len, encoded))
            if longest > reranker.max_length:
                raise ContextLengthError(
                    f"row {number}: the query and its longest passage have {longest} tokens together, but the model "
                    f"takes at most {reranker.max_length}; shorten them, or set the pool's truncate",
                    param="examples",
                )

    async def rerank(
        self,
        recipe: Recipe,
        query: str,
        documents: Sequence[str],
        *,
        truncate_to: int | None = None,
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
        use_activation: bool = True,
        tenant: str = "",
    ) -> Reranked:
        with CallTimer() as timer:
            scores, num_tokens = await self._score(
                recipe,
                [(query, document) for document in documents],
                timer,
                truncate_to=truncate_to,
                max_tokens=(max_query_tokens, max_document_tokens),
                is_raw=not use_activation,
                tenant=tenant,
            )
        return Reranked(scores, num_tokens, timer.time)

    async def score(self, recipe: Recipe, examples: ExampleSet) -> Scored:
        groups = [pairs_of(example) for example in examples]
        pairs = [pair for group in groups for pair in group]
        calls = [pairs[start : start + PAIRS_PER_CALL] for start in range(0, len(pairs), PAIRS_PER_CALL)]
        with CallTimer() as timer:
            logits = [(await self._score(recipe, some, timer, is_raw=True, tenant=None))[0] for some in calls]
        return Scored(ranking_losses(examples, np.concatenate(logits)), timer.time)

    async def _score(
        self,
        recipe: Recipe,
        pairs: Sequence[TextPair],
        timer: CallTimer,
        *,
        truncate_to: int | None = None,
        max_tokens: tuple[int | None, int | None] = (None, None),
        is_raw: bool,
        tenant: str | None,
    ) -> tuple[np.ndarray, int]:
        """Scores of pairs, and the tokens read; without a tenant it is background work."""
        reranker = await self._ready()
        self._check_recipe(recipe)
        truncate_to = self._truncation(reranker, truncate_to, is_pair=True)
        if not pairs:
            return np.empty(0, dtype=np.float32), 0
        make = partial(RerankingJob, pairs=pairs, truncate_to=truncate_to, max_tokens=max_tokens, is_raw=is_raw)
        rows, num_tokens = await self._compute(
            recipe, len(pairs), make, timer, background=tenant is None, tenant=tenant or ""
        )
        return rows[:, 0], num_tokens
