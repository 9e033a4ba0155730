"""The rows of a step: laid out in the order of vLLM's batch, each with its own request's coefficients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_cocktail.unmerged.step import StepRows

RED, GREEN = "d" * 64, "e" * 64


class Recorded:
    """In place of `Steps`: what was set."""

    def __init__(self) -> None:
        self.tokens: list[tuple[list[list[float]], list[int]]] = []
        self.samples: list[tuple[list[list[float]], list[int]]] = []

    def set(self, coefficients: Any, num_tokens: Any) -> None:
        self.tokens.append((np.round(coefficients, 6).tolist(), num_tokens.tolist()))

    def set_samples(self, coefficients: Any, num_rows: Any) -> None:
        self.samples.append((np.round(coefficients, 6).tolist(), num_rows.tolist()))


class Runner:
    """The part of vLLM's model runner that is hooked."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.input_batch = SimpleNamespace(req_ids=[], num_reqs=0)
        self.model = SimpleNamespace(compute_logits=lambda hidden_states: hidden_states.shape[0])
        self.prompts: list[tuple[int, int]] = []
        self.copies_prompts = False

    def get_model(self) -> Any:
        return self.model

    def begin(self, request_id: str, row: Any) -> None:
        args = None if row is None else {"cocktail_row": row}
        self.requests[request_id] = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=args))

    def _prepare_inputs(self, scheduled: Any, num_scheduled_tokens: Any) -> str:
        return "prepared"

    def _get_prompt_logprobs_dict(self, hidden_states: Tensor) -> list[int]:
        parts = [hidden_states[begin:end] for begin, end in self.prompts]
        return [self.model.compute_logits(part.clone() if self.copies_prompts else part) for part in parts]

    def step(self, *scheduled: tuple[str, int]) -> str:
        self.input_batch.req_ids = [request_id for request_id, _ in scheduled]
        self.input_batch.num_reqs = len(scheduled)
        return str(self._prepare_inputs(None, np.array([count for _, count in scheduled], dtype=np.int32)))


@pytest.fixture
def columns() -> dict[str, int]:
    return {RED: 0, GREEN: 1}


@pytest.fixture
def steps() -> Recorded:
    return Recorded()


@pytest.fixture
def runner(columns: dict[str, int], steps: Recorded) -> Runner:
    runner = Runner()
    StepRows(runner, steps, columns).install()  # type: ignore[arg-type]  # it records what it is told
    return runner


def test_rows_stand_in_the_order_of_the_batch(runner: Runner, steps: Recorded) -> None:
    runner.begin("one", [RED, 0.25, GREEN, 0.5])
    runner.begin("base", [])
    assert runner.step(("one", 3), ("base", 1)) == "prepared"
    runner.step(("base", 1), ("one", 1))
    assert steps.tokens == [([[0.25, 0.5], [0, 0]], [3, 1]), ([[0, 0], [0.25, 0.5]], [1, 1])]


def test_a_request_that_comes_back_under_an_old_id_has_its_own_row(runner: Runner, steps: Recorded) -> None:
    runner.begin("one", [RED, 1.0])
    runner.step(("one", 1))
    runner.begin("one", [GREEN, 1.0])
    runner.step(("one", 1))
    assert [rows for rows, _ in steps.tokens] == [[[1, 0]], [[0, 1]]]


def test_experts_may_come_while_requests_run(runner: Runner, steps: Recorded, columns: dict[str, int]) -> None:
    runner.begin("one", [RED, 1.0])
    runner.step(("one", 1))
    columns["f" * 64] = 2
    runner.begin("two", ["f" * 64, 0.5])
    runner.step(("one", 1), ("two", 2))
    assert steps.tokens[-1] == ([[1, 0, 0], [0, 0, 0.5]], [1, 2])


def test_a_column_that_is_nobodys_gets_nothing(runner: Runner, steps: Recorded, columns: dict[str, int]) -> None:
    columns["f" * 64] = 3
    runner.begin("one", ["f" * 64, 0.5, RED, 0.25])
    runner.step(("one", 1))
    assert steps.tokens[-1] == ([[0.25, 0, 0, 0.5]], [1])


@pytest.mark.parametrize(
    ("row", "word"), [(None, "without a row"), ([RED], "without a row"), (["a" * 64, 1.0], "not loaded")]
)
def test_a_row_without_coefficients_is_never_whatever_is_there(runner: Runner, row: Any, word: str) -> None:
    runner.begin("right", [RED, 1.0])
    runner.step(("right", 1))
    runner.begin("wrong", row)
    with pytest.raises(ValueError, match=word):
        runner.step(("right", 1), ("wrong", 1))


def test_a_prompts_logits_are_of_its_request(runner: Runner, steps: Recorded) -> None:
    runner.begin("one", [RED, 1.0])
    runner.begin("two", [GREEN, 1.0])
    runner.step(("one", 3), ("two", 4))
    runner.prompts = [(0, 2), (3, 7)]
    assert runner._get_prompt_logprobs_dict(torch.zeros(7, 5)) == [2, 4]
    assert steps.samples == [([[1, 0]], [2]), ([[0, 1]], [4])]
    assert runner.model.compute_logits(torch.zeros(2, 5)) == 2
    assert len(steps.samples) == 2, "sampled rows are as the step laid them out"


def test_hidden_states_that_are_no_part_of_the_steps_are_found_out(runner: Runner) -> None:
    runner.begin("one", [RED, 1.0])
    runner.step(("one", 3))
    runner.prompts, runner.copies_prompts = [(0, 2)], True
    with pytest.raises(ValueError, match="no part of the step"):
        runner._get_prompt_logprobs_dict(torch.zeros(3, 5))
