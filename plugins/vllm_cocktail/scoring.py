"""The loss of the resident model on tokenised examples, from vLLM's prompt log-probabilities."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict

from cocktail_serve.errors import EngineError, InvalidExamplesError
from vllm_cocktail.output_logprobs import OUTPUT_START_ARG

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput

_T = TypeVar("_T")


class TokenizedExample(BaseModel):
    """Tokens of an input and its output, and where the output starts."""

    model_config = ConfigDict(extra="forbid")

    token_ids: list[int]
    output_start: int


def check_example(example: TokenizedExample, *, row: int, max_model_len: int, vocab_size: int) -> None:
    """Refuses what the engine would refuse later, or would score wrongly.

    Raises:
        InvalidExamplesError: with the row number, from 1.
    """
    check_extent(len(example.token_ids), example.output_start, row=row, max_model_len=max_model_len)
    check_token_ids(example.token_ids, row=row, vocab_size=vocab_size)


def check_extent(num_tokens: int, output_start: int, *, row: int, max_model_len: int) -> None:
    """Of `check_example`, what does not look at the tokens."""
    if num_tokens >= max_model_len:
        raise InvalidExamplesError(
            f"{num_tokens} tokens; at most {max_model_len - 1} fit, since vLLM generates one more", row=row
        )
    if not 1 <= output_start < num_tokens:
        raise InvalidExamplesError(
            f"output_start {output_start} must lie between 1 and {num_tokens - 1}, inside the tokens", row=row
        )


def check_token_ids(token_ids: Sequence[int], *, row: int, vocab_size: int) -> None:
    """Of `check_example`, what looks at each token."""
    if not all(0 <= token < vocab_size for token in token_ids):
        raise InvalidExamplesError(f"token ids must lie between 0 and {vocab_size - 1}", row=row)


async def mean_losses(
    engine: EngineClient, examples: Sequence[TokenizedExample], *, xargs: Mapping[str, Any] | None = None
) -> list[float]:
    """Mean token cross-entropy of each example's output given its input, in nats; not finite where the model overflows.

    All examples are in the engine at once, which batches them.

    Args:
        xargs: what the requests bring for the worker: their coefficients, where recipes share a batch.

    Raises:
        InvalidExamplesError: an example that does not fit; nothing was computed.
        EngineError: the engine gave up on an example.
    """
    config = engine.model_config
    for row, example in enumerate(examples, start=1):
        check_example(example, row=row, max_model_len=config.max_model_len, vocab_size=config.get_vocab_size())
    return await all_of(_mean_loss(engine, example, xargs) for example in examples)


async def leaves_out_inputs(engine: EngineClient, *, xargs: Mapping[str, Any] | None = None) -> bool:
    """Whether the workers compute log-probabilities of outputs alone (`output_logprobs`), as those of V1 do.

    Raises:
        EngineError: the engine gave none.
    """
    example = TokenizedExample(token_ids=[0, 1, 2, 3], output_start=2)
    scored = await _score(engine, example, xargs, secrets.token_hex(16), reads_cache=False)
    return len([logprobs for logprobs in scored.prompt_logprobs or () if logprobs]) == 2


async def output_log_probs(
    engine: EngineClient,
    example: TokenizedExample,
    *,
    xargs: Mapping[str, Any] | None,
    cache_salt: str,
    reads_cache: bool = False,
) -> tuple[list[float], int]:
    """Log-probability (nats) of each token of an output, and how many of all tokens had been computed before.

    Args:
        reads_cache: whether computed blocks of the same salt are used. Where they reach into the output, the
            log-probabilities of its tokens there are NaN. Only for an engine that leaves out inputs.

    Raises:
        EngineError: the engine gave none.
    """
    scored = await _score(engine, example, xargs, cache_salt, reads_cache=reads_cache)
    assert scored.prompt_logprobs is not None
    output = example.token_ids[example.output_start :]
    # of the whole prompt where the workers do not leave out what is before its output
    of_output = scored.prompt_logprobs[-len(output) :]
    log_probs = [logprobs[token].logprob for token, logprobs in zip(output, of_output, strict=True) if logprobs]
    return log_probs, scored.num_cached_tokens or 0


async def all_of(calls: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """The results of calls that run at once; of the first that fails, the error, and the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return [task.result() for task in tasks]


async def _mean_loss(engine: EngineClient, example: TokenizedExample, xargs: Mapping[str, Any] | None) -> float:
    # no other request may tell from a prefix hit which examples were scored
    log_probs, _ = await output_log_probs(engine, example, xargs=xargs, cache_salt=secrets.token_hex(16))
    return -math.fsum(log_probs) / len(log_probs)


async def _score(
    engine: EngineClient,
    example: TokenizedExample,
    xargs: Mapping[str, Any] | None,
    cache_salt: str,
    *,
    reads_cache: bool,
) -> RequestOutput:
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    prompt = TokensPrompt(prompt_token_ids=example.token_ids, cache_salt=cache_salt)
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,  # the least that vLLM generates
        prompt_logprobs=0,  # of the prompt's own tokens only
        skip_reading_prefix_cache=not reads_cache,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={**(xargs or {}), OUTPUT_START_ARG: example.output_start},
    )
    final: RequestOutput | None = None
    async for output in engine.generate(prompt, params, f"cocktail-score-{secrets.token_hex(8)}"):
        final = output
    if final is None or not final.prompt_logprobs:
        raise EngineError("the engine gave no log-probabilities for an example")
    return final
