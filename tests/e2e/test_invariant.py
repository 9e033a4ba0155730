"""Under concurrent load with swaps, open streams and prefix caching, every answer is its own recipe's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench import invariant
from tests.conftest import Stack

pytestmark = pytest.mark.vllm

NUM_ANSWERS = 400


def test_every_answer_under_load_is_that_of_parameters_merged_apart(stack: Stack) -> None:
    prompts = invariant.make_prompts(6, seed=1)
    expected = {
        pool: invariant.references(models, invariant.MIXTURES, prompts) for pool, models in stack.decoders.items()
    }
    different = {tuple(reference.tokens) for reference in expected["tied"].values()}
    assert len(different) > len(expected["tied"]) / 2, "the models must differ plainly, or the test says nothing"
    swaps_before = stack.server.metric_sum("cocktail_swaps_total")

    outcome = asyncio.run(
        invariant.load(stack.base_url, expected, answers=NUM_ANSWERS, clients=16, seed=2, model_ids=stack.model_ids)
    )

    assert outcome.wrong == []
    assert outcome.answers == NUM_ANSWERS
    assert outcome.near_ties <= NUM_ANSWERS / 20, "so many near ties prove little"
    assert stack.server.metric_sum("cocktail_swaps_total") - swaps_before >= 10


def test_every_answer_of_a_shared_batch_is_that_of_its_own_coefficients(tmp_path: Path) -> None:
    """Adapters as peft folds them; streams are broken off between the others."""
    outcome = invariant.run(
        tmp_path, answers=NUM_ANSWERS, clients=16, slice_s=0.3, num_prompts=4, mode="unmerged", num_cocktails=12, seed=3
    )
    assert outcome.wrong == []
    assert outcome.answers == NUM_ANSWERS
    assert outcome.near_ties <= NUM_ANSWERS / 20
    assert outcome.swaps == 0
