"""Losses of examples, scored inside a decoder's server: tokenised here, sent in chunks, one turn after another."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cocktail_serve.decisions import PosedQuestion
from cocktail_serve.engines.base import Scored
from cocktail_serve.engines.engine_time import CallTimer
from cocktail_serve.engines.turns.base import Turns
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.vllm.errors import engine_error
from cocktail_serve.engines.vllm.request_body import recipe_fields
from cocktail_serve.engines.vllm.supervisor import Supervisor
from cocktail_serve.errors import DrainedError, ModelNotReadyError
from cocktail_serve.examples import ExampleSet
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.library_process import LibraryProcess
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe
from cocktail_serve.scoring.exported_tokenizer import ExampleTokenizer
from cocktail_serve.scoring.options import (
    ScoredExample,
    TokenizedDecision,
    TokenizedOptions,
    tokenize_options,
    tokenize_scored,
)
from cocktail_serve.scoring.tokenizer_cache import open_tokenizer, prepare_tokenizer
from vllm_cocktail.fence import RECIPE_HEADER
from vllm_cocktail.replies import DECIDE_PATH, SCORE_PATH, DecideReply, ScoreReply

SCORE_TOKENS = 4096
"""Tokens of one scoring request; between two the turn may be given up."""

TOKENIZED_KEPT = 4
"""Sets of examples of which the tokens are kept: a cocktail's are asked for once for each model, trial and check."""

TOKENIZER_RETRY_S = 5.0
"""How long a tokenizer that could not be loaded is not tried again: its files may be there by then."""

MAX_DRAINED_SCORES = 3
"""Scoring requests of one job ended by `drain_s` in a row before the job fails."""


