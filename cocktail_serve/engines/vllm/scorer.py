"""Losses of examples, scored inside a decoder's server: sent in chunks of tokens, one turn after another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cocktail_serve.decisions import PosedQuestion
from cocktail_serve.engines.base import Scored
from cocktail_serve.engines.engine_time import CallTimer
from cocktail_serve.engines.line_place import LinePlace
from cocktail_serve.engines.turns.base import Turns
from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.engines.vllm.errors import engine_error
from cocktail_serve.engines.vllm.example_tokens import ExampleTokens
from cocktail_serve.engines.vllm.request_body import recipe_fields
from cocktail_serve.engines.vllm.supervisor import Supervisor
from cocktail_serve.errors import DrainedError, ModelNotReadyError
from cocktail_serve.examples import ExampleSet
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe
from cocktail_serve.scoring.options import ScoredExample, TokenizedDecision, TokenizedOptions
from vllm_cocktail.fence import RECIPE_HEADER
from vllm_cocktail.replies import DECIDE_PATH, SCORE_PATH, DecideReply, ScoreReply

SCORE_TOKENS = 4096
"""Tokens of one scoring request; between two the turn may be given up."""

MAX_DRAINED_SCORES = 3
"""Scoring requests of one job ended by `drain_s` in a row before the job fails."""


class DecoderScorer:
    """Scores examples for one engine, in the background of its requests.

    Args:
        supervisor: keeps the server that computes.
        turns: let in what is scored, in the background of requests.
        tokens: of the pool's examples.
    """

    def __init__(
        self,
        pool: Pool,
        supervisor: Supervisor,
        turns: Turns,
        tokens: ExampleTokens,
    ) -> None:
        self._pool_id = pool.id
        self._supervisor = supervisor
        self._turns = turns
        self._mode = pool.mode
        self._tokens = tokens

    async def tokenize(self, examples: ExampleSet) -> list[ScoredExample]:
        """The examples as they will be scored.

        Raises:
            ContextLengthError, InvalidExamplesError, ConfigError: as `ExampleTokens.of`.
            ModelNotReadyError: the context length is not known yet, or the engine was stopped.
        """
        return await self._tokens.of(examples, max_tokens=self._max_tokens())

    async def tokenize_options(
        self, questions: Sequence[PosedQuestion], chat_template: ChatTemplate | None
    ) -> list[TokenizedOptions]:
        """The options of questions as they will be read.

        Args:
            chat_template: of the model that is asked; None: the pool's.

        Raises:
            ContextLengthError, InvalidRequestError, ConfigError: as `ExampleTokens.options_of`.
            ModelNotReadyError: as `tokenize`.
        """
        return await self._tokens.options_of(questions, chat_template, max_tokens=self._max_tokens())

    def _max_tokens(self) -> int:
        max_model_len = self._supervisor.max_model_len
        if max_model_len is None:
            raise ModelNotReadyError(
                f"the engine of pool {self._pool_id!r} is starting, so its context length is not known yet"
            )
        if self._supervisor.state == "stopped":
            raise ModelNotReadyError("the server is shutting down")
        return max_model_len - 1

    async def score(self, recipe: Recipe, examples: ExampleSet, *, place: LinePlace | None = None) -> Scored:
        """Loss (nats) of each example under a recipe, in as many turns as it takes; NaN where it is not finite.

        Args:
            place: by which it can be called out of the line for a turn; what was scored until then is lost.

        Raises:
            RecalledError: it was called away.
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
                    with await self._turns.acquire(recipe, background=True, place=place) as lease, timer.scoring():
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
