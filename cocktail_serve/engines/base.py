"""The seam between what mixes exist (cocktails, gateway) and what computes them (vLLM, sentence-transformers, fake)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from cocktail_serve.decisions import PosedQuestion
from cocktail_serve.dtypes import DType
from cocktail_serve.engines.engine_time import EngineTime
from cocktail_serve.engines.recipe_names import NamesOf
from cocktail_serve.engines.snapshot import EngineSnapshot
from cocktail_serve.examples import ExampleSet
from cocktail_serve.generation_settings import GenerationSettings
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
"""What a generation engine answers, under the paths of OpenAI's API: the gateway's and the engine's own alike."""

TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"
"""What its tokenizer answers, under the paths of vLLM's API."""

DECISIONS_PATH = "/v1/decisions"
"""What the gateway alone answers: the engine is asked for log-probabilities."""

OPERATOR_RETRY_S = 30.0
"""Seconds that a client is told to wait where the operator has drained an engine or pinned another model."""


@dataclass(frozen=True, slots=True)
class MixedAhead:
    """A recipe is mixed."""

    engine_time: EngineTime = field(default_factory=EngineTime)


class Engine(Protocol):
    """What every engine does for the pool it owns. All methods run on the event loop and never block it, but one.

    How long it worked is part of each result, and of each error that is raised: see `engine_time`.
    """

    pool: Pool
    dtype: DType
    """dtype of its parameters: what recipes for this engine round to."""

    @property
    def kind(self) -> Literal["decoder", "encoder", "reranker"]:
        """What it computes: tells which of `AnyEngine` it is."""
        ...

    @property
    def max_model_len(self) -> int | None:
        """Tokens that its models take, special ones included; None: not known yet."""
        ...

    def name_recipes(self, names_of: NamesOf) -> None:
        """Has the log of mixtures say what the recipes are served as."""
        ...

    def check_start(self) -> Sequence[str]:
        """Looks for what would end a start, as far as that can be seen without serving. Blocks; instead of `start`.

        Returns:
            What ends no start, and is not what was meant.

        Raises:
            CocktailError: a start would fail, or everything asked afterwards; says why.
        """
        ...

    async def start(self) -> None:
        """Begins to start in the background and returns; `snapshot` tells when it is ready."""
        ...

    async def stop(self) -> None:
        """Ends every request and every process it started. May be called twice."""
        ...

    async def snapshot(self, *, deadline_s: float) -> EngineSnapshot:
        """What it does now. Asks the engine itself, not a flag; a missed deadline is not ready. Never raises."""
        ...

    async def check_examples(self, examples: ExampleSet) -> None:
        """Raises what would fail later: a row longer than the context (ContextLengthError with its number)."""
        ...

    async def mix_ahead(self, recipe: Recipe) -> MixedAhead:
        """Mixes the recipe, so that the first request finds it (resident or in the cache of merged parameters)."""
        ...

    def forget(self, recipe_digest: str) -> None:
        """Frees cached parameters of a recipe once nothing in flight uses them."""
        ...

    def drain(self, is_drained: bool, *, replica: int | None = None) -> None:
        """Lets what is in flight finish and nobody in (ModelNotReadyError); or lets requests in again.

        Args:
            replica: the number of the one that is meant, while requests go to the others; None: all.

        Raises:
            NotFoundError: there is no such replica.
        """
        ...

    def pin(self, recipe: Recipe | None, *, replica: int | None = None) -> None:
        """Keeps a recipe resident and sends requests for others away; None: no longer.

        Args:
            replica: as of `drain`.

        Raises:
            InvalidRequestError: the engine's recipes do not take turns.
            NotFoundError: there is no such replica.
        """
        ...

    async def change_pool(self, pool: Pool) -> None:
        """Takes experts in or out: the pool is the old one but for them.

        Raises:
            StorageError: the engine's server could not be told; nothing has changed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Background:
    """How a request gives way that nobody waits for.

    Attributes:
        is_broken_off: whether it ends with `DrainedError` as soon as requests wait for the turn, or the slot, that it
            takes; else it may finish as those may.
    """

    is_broken_off: bool = True


@dataclass(frozen=True, slots=True)
class Forwarded:
    """An answer of a generation engine on its way back; its errors are raised instead.

    Attributes:
        body: the whole body of a plain answer, or None while it streams.
        events: server-sent events as raw `data:` payloads, without the prefix and `[DONE]`; empty for plain answers.
        settle: told the tokens that the answer took, read and generated, once they are known, also after the
            answer has ended (`Lease.settle`): turns are fair by them.
    """

    body: bytes | None
    events: AsyncIterator[bytes] | None
    settle: Callable[[int], object] = lambda _: None


@dataclass(frozen=True, slots=True)
class Scored:
    """Losses of examples.

    Attributes:
        losses: in nats, one for each example, in their order; NaN where it is not finite.
    """

    losses: list[float]
    engine_time: EngineTime = field(default_factory=EngineTime)


@dataclass(frozen=True, slots=True)
class Decided:
    """How likely the options of questions are.

    Attributes:
        log_probs: of each option of each question, in nats, among all that the model might say; NaN where it is not
            finite.
        num_tokens: tokens read: of each question once, with its input, and behind it of each option.
        num_cached: those of them that had been computed before.
    """

    log_probs: list[list[float]]
    num_tokens: int
    num_cached: int


@runtime_checkable
class ScoringEngine(Engine, Protocol):
    """An engine whose loss of an example depends on nothing else."""

    @property
    def kind(self) -> Literal["decoder", "reranker"]: ...

    async def score(self, recipe: Recipe, examples: ExampleSet) -> Scored:
        """Loss (nats) of each example under `recipe`, which gives way to requests: of a decoder the mean token
        cross-entropy of its output given its input, of a reranker the cross-entropy of its positives among its
        negatives."""
        ...


@runtime_checkable
class GenerationEngine(ScoringEngine, Protocol):
    """A decoder behind an OpenAI server of its own. `engines.build_engine` makes one: a `VLLMEngine`."""

    @property
    def kind(self) -> Literal["decoder"]: ...

    async def server_metrics(self, *, deadline_s: float) -> Sequence[Mapping[str, float]]:
        """What the server of each replica counts itself, by the server's names, those of counters ending in `_total`;
        empty where it does not answer in time. Never raises."""
        ...

    def begin_restart(self, *, drain_s: float) -> None:
        """Begins to start its servers again, one after the other, while the others answer; `snapshot` tells how far it
        is.

        Args:
            drain_s: how long what a server has in flight may take before it is ended with `DrainedError`, seconds.

        Raises:
            InvalidRequestError: there is only one: nobody would answer meanwhile.
            ConflictError: that goes on already.
            ModelNotReadyError: the operator has drained them.
        """
        ...

    async def ask_tokenizer(
        self, path: str, body: Mapping[str, Any], *, generation: GenerationSettings | None = None
    ) -> bytes:
        """The answer of its tokenizer, as its server gives it. No parameters take part, so no turn is waited for.

        Args:
            path: `TOKENIZE_PATH` or `DETOKENIZE_PATH`.
            body: vLLM's, already under the field policy.
            generation: as of `forward`: messages are rendered as they are for answers.

        Raises:
            ModelNotReadyError: the engine is starting or restarting.
            EngineError: it failed or died meanwhile.
            InvalidRequestError: it refused the request.
        """
        ...

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
        """Reads the options of questions when it is `recipe`'s turn: all in one batch, what they share computed once.

        Args:
            generation: as of `forward`: messages are rendered as they are for answers.
            cache_salt: the request's own, beside those of its tenant and recipe.
            background: as of `forward`.

        Raises:
            ContextLengthError, InvalidRequestError: as `scoring.options.tokenize_options`.
            ConfigError: the pool's base has no tokenizer that tells where an output starts.
            CocktailError: as `forward`.
        """
        ...

    def forward(
        self,
        recipe: Recipe,
        path: str,
        body: Mapping[str, Any],
        *,
        tenant: str,
        generation: GenerationSettings | None = None,
        background: Background | None = None,
    ) -> AbstractAsyncContextManager[Forwarded]:
        """Sends an OpenAI body (already under the field policy) when it is `recipe`'s turn.

        The turn is held until the context exits. Limits of the tenant are the caller's: here requests only wait.

        Args:
            generation: what the model takes where the body does not say; None: what the engine itself takes, which is
                the base's.
            background: of what gives way to requests: it waits as long as it takes, and is charged to nobody's turn.
                While tenants ask, no more than one such request is begun.

        Raises:
            QueueTimeoutError: its turn did not come within `queue_timeout_s`.
            ModelNotReadyError: the engine is starting or restarting and was not ready in that time.
            EngineError: the engine failed or died while it held the request; inside `events` too.
            InvalidRequestError: the engine refused the request; inside `events` too.
            DrainedError: the request outlived `drain_s` while others waited; inside `events` too.
        """
        ...


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A text as a model in this process reads it.

    Attributes:
        token_ids: in order.
        tokens: what the vocabulary calls each of them.
    """

    token_ids: list[int]
    tokens: list[str]