class DecoderScorer:
    """Scores examples for one engine, in the background of its requests.

    Args:
        pool: its base's tokenizer is used, and its chat template.
        supervisor: keeps the server that computes.
        turns: let in what is scored, in the background of requests.
        kept: folder of the tokenizers as they are kept.
    """

    def __init__(
        self,
        pool: Pool,
        supervisor: Supervisor,
        turns: Turns,
        *,
        kept: Path,
    ) -> None:
        self._pool_id = pool.id
        self._folder = pool.base.path
        self._chat_template = pool.chat_template
        self._supervisor = supervisor
        self._turns = turns
        self._mode = pool.mode
        self._kept = kept
        self._libraries = LibraryProcess()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"tokenizer-{pool.id}")
        self._tokenizer: asyncio.Future[ExampleTokenizer] | None = None
        self._tried_at = 0.0
        self._tokenized: OrderedDict[tuple[str, int], list[ScoredExample]] = OrderedDict()

    def prepare_tokenizer(self) -> None:
        """Begins to make the tokenizer ready to be loaded, which is done when it is needed: a large one takes memory.

        A failure is raised where the tokenizer is needed; a pool may serve without.
        """
        self._executor.submit(prepare_tokenizer, self._folder, kept=self._kept, libraries=self._libraries)

    def _load_tokenizer(self) -> asyncio.Future[ExampleTokenizer]:
        """Begins to load the tokenizer, unless that has begun; the future fails with ConfigError where there is none.

        A failure is not kept for good: who needs the tokenizer `TOKENIZER_RETRY_S` later has it loaded again.
        """
        if self._tokenizer is None or self._has_failed(self._tokenizer):
            self._tried_at = time.monotonic()
            loop = asyncio.get_running_loop()
            load = partial(open_tokenizer, self._folder, kept=self._kept, libraries=self._libraries)
            self._tokenizer = loop.run_in_executor(self._executor, load)
            self._tokenizer.add_done_callback(lambda future: future.cancelled() or future.exception())
        return self._tokenizer

    def _has_failed(self, loading: asyncio.Future[ExampleTokenizer]) -> bool:
        is_over = loading.done() and (loading.cancelled() or loading.exception() is not None)
        return is_over and time.monotonic() - self._tried_at >= TOKENIZER_RETRY_S

    def close(self) -> None:
        """Ends the tokenizer's thread. May be called twice."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._libraries.close()

    async def tokenize(self, examples: ExampleSet) -> list[ScoredExample]:
        """The examples as they will be scored; those of the last sets are kept, by digest.

        Raises:
            ContextLengthError, InvalidExamplesError: as `scoring.options.tokenize_scored`.
            ConfigError: the pool's base has no tokenizer that tells where an output starts.
            ModelNotReadyError: the context length is not known yet, or the engine was stopped.
        """
        max_tokens = self._max_tokens()
        key = (examples.digest, max_tokens)
        if key in self._tokenized:
            self._tokenized.move_to_end(key)
            return self._tokenized[key]
        tokenizer = await asyncio.shield(self._load_tokenizer())
        tokenize = partial(
            tokenize_scored, tokenizer, examples, max_tokens=max_tokens, chat_template=self._chat_template
        )
        tokenized = await asyncio.get_running_loop().run_in_executor(self._executor, tokenize)
        self._tokenized[key] = tokenized
        if len(self._tokenized) > TOKENIZED_KEPT:
            self._tokenized.popitem(last=False)
        return tokenized

    async def tokenize_options(
        self, questions: Sequence[PosedQuestion], chat_template: ChatTemplate | None
    ) -> list[TokenizedOptions]:
        """The options of questions as they will be read.

        Args:
            chat_template: of the model that is asked; None: the pool's.

        Raises:
            ContextLengthError, InvalidRequestError: as `scoring.options.tokenize_options`.
            ConfigError, ModelNotReadyError: as `tokenize`.
        """
        max_tokens = self._max_tokens()
        tokenizer = await asyncio.shield(self._load_tokenizer())
        tokenize = partial(
            tokenize_options,
            tokenizer,
            questions,
            max_tokens=max_tokens,
            chat_template=chat_template or self._chat_template,
        )
        return await asyncio.get_running_loop().run_in_executor(self._executor, tokenize)

    def _max_tokens(self) -> int:
        max_model_len = self._supervisor.max_model_len
        if max_model_len is None:
            raise ModelNotReadyError(
                f"the engine of pool {self._pool_id!r} is starting, so its context length is not known yet"
            )
        if self._supervisor.state == "stopped":
            raise ModelNotReadyError("the server is shutting down")
        return max_model_len - 1

    async def score(self, recipe: Recipe, examples: ExampleSet) -> Scored:
        """Loss (nats) of each example under a recipe, in as many turns as it takes; NaN where it is not finite.

        Raises:
            CocktailError: the engine failed, or answered with an error; see `engine_error`.
            DrainedError: too many turns in a row ended before one request had its answer.
        """
        losses: list[float] = []
        num_drained = 0
        with CallTimer() as timer:
            tokenized = await self.tokenize(examples)
            while len(losses) < len(tokenized):
                try:
                    self._supervisor.check_available()
                    with await self._turns.acquire(recipe, background=True) as lease, timer.scoring():
                        timer.add(mixing_s=lease.mixing_s)
                        losses += await self._score_some(lease, recipe, tokenized[len(losses) :])
                    num_drained = 0
                except DrainedError:
                    num_drained += 1
                    if num_drained == MAX_DRAINED_SCORES:
                        raise
        return Scored(losses, timer.time)

    async def _score_some(self, lease: Lease, recipe: Recipe, tokenized: Sequence[ScoredExample]) -> list[float]:
        """Losses of the first examples: all, unless the turn ends."""
        losses: list[float] = []
        for chunk in _chunks(tokenized):
            if losses and lease.should_yield:
                break
            try:
                with lease.interruptible():
                    losses += await self._score_chunk(recipe, chunk)
            except DrainedError:
                if losses:
                    break
                raise
        return losses

    async def _score_chunk(self, recipe: Recipe, chunk: Sequence[ScoredExample]) -> list[float]:
        decisions = [example for example in chunk if isinstance(example, TokenizedDecision)]
        if decisions:  # and nothing else: see `examples.parse_examples`
            answer: DecideReply = await self._ask(
                recipe, DECIDE_PATH, {"questions": [example.options for example in decisions]}
            )
            return [
                example.loss([math.nan if value is None else value for value in log_probs])
                for example, log_probs in zip(decisions, answer["log_probs"], strict=True)
            ]
        reply: ScoreReply = await self._ask(recipe, SCORE_PATH, {"examples": chunk})
        return [math.nan if loss is None else float(loss) for loss in reply["losses"]]

    async def _ask(self, recipe: Recipe, path: str, body: Mapping[str, Any]) -> Any:
        status, answer = await self._supervisor.require_server().call(
            "POST",
            path,
            {**recipe_fields(recipe, mode=self._mode), **body},
            timeout_s=None,
            headers={RECIPE_HEADER: recipe.digest},
        )
        if status != 200:
            raise engine_error(status, answer, what="scoring")
        return answer


def _chunks(tokenized: Sequence[ScoredExample]) -> list[list[ScoredExample]]:
    """In order, at most `SCORE_TOKENS` tokens each, at least one example."""
    chunks: list[list[ScoredExample]] = []
    room = 0
    for example in tokenized:
        num_tokens = example.options.num_tokens if isinstance(example, TokenizedDecision) else len(example.token_ids)
        if not chunks or num_tokens > room:
            chunks.append([])
            room = SCORE_TOKENS
        chunks[-1].append(example)
        room -= num_tokens
    return chunks
