"""Log-probabilities of scored outputs: of each its own tokens alone, however vLLM cuts prompts into steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_cocktail import output_logprobs
from vllm_cocktail.output_logprobs import LABELS_ARG, OUTPUT_START_ARG, OutputLogprobs

# before a test runs: vLLM asks the machine by processes while it is imported
pytest.importorskip("vllm.v1.outputs", reason="what is found is in vLLM's own types")

VOCAB_SIZE, HIDDEN = 11, 5
PROMPTS = {
    "long": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8],
    "short": [2, 7],
    "other": [10, 0, 6, 6, 1],
}
STARTS = {"long": 7, "short": 1, "other": 3}


class Runner:
    """The part of vLLM's model runner that is read: each token of a request has a hidden state of its own.

    `scales` are the coefficients of the output head, by request: whoever lays them out wrongly gets another's.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.head = torch.randn(HIDDEN, VOCAB_SIZE, generator=generator)
        self.states = {name: torch.randn(len(p), HIDDEN, generator=generator) for name, p in PROMPTS.items()}
        self.scales = {name: 1.0 + index for index, name in enumerate(PROMPTS)}
        self.requests: dict[str, Any] = {}
        self.num_prompt_logprobs: dict[str, int] = {}
        self.input_batch = SimpleNamespace(vocab_size=VOCAB_SIZE, req_id_to_index={})
        self.query_start_loc = SimpleNamespace(np=np.zeros(0, dtype=np.int32))
        self.sampler = SimpleNamespace(compute_logprobs=lambda logits: logits.log_softmax(-1, dtype=torch.float32))
        self.computed: list[int] = []
        self.left_to_vllm: list[dict[str, int]] = []
        self.laid_out = torch.ones(0)
        self.in_step: list[str] = []

    def get_model(self) -> Any:
        return SimpleNamespace(compute_logits=self.compute_logits)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        self.computed.append(len(hidden_states))
        assert len(self.laid_out) == len(hidden_states)
        return (hidden_states @ self.head) * self.laid_out[:, None]

    def lay_out_samples(self, places: Any, num_rows: Any) -> None:
        scales = [self.scales[self.in_step[place]] for place in places]
        self.laid_out = torch.tensor(np.repeat(scales, num_rows), dtype=torch.float32)

    def _get_prompt_logprobs_dict(self, hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> Any:
        self.left_to_vllm.append(dict(self.num_prompt_logprobs))
        return dict.fromkeys(self.num_prompt_logprobs, "vLLM's")

    def begin(self, name: str, args: Mapping[str, Any] | None) -> None:
        self.requests[name] = SimpleNamespace(
            prompt_token_ids=PROMPTS[name],
            num_computed_tokens=0,
            in_progress_prompt_logprobs_cpu=None,
            sampling_params=SimpleNamespace(extra_args=args),
        )
        self.num_prompt_logprobs[name] = 0

    def step(self, scheduled: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """Computes so many tokens of each, in this order, of prompts and beyond them."""
        self.in_step = [name for name, _ in scheduled]
        self.input_batch.req_id_to_index = {name: place for place, name in enumerate(self.in_step)}
        self.query_start_loc.np = np.cumsum([0, *(count for _, count in scheduled)])
        states = []
        for name, count in scheduled:
            computed = self.requests[name].num_computed_tokens
            of_prompt = self.states[name][computed : computed + count]
            states += [of_prompt, torch.full((count - len(of_prompt), HIDDEN), torch.nan)]
        found: dict[str, Any] = self._get_prompt_logprobs_dict(torch.cat(states), dict(scheduled))
        for name, count in scheduled:
            self.requests[name].num_computed_tokens += count
        return found

    def wanted(self, name: str) -> Tensor:
        """Log-probabilities of all tokens of a prompt but the first."""
        logits = (self.states[name][:-1] @ self.head) * self.scales[name]
        return logits.log_softmax(-1).gather(-1, torch.tensor(PROMPTS[name])[1:, None])[:, 0]

    def assert_right(self, name: str, found: Any, start: int | None = None) -> None:
        start = STARTS[name] if start is None else start
        assert found.logprob_token_ids[:, 0].tolist() == PROMPTS[name][start:]
        torch.testing.assert_close(found.logprobs[:, 0], self.wanted(name)[start - 1 :])
        assert len(found.selected_token_ranks) == len(found.logprobs)


@pytest.fixture
def runner() -> Runner:
    runner = Runner()
    OutputLogprobs(runner, runner.lay_out_samples).install()
    return runner


def begin_all(runner: Runner) -> None:
    for name, start in STARTS.items():
        runner.begin(name, {OUTPUT_START_ARG: start})


def test_prompts_of_one_step_are_one_product_over_their_outputs(runner: Runner) -> None:
    begin_all(runner)
    found = runner.step([("other", 5), ("long", 12), ("short", 2)])
    assert sorted(found) == sorted(PROMPTS)
    for name in PROMPTS:
        runner.assert_right(name, found[name])
    assert runner.computed == [sum(len(PROMPTS[name]) - STARTS[name] for name in PROMPTS)]
    assert runner.num_prompt_logprobs == {}
    assert runner.left_to_vllm == [{}]


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_a_product_is_bounded(runner: Runner, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(output_logprobs, "MAX_LOGITS", most * VOCAB_SIZE)
    begin_all(runner)
    found = runner.step([(name, len(prompt)) for name, prompt in PROMPTS.items()])
    for name in PROMPTS:
        runner.assert_right(name, found[name])
    assert max(runner.computed) <= most


@pytest.mark.parametrize("size", range(1, 13))
def test_prompts_in_pieces(runner: Runner, size: int) -> None:
    """Finished when the last token is read, though the one before it was the last that predicts a token."""
    begin_all(runner)
    finished: dict[str, Any] = {}
    while len(finished) < len(PROMPTS):
        left = {name: len(PROMPTS[name]) - runner.requests[name].num_computed_tokens for name in PROMPTS}
        scheduled = [(name, min(size, count)) for name, count in reversed(left.items()) if count]
        found = runner.step(scheduled)
        assert set(found) == {name for name, count in scheduled if count == left[name]}
        finished |= found
    for name in PROMPTS:
        runner.assert_right(name, finished[name])


def test_a_prompt_that_was_preempted_is_read_again(runner: Runner) -> None:
    begin_all(runner)
    assert runner.step([("long", 9)]) == {}
    runner.requests["long"].num_computed_tokens = 0
    assert set(runner.step([("other", 5)])) == {"other"}
    assert runner.step([("long", 8)]) == {}
    runner.assert_right("long", runner.step([("long", 4)])["long"])


def test_what_others_ask_of_their_prompts_is_left_to_vllm(runner: Runner) -> None:
    runner.begin("long", {OUTPUT_START_ARG: 7})
    runner.begin("short", None)
    runner.begin("other", {"of_its_own": 1})
    found = runner.step([("long", 5), ("short", 1), ("other", 5)])
    assert found == {"short": "vLLM's", "other": "vLLM's"}
    assert runner.left_to_vllm == [{"short": 0, "other": 0}]
    assert sorted(runner.num_prompt_logprobs) == sorted(PROMPTS), "none is finished, or taken from vLLM"


LABELS = [9, 0, 4]


@pytest.mark.parametrize("most", [1, 2, 100])
@pytest.mark.parametrize("size", [1, 5, 12])
def test_labels_are_what_may_follow_a_prompt(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, size: int, most: int
) -> None:
    """One row of the head for all of them, beside outputs and beside what vLLM computes."""
    monkeypatch.setattr(output_logprobs, "MAX_LOGITS", most * VOCAB_SIZE)
    runner.begin("long", {OUTPUT_START_ARG: 12, LABELS_ARG: LABELS})
    runner.begin("short", {OUTPUT_START_ARG: 1})
    runner.begin("other", {OUTPUT_START_ARG: 5, LABELS_ARG: LABELS[:2]})
    finished: dict[str, Any] = {}
    while len(finished) < len(PROMPTS):
        left = {name: len(PROMPTS[name]) - runner.requests[name].num_computed_tokens for name in PROMPTS}
        finished |= runner.step([(name, min(size, count)) for name, count in left.items() if count])
    runner.assert_right("short", finished["short"])
    for name, labels in (("long", LABELS), ("other", LABELS[:2])):
        logits = (runner.states[name][-1] @ runner.head) * runner.scales[name]
        assert finished[name].logprob_token_ids[:, 0].tolist() == labels
        torch.testing.assert_close(finished[name].logprobs[:, 0], logits.log_softmax(-1)[labels])
    assert sum(runner.computed) == 3, "a row each"


@pytest.mark.parametrize("labels", [[VOCAB_SIZE], [-1], ["1"], 3, [None]])
def test_labels_that_are_no_tokens_are_none(runner: Runner, labels: Any) -> None:
    runner.begin("long", {OUTPUT_START_ARG: 7, LABELS_ARG: labels})
    runner.assert_right("long", runner.step([("long", 12)])["long"])


def test_where_all_rows_have_the_same_parameters_nothing_is_laid_out() -> None:
    runner = Runner()
    OutputLogprobs(runner).install()
    runner.scales = dict.fromkeys(PROMPTS, 1.0)
    begin_all(runner)
    runner.laid_out = torch.ones(8)
    runner.assert_right("long", runner.step([(name, len(prompt)) for name, prompt in PROMPTS.items()])["long"])


@pytest.mark.parametrize(("given", "start"), [(-3, 1), (0, 1), (99, 12), (12, 12)])
def test_a_start_outside_of_the_prompt_ends_nothing(runner: Runner, given: int, start: int) -> None:
    """The worker is everybody's: what its own requests never say may come from another client of vLLM."""
    runner.begin("long", {OUTPUT_START_ARG: given})
    runner.assert_right("long", runner.step([("long", 12)])["long"], start)


def test_a_start_that_is_no_number_is_none(runner: Runner) -> None:
    runner.begin("long", {OUTPUT_START_ARG: "7"})
    assert runner.step([("long", 12)]) == {"long": "vLLM's"}
