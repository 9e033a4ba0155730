"""The loss of the resident model on tokenised examples, from vLLM's prompt log-probabilities."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from cocktail_serve.errors import EngineError, InvalidExamplesError
from vllm_cocktail.output_logprobs import OUTPUT_START_ARG

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput


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
    num_tokens = len(example.token_ids)
    if num_tokens >= max_model_len:
        raise InvalidExamplesError(
            f"{num_tokens} tokens; at most {max_model_len - 1} fit, since vLLM generates one more", row=row
        )
    if not 1 <= example.output_start < num_tokens:
        raise InvalidExamplesError(
            f"output_start {example.output_start} must lie between 1 and {num_tokens - 1}, inside the tokens", row=row
        )
    if not all(0 <= token < vocab_size for token in example.token_ids):
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
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_mean_loss(engine, example, xargs)) for example in examples]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return [task.result() for task in tasks]


async def _mean_loss(engine: EngineClient, example: TokenizedExample, xargs: Mapping[str, Any] | None) -> float:
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    request_id = f"cocktail-score-{secrets.token_hex(8)}"
    prompt = TokensPrompt(
        prompt_token_ids=example.token_ids,
        # no other request may tell from a prefix hit which examples were scored
        cache_salt=secrets.token_hex(16),
    )
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,  # the least that vLLM generates
        prompt_logprobs=0,  # of the prompt's own tokens only
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={**(xargs or {}), OUTPUT_START_ARG: example.output_start},
    )
    final: RequestOutput | None = None
    async for output in engine.generate(prompt, params, request_id):
        final = output
    if final is None or not final.prompt_logprobs:
        raise EngineError("the engine gave no log-probabilities for an example")
    output = example.token_ids[example.output_start :]
    # of the whole prompt where the workers do not leave out what is before its output
    of_output = final.prompt_logprobs[-len(output) :]
    log_probs = [logprobs[token].logprob for token, logprobs in zip(output, of_output, strict=True)]
    return -math.fsum(log_probs) / len(log_probs)
