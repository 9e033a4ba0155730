"""Losses from prompt log-probabilities, of an engine that only notes what it is asked: vLLM's types, no model."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cocktail_serve.errors import EngineError, InvalidExamplesError
from vllm_cocktail.output_logprobs import OUTPUT_START_ARG
from vllm_cocktail.scoring import TokenizedExample, mean_losses

# before a test runs: vLLM asks the machine by processes while it is imported
pytest.importorskip("vllm.sampling_params", reason="what is asked of the engine is in vLLM's own types")

MAX_MODEL_LEN = 8
VOCAB_SIZE = 50


class Engine:
    """Gives token `t` at place `i` the log-probability `-(t + i / 10)`, or what `logprob` says."""

    def __init__(self, logprob: float | None = None) -> None:
        self.model_config = SimpleNamespace(max_model_len=MAX_MODEL_LEN, get_vocab_size=lambda: VOCAB_SIZE)
        self.asked: list[tuple[dict[str, Any], Any, str]] = []
        self.logprob = logprob
        self.is_silent = False
        self.leaves_out_inputs = False

    async def generate(self, prompt: dict[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked.append((prompt, params, request_id))
        tokens: Sequence[int] = prompt["prompt_token_ids"]
        logprobs: list[Any] = [None]
        for place, token in enumerate(tokens[1:], start=1):
            value = -(token + place / 10) if self.logprob is None else self.logprob
            logprobs.append({token: SimpleNamespace(logprob=value)})
        if self.leaves_out_inputs:
            logprobs = [None, *logprobs[params.extra_args[OUTPUT_START_ARG] :]]
        yield SimpleNamespace(prompt_logprobs=[] if self.is_silent else logprobs, num_cached_tokens=0)


def example(tokens: list[int], output_start: int) -> TokenizedExample:
    return TokenizedExample(token_ids=tokens, output_start=output_start)


async def losses(engine: Any, *examples: TokenizedExample) -> list[float]:
    return await mean_losses(engine, examples)


@pytest.mark.parametrize("leaves_out_inputs", [False, True])
async def test_the_mean_over_the_outputs_tokens_alone(leaves_out_inputs: bool) -> None:
    engine = Engine()
    engine.leaves_out_inputs = leaves_out_inputs
    assert await losses(engine, example([9, 1, 2, 3], 2), example([5, 7], 1)) == pytest.approx([2.75, 7.1])


async def test_what_the_engine_is_asked_for() -> None:
    engine = Engine()
    await losses(engine, example([1, 2], 1), example([1, 2], 1))
    for prompt, params, _ in engine.asked:
        assert prompt["prompt_token_ids"] == [1, 2]
        assert (params.max_tokens, params.prompt_logprobs, params.detokenize) == (1, 0, False)
        assert params.extra_args == {OUTPUT_START_ARG: 1}
        assert params.skip_reading_prefix_cache
    salts = {prompt["cache_salt"] for prompt, _, _ in engine.asked}
    assert len(salts) == len({request_id for _, _, request_id in engine.asked}) == 2
    assert all(len(salt) <= 128 and salt.isalnum() for salt in salts)


@pytest.mark.parametrize(
    ("tokens", "output_start", "message"),
    [
        ([1] * MAX_MODEL_LEN, 1, "at most 7 fit"),
        ([1, 2], 0, "output_start 0"),
        ([1, 2], 2, "output_start 2"),
        ([1, VOCAB_SIZE], 1, "between 0 and 49"),
        ([1, -1], 1, "between 0 and 49"),
    ],
)
async def test_what_does_not_fit_is_named_before_anything_is_asked(
    tokens: list[int], output_start: int, message: str
) -> None:
    engine = Engine()
    with pytest.raises(InvalidExamplesError, match=f"row 2.*{message}"):
        await losses(engine, example([1, 2], 1), example(tokens, output_start))
    assert engine.asked == []


async def test_the_longest_that_fits() -> None:
    assert len(await losses(Engine(), example([1] * (MAX_MODEL_LEN - 1), 1))) == 1


@pytest.mark.parametrize("logprob", [-math.inf, math.nan])
async def test_a_loss_that_is_not_finite_is_told_as_it_is(logprob: float) -> None:
    (loss,) = await losses(Engine(logprob), example([1, 2], 1))
    assert not math.isfinite(loss)


async def test_an_engine_that_gives_no_log_probabilities() -> None:
    engine = Engine()
    engine.is_silent = True
    with pytest.raises(EngineError, match="no log-probabilities"):
        await losses(engine, example([1, 2], 1))
