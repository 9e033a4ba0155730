"""Options read in an engine that only notes what it is asked: vLLM's types, no model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from cocktail_serve.errors import EngineError, InvalidRequestError
from vllm_cocktail import decisions
from vllm_cocktail.decisions import Options, OptionsRead, read_options
from vllm_cocktail.output_logprobs import LABELS_ARG, OUTPUT_START_ARG
from vllm_cocktail.scoring import leaves_out_inputs

pytest.importorskip("vllm.sampling_params", reason="what is asked of the engine is in vLLM's own types")

MAX_MODEL_LEN = 12
VOCAB_SIZE = 50


class Engine:
    """Gives token `t` the log-probability `-t`, wherever it stands.

    Attributes:
        num_cached: tokens that it says it found in its cache, where it may look there.
    """

    def __init__(self, *, num_cached: int = 0, leaves_out_inputs: bool = True) -> None:
        self.model_config = SimpleNamespace(max_model_len=MAX_MODEL_LEN, get_vocab_size=lambda: VOCAB_SIZE)
        self.num_cached = num_cached
        self.leaves_out_inputs = leaves_out_inputs
        self.asked: list[tuple[dict[str, Any], Any]] = []
        self.is_silent = False

    async def generate(self, prompt: dict[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked.append((prompt, params))
        tokens = prompt["prompt_token_ids"]
        reads = not params.skip_reading_prefix_cache
        cached = min(self.num_cached, len(tokens) - 1) if reads else 0
        if self.is_silent:
            yield SimpleNamespace(prompt_logprobs=None, outputs=[], num_cached_tokens=0)
            return
        if params.logprob_token_ids:
            first = {token: SimpleNamespace(logprob=-float(token)) for token in params.logprob_token_ids}
            yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=[first])], num_cached_tokens=cached)
            return
        if labels := params.extra_args.get(LABELS_ARG):
            told = [{token: SimpleNamespace(logprob=-float(token))} for token in labels]
            yield SimpleNamespace(prompt_logprobs=[None, *told], num_cached_tokens=cached)
            return
        start = params.extra_args[OUTPUT_START_ARG] if self.leaves_out_inputs else 1
        of_tokens = [
            {token: SimpleNamespace(logprob=-float(token) if place > cached or not cached else math.nan)}
            for place, token in enumerate(tokens)
        ]
        yield SimpleNamespace(prompt_logprobs=[None, *of_tokens[start:]], num_cached_tokens=cached)


def verbatim(prompt: list[int], *continuations: list[int]) -> Options:
    return Options(prompt=prompt, continuations=list(continuations), output_starts=[len(prompt)] * len(continuations))


async def read(engine: Any, *questions: Options, **options: Any) -> list[OptionsRead]:
    return await read_options(engine, questions, **{"cache_salt": "salt", "shares_prefixes": True, **options})


async def test_the_log_probability_of_a_text_is_the_sum_over_its_tokens() -> None:
    engine = Engine(num_cached=3)
    (found,) = await read(engine, verbatim([9, 9, 9, 9], [1, 2], [5]), xargs={"row": []})
    assert found == OptionsRead(log_probs=[-3.0, -5.0], num_cached=3, num_computed=(6 - 3) + (5 - 3))
    for prompt, params in engine.asked:
        assert prompt["cache_salt"] == "salt"
        assert (params.max_tokens, params.prompt_logprobs, params.skip_reading_prefix_cache) == (1, 0, False)
        assert params.extra_args == {"row": [], OUTPUT_START_ARG: 4}


async def test_a_cache_that_reaches_into_an_option_is_not_used_for_it() -> None:
    engine = Engine(num_cached=5)
    (found,) = await read(engine, verbatim([9, 9, 9, 9, 9], [1, 2, 3]), cache_salt="salt")
    assert (found.log_probs, found.num_cached, found.num_computed) == ([-6.0], 0, 8)
    assert [params.skip_reading_prefix_cache for _, params in engine.asked] == [False, True]
    (found,) = await read(engine, verbatim([9] * 6, [1, 2, 3]))
    assert (found.log_probs, found.num_cached, found.num_computed) == ([-6.0], 5, 4), "the last before it was computed"


async def test_an_engine_that_scores_whole_prompts_shares_nothing() -> None:
    engine = Engine(num_cached=3, leaves_out_inputs=False)
    assert not await leaves_out_inputs(engine)  # type: ignore[arg-type]
    assert await leaves_out_inputs(Engine())  # type: ignore[arg-type]
    (found,) = await read(engine, verbatim([9, 9, 9, 9], [1, 2], [5]), shares_prefixes=False)
    assert (found.log_probs, found.num_cached) == ([-3.0, -5.0], 0)
    assert all(params.skip_reading_prefix_cache for _, params in engine.asked)


async def test_labels_are_read_from_the_first_token_alone() -> None:
    engine = Engine(num_cached=3)
    found = await read(engine, Options(prompt=[9] * 5, labels=[4, 2]), verbatim([9] * 5, [1]), cache_salt=None)
    assert found[0] == OptionsRead(log_probs=[-4.0, -2.0], num_cached=3, num_computed=2)
    assert found[1].log_probs == [-1.0]
    (prompt, params), (other, _) = engine.asked
    assert (params.max_tokens, params.prompt_logprobs, params.skip_reading_prefix_cache) == (1, 0, False)
    assert params.extra_args == {OUTPUT_START_ARG: 5, LABELS_ARG: [4, 2]}
    assert prompt["cache_salt"] == other["cache_salt"] != "salt", "one of their own"


async def test_labels_of_v1_are_asked_for_in_no_way_that_touches_other_requests() -> None:
    """There, `logprob_token_ids` of one request take from all others of a step what they ask for."""
    engine = Engine()
    await read(engine, Options(prompt=[9] * 5, labels=[4, 2]))
    assert [params.logprob_token_ids for _, params in engine.asked] == [None]
    (found,) = await read(engine, Options(prompt=[9] * 5, labels=[4, 2]), shares_prefixes=False)
    assert found.log_probs == [-4.0, -2.0]
    assert engine.asked[-1][1].logprob_token_ids == [4, 2], "of V2, which keeps them apart"


async def test_options_that_begin_alike_are_not_computed_twice() -> None:
    """The first of them puts its beginning into the cache; what the others find there reaches into them."""

    class Warming(Engine):
        async def generate(self, prompt: dict[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
            self.num_cached = 6 if self.asked else 3
            async for output in super().generate(prompt, params, request_id):
                yield output

    engine = Warming()
    question = Options(prompt=[9, 9, 9, 9, 1, 2, 4], continuations=[[5], [6], [7, 8]], output_starts=[4] * 3)
    (found,) = await read(engine, question)
    assert found.log_probs == [-12.0, -13.0, -22.0]
    assert [params.skip_reading_prefix_cache for _, params in engine.asked] == [False] * 3
    assert (found.num_cached, found.num_computed) == (3, (8 - 3) + (8 - 6) + (9 - 6))


async def test_many_options_are_in_the_engine_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "MAX_AT_ONCE", 5)

    class Busy(Engine):
        inside = most = 0

        async def generate(self, prompt: dict[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
            self.inside += 1
            self.most = max(self.most, self.inside)
            await asyncio.sleep(0)
            async for output in super().generate(prompt, params, request_id):
                yield output
            self.inside -= 1

    engine = Busy()
    labelled = Options(prompt=[9] * 5, labels=[4, 2])
    found = await read(engine, *[verbatim([9, 9], *([token] for token in range(1, 9))), labelled] * 3)
    assert [options.log_probs for options in found] == [[-float(token) for token in range(1, 9)], [-4.0, -2.0]] * 3
    assert (engine.most, len(engine.asked)) == (5, 3 * 9)


async def test_the_tokens_of_a_prompt_are_checked_once_for_all_options() -> None:
    class Token(int):
        num_checks = 0

        def __ge__(self, other: int) -> bool:
            Token.num_checks += 1
            return int(self) >= other

    question = Options.model_construct(prompt=[Token(9)] * 5, labels=[], continuations=[[1], [2]], output_starts=[5, 5])
    await read(Engine(), question)
    assert Token.num_checks == 5


async def test_what_does_not_fit_is_named_before_anything_is_asked() -> None:
    engine = Engine()
    for wrong, message in (
        (verbatim([9] * MAX_MODEL_LEN, [1]), "at most 11 fit"),
        (verbatim([9], [VOCAB_SIZE]), "between 0 and 49"),
        (Options(prompt=[9], labels=[-1]), "between 0 and 49"),
        (Options(prompt=[9], continuations=[[1]], output_starts=[2]), "output_start 2"),
    ):
        with pytest.raises(InvalidRequestError, match=rf"questions\[1\].*{message}") as caught:
            await read(engine, verbatim([9], [1]), wrong)
        assert caught.value.param == "questions.1"
    assert engine.asked == []


@pytest.mark.parametrize("question", [verbatim([9], [1]), Options(prompt=[9], labels=[1])])
async def test_an_engine_that_gives_no_log_probabilities(question: Options) -> None:
    engine = Engine()
    engine.is_silent = True
    with pytest.raises(EngineError, match="no log-probabilities"):
        await read(engine, question)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [], "labels": [1]},
        {"prompt": [1]},
        {"prompt": [1], "labels": [1], "continuations": [[1]], "output_starts": [1]},
        {"prompt": [1], "continuations": [[1]], "output_starts": []},
        {"prompt": [1], "labels": [1], "more": 1},
        {"prompt": [1], "labels": list(range(129))},
    ],
)
def test_options_are_read_by_labels_or_verbatim(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Options.model_validate(fields)
