"""Whether an engine computes what it did before vLLM reloaded its parameters: a few greedy tokens, asked twice."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cocktail_serve.errors import EngineError

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

_PROMPT_TOKENS = 16
_ANSWER_TOKENS = 8

TOLERANCE = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.1}
"""How far a log-probability may move by rounding, in nats, by the engine's dtype. Alone in the engine, the same tokens
give the same bits; parameters in another order than the kernel reads move it by tenths and whole nats."""


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """Greedy tokens behind a fixed prompt, and the log-probability of each."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]

    def moved(self, other: ProbeAnswer) -> float:
        """Largest difference of log-probabilities, in nats, up to the first token that differs.

        That one's own counts, and where two tokens are as likely, it is small. Infinite where one of them is none.
        """
        largest = 0.0
        for mine, theirs, one, two in zip(self.tokens, other.tokens, self.log_probs, other.log_probs, strict=True):
            difference = abs(one - two)
            largest = math.inf if math.isnan(difference) else max(largest, difference)
            if mine != theirs:
                break
        return largest


async def ask(engine: EngineClient, *, xargs: Mapping[str, Any] | None = None) -> ProbeAnswer:
    """What the engine answers now, while no request can reach it.

    Args:
        xargs: as `scoring.mean_losses`.

    Raises:
        EngineError: it gave no answer.
    """
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    config = engine.model_config
    num_prompt = max(1, min(_PROMPT_TOKENS, config.max_model_len - _ANSWER_TOKENS))
    prompt = TokensPrompt(
        prompt_token_ids=[number % config.get_vocab_size() for number in range(1, num_prompt + 1)],
        cache_salt=secrets.token_hex(16),  # nothing of it is read again
    )
    params = SamplingParams(
        temperature=0.0,
        max_tokens=max(1, min(_ANSWER_TOKENS, config.max_model_len - num_prompt)),
        logprobs=0,  # of the tokens themselves only, which every engine gives
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=dict(xargs or {}),
    )
    async for output in engine.generate(prompt, params, f"cocktail-reload-{secrets.token_hex(8)}"):
        (answer,) = output.outputs
        if answer.logprobs is not None:
            tokens = tuple(answer.token_ids)
            steps = zip(tokens, answer.logprobs, strict=True)
            return ProbeAnswer(tokens, tuple(float(step[token].logprob) for token, step in steps))
    raise EngineError("the engine gave no log-probabilities of its own tokens")
