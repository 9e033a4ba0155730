"""Log-probabilities of the options of questions under the resident model: all questions of a request in one batch.

Questions about one input begin alike, and so do the options of a question: what they share is computed once, through
vLLM's prefix cache. Of a prompt whose log-probabilities are asked for, vLLM reads nothing from the cache, since of what
it finds there none are computed. Here only those of an option count, which is the prompt's end.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cocktail_serve.errors import EngineError, InvalidExamplesError, InvalidRequestError
from vllm_cocktail.output_logprobs import LABELS_ARG, OUTPUT_START_ARG
from vllm_cocktail.scoring import TokenizedExample, all_of, check_extent, check_token_ids, output_log_probs

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput

MAX_LABELS = 128
"""As many tokens as vLLM tells the log-probabilities of, beside the one that it samples."""


MAX_AT_ONCE = 256
"""Sequences of one request in the engine: as many as vLLM has in a batch, unless told otherwise. A request may have
thousands, each with the whole input."""


class Options(BaseModel):
    """The options of a question in tokens; see `scoring.options.TokenizedOptions`."""

    model_config = ConfigDict(extra="forbid")

    prompt: list[int] = Field(min_length=1)
    labels: list[int] = Field([], max_length=MAX_LABELS)
    continuations: list[list[int]] = []
    output_starts: list[int] = []

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if bool(self.labels) == bool(self.continuations) or len(self.continuations) != len(self.output_starts):
            raise ValueError("give either labels, or continuations with an output_start for each")
        return self

    @property
    def endings(self) -> list[tuple[list[int], int]]:
        """What each option puts behind the prompt, its label or its text, and where it starts."""
        if self.labels:
            return [([label], len(self.prompt)) for label in self.labels]
        return list(zip(self.continuations, self.output_starts, strict=True))


@dataclass(frozen=True, slots=True)
class OptionsRead:
    """What came of the options of a question.

    Attributes:
        log_probs: of each option, in nats, among all that the model might say.
        num_cached: tokens of the question that had been computed before.
        num_computed: tokens that were computed for it.
    """

    log_probs: list[float]
    num_cached: int
    num_computed: int


async def read_options(
    engine: EngineClient,
    questions: Sequence[Options],
    *,
    xargs: Mapping[str, Any] | None = None,
    cache_salt: str | None = None,
    shares_prefixes: bool,
) -> list[OptionsRead]:
    """Log-probabilities of the options of questions. The engine has `MAX_AT_ONCE` together, which it batches: others
    come in between, and a prompt is written out when its turn comes.

    Args:
        xargs: as of `scoring.mean_losses`.
        cache_salt: of all prompts; None: one of their own, so that nobody else shares what is computed of them.
        shares_prefixes: whether the workers compute log-probabilities of a prompt's end alone (`output_logprobs`), so
            that its beginning may have been computed before; else each option is computed from its beginning.

    Raises:
        InvalidRequestError: options that do not fit; nothing was computed.
        EngineError: the engine gave up on an option.
    """
    salt = cache_salt or secrets.token_hex(16)
    for index, question in enumerate(questions):
        _check(engine, question, index)
    asked = _Asked(engine, xargs, salt, shares_prefixes, asyncio.Semaphore(MAX_AT_ONCE))
    return await all_of(
        _read_labels(asked, question) if question.labels else _read_sequences(asked, question) for question in questions
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """What all questions of a request have in common.

    Attributes:
        room: for a sequence in the engine.
    """

    engine: EngineClient
    xargs: Mapping[str, Any] | None
    salt: str
    shares_prefixes: bool
    room: asyncio.Semaphore


def _check(engine: EngineClient, question: Options, index: int) -> None:
    config = engine.model_config
    row, vocab_size = index + 1, config.get_vocab_size()
    try:
        # once, and not with each option: there may be thousands of tokens, and hundreds of options
        check_token_ids(question.prompt, row=row, vocab_size=vocab_size)
        for rest, start in question.endings:
            check_extent(len(question.prompt) + len(rest), start, row=row, max_model_len=config.max_model_len)
            check_token_ids(rest, row=row, vocab_size=vocab_size)
    except InvalidExamplesError as error:
        raise InvalidRequestError(f"questions[{index}]: {error.message}", param=f"questions.{index}") from error


async def _read_labels(asked: _Asked, question: Options) -> OptionsRead:
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    wanted: dict[str, Any] = {"logprob_token_ids": question.labels}
    arguments = dict(asked.xargs or {})
    if asked.shares_prefixes:
        wanted = {"prompt_logprobs": 0, "skip_reading_prefix_cache": False}
        arguments |= {OUTPUT_START_ARG: len(question.prompt), LABELS_ARG: question.labels}
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=arguments,
        **wanted,
    )
    prompt = TokensPrompt(prompt_token_ids=question.prompt, cache_salt=asked.salt)
    final: RequestOutput | None = None
    async with asked.room:
        async for output in asked.engine.generate(prompt, params, f"cocktail-decide-{secrets.token_hex(8)}"):
            final = output
    of_labels = [] if final is None else _of_labels(final, question.labels, of_prompt=asked.shares_prefixes)
    if final is None or len(of_labels) != len(question.labels):
        raise EngineError("the engine gave no log-probabilities of a question's labels")
    num_cached = final.num_cached_tokens or 0
    return OptionsRead(of_labels, num_cached, len(question.prompt) - num_cached)


def _of_labels(final: RequestOutput, labels: Sequence[int], *, of_prompt: bool) -> list[float]:
    """Log-probabilities of labels: behind a prompt, in the place of its own; else of the token that was sampled."""
    if of_prompt:
        told = [logprobs for logprobs in final.prompt_logprobs or () if logprobs]
        return [logprobs[label].logprob for label, logprobs in zip(labels, told, strict=False)]
    if not final.outputs or not final.outputs[0].logprobs:
        return []
    (first,) = final.outputs[0].logprobs
    return [first[label].logprob for label in labels]


async def _read_sequences(asked: _Asked, question: Options) -> OptionsRead:
    count = len(question.continuations)
    reads = await all_of(
        _read_sequence(asked, question, index, reads_cache=asked.shares_prefixes) for index in range(count)
    )
    if asked.shares_prefixes:
        _fill_in_common(question, reads)
        # the cache held a part of the option itself: what comes of it is computed here
        hidden = [index for index, (log_probs, _) in enumerate(reads) if any(map(math.isnan, log_probs))]
        again = await all_of(_read_sequence(asked, question, index, reads_cache=False) for index in hidden)
        for index, read in zip(hidden, again, strict=True):
            reads[index] = read
    return OptionsRead(
        log_probs=[math.fsum(log_probs) for log_probs, _ in reads],
        # of the first, which is the question's own: the others find it
        num_cached=min(reads[0][1], len(question.prompt)),
        num_computed=sum(
            len(question.prompt) + len(rest) - num_cached
            for rest, (_, num_cached) in zip(question.continuations, reads, strict=True)
        ),
    )


async def _read_sequence(asked: _Asked, question: Options, index: int, *, reads_cache: bool) -> tuple[list[float], int]:
    """Log-probability (nats) of each token of an option, and how many of all its tokens were cached."""
    async with asked.room:
        token_ids = question.prompt + question.continuations[index]
        sequence = TokenizedExample(token_ids=token_ids, output_start=question.output_starts[index])
        return await output_log_probs(
            asked.engine, sequence, xargs=asked.xargs, cache_salt=asked.salt, reads_cache=reads_cache
        )


def _fill_in_common(question: Options, reads: Sequence[tuple[list[float], int]]) -> None:
    """Options that begin alike find each other's beginning in the cache, where no log-probabilities are computed of it:
    they are those that were computed for another."""
    num_common, starts = len(question.prompt), question.output_starts
    known: dict[int, float] = {}
    for start, (log_probs, _) in zip(starts, reads, strict=True):
        of_common = zip(range(start, num_common), log_probs, strict=False)
        known |= {place: value for place, value in of_common if not math.isnan(value)}
    for start, (log_probs, _) in zip(starts, reads, strict=True):
        for place in range(start, num_common):
            if math.isnan(log_probs[place - start]):
                log_probs[place - start] = known.get(place, math.nan)