@runtime_checkable
class TextEngine(Engine, Protocol):
    """An engine with a tokenizer in this process."""

    @property
    def max_length(self) -> int:
        """Tokens of an input (of rerankers: of a pair), special ones included. Raises ModelNotReadyError until the
        model is loaded."""
        ...

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> Tokenized:
        """The tokens of a text, of any length.

        Raises:
            ModelNotReadyError: the model is not loaded.
            InvalidRequestError: no tokenizer takes the text.
        """
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text that tokens stand for, special ones included.

        Raises:
            ModelNotReadyError: the model is not loaded.
            InvalidRequestError: an id that the model does not know.
        """
        ...


@dataclass(frozen=True, slots=True)
class Embedded:
    """Embeddings of one request.

    Attributes:
        vectors: `[N, D]` float32, in the order of the inputs, pooled and normalised by the model's own modules.
        num_tokens: tokens the model read, special tokens included, truncated ones not.
    """

    vectors: np.ndarray
    num_tokens: int
    engine_time: EngineTime = field(default_factory=EngineTime)


@runtime_checkable
class EmbeddingEngine(TextEngine, Protocol):
    """An encoder in this process; recipes share one module and differ in parameters only."""

    @property
    def kind(self) -> Literal["encoder"]: ...

    @property
    def dimension(self) -> int:
        """Size of an embedding. Raises ModelNotReadyError until the model is loaded."""
        ...

    async def embed(
        self,
        recipe: Recipe,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        *,
        prompt: str = "",
        truncate_to: int | None = None,
        dimensions: int | None = None,
        background: bool = False,
        tenant: str = "",
    ) -> Embedded:
        """Embeds texts (or token ids, special tokens included) under `recipe`.

        Args:
            tenant: whose request it is: passes are shared out between tenants by tokens.
            prompt: text put before each input.
            truncate_to: inputs longer than this many tokens are cut there; None: too long is an error.
            dimensions: leading dimensions to keep, renormalised if the model normalises; None: all.
            background: give way to requests that are not.

        Raises:
            ContextLengthError: an input is too long; carries `input.{index}`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Reranked:
    """Scores of one request.

    Attributes:
        scores: `[N]` float32, one for each document, in their order.
        num_tokens: tokens the model read, query and special tokens included for each document.
    """

    scores: np.ndarray
    num_tokens: int
    engine_time: EngineTime = field(default_factory=EngineTime)


@runtime_checkable
class RerankingEngine(ScoringEngine, TextEngine, Protocol):
    """A cross-encoder in this process; recipes share one module and differ in parameters only."""

    @property
    def kind(self) -> Literal["reranker"]: ...

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
        """Scores documents for a query under `recipe`.

        Args:
            tenant: as `EmbeddingEngine.embed`.
            truncate_to: pairs of query and document longer than this many tokens are cut there, the longer text
                first; None: too long is an error.
            max_query_tokens: the query is cut to this many tokens, special tokens not counted, before the two are
                paired; None: not.
            max_document_tokens: likewise each document.
            use_activation: whether the model's activation is applied; else the scores are logits.

        Raises:
            ContextLengthError: a pair is too long; carries `documents.{index}`.
        """
        ...


AnyEngine: TypeAlias = GenerationEngine | EmbeddingEngine | RerankingEngine
"""The engine of a pool. `kind` tells which it is, to type checkers too: nothing is cast or probed for methods."""
