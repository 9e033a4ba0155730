"""Log-probabilities of the options of questions under the resident model: all questions of a request in one batch.

Questions about one input begin alike, and so do the options of a question: what they share is computed once, through
vLLM's prefix cache. Of a prompt whose log-probabilities are asked for, vLLM reads nothing from the cache, since of what
it finds there none are computed. Here only those of an option count, which is the prompt's end.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cocktail_serve.errors import EngineError, InvalidExamplesError, InvalidRequestError
from vllm_cocktail.output_logprobs import LABELS_ARG, OUTPUT_START_ARG
from vllm_cocktail.scoring import TokenizedExample, all_of, check_example, output_log_probs

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput

MAX_LABELS = 128
"""As many tokens as vLLM tells the log-probabilities of, beside the one that it samples."""


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
    def sequences(self) -> list[TokenizedExample]:
        """What the model may have said of each option, its label or its text."""
        labelled = (([label], len(self.prompt)) for label in self.labels)
        pairs = labelled if self.labels else zip(self.continuations, self.output_starts, strict=True)
        return [TokenizedExample(token_ids=self.prompt + rest, output_start=start) for rest, start in pairs]


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
    """Log-probabilities of the options of questions. All are in the engine at once, which batches them.

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
    return await all_of(
        _read_labels(engine, question, xargs, salt, shares_prefixes)
        if question.labels
        else _read_sequences(engine, question, xargs, salt, shares_prefixes)
        for question in questions
    )


def _check(engine: EngineClient, question: Options, index: int) -> None:
    config = engine.model_config
    for sequence in question.sequences:
        try:
            check_example(
                sequence, row=index + 1, max_model_len=config.max_model_len, vocab_size=config.get_vocab_size()
            )
        except InvalidExamplesError as error:
            raise InvalidRequestError(f"questions[{index}]: {error.message}", param=f"questions.{index}") from error


async def _read_labels(
    engine: EngineClient, question: Options, xargs: Mapping[str, Any] | None, salt: str, shares_prefixes: bool
) -> OptionsRead:
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    asked: dict[str, Any] = {"logprob_token_ids": question.labels}
    arguments = dict(xargs or {})
    if shares_prefixes:
        asked = {"prompt_logprobs": 0, "skip_reading_prefix_cache": False}
        arguments |= {OUTPUT_START_ARG: len(question.prompt), LABELS_ARG: question.labels}
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=arguments,
        **asked,
    )
    prompt = TokensPrompt(prompt_token_ids=question.prompt, cache_salt=salt)
    final: RequestOutput | None = None
    async for output in engine.generate(prompt, params, f"cocktail-decide-{secrets.token_hex(8)}"):
        final = output
    of_labels = [] if final is None else _of_labels(final, question.labels, of_prompt=shares_prefixes)
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


async def _read_sequences(
    engine: EngineClient, question: Options, xargs: Mapping[str, Any] | None, salt: str, shares_prefixes: bool
) -> OptionsRead:
    sequences = question.sequences
    reads = await all_of(_read_sequence(engine, sequence, xargs, salt, shares_prefixes) for sequence in sequences)
    return OptionsRead(
        log_probs=[log_prob for log_prob, _ in reads],
        # of the first, which is the question's own: the others find it
        num_cached=min(reads[0][1], len(question.prompt)),
        num_computed=sum(
            len(sequence.token_ids) - num_cached for sequence, (_, num_cached) in zip(sequences, reads, strict=True)
        ),
    )


async def _read_sequence(
    engine: EngineClient,
    sequence: TokenizedExample,
    xargs: Mapping[str, Any] | None,
    salt: str,
    shares_prefixes: bool,
) -> tuple[float, int]:
    """Log-probability (nats) of an option, and how many of its tokens were cached."""
    log_probs, num_cached = await output_log_probs(
        engine, sequence, xargs=xargs, cache_salt=salt, reads_cache=shares_prefixes
    )
    if shares_prefixes and any(map(math.isnan, log_probs)):
        # the cache held a part of the option too: what comes of it is computed here
        log_probs, num_cached = await output_log_probs(engine, sequence, xargs=xargs, cache_salt=salt)
    return math.fsum(log_probs), num_cached
