"""Two vLLM engines behind one pool, of which one is killed: every answer is its own recipe's, and few are lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import invariant
from cocktail_serve.pool import Mode

pytestmark = pytest.mark.vllm

NUM_ANSWERS, NUM_CLIENTS = 400, 16


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_every_answer_of_two_replicas_is_its_own_recipes_though_one_is_killed(tmp_path: Path, mode: Mode) -> None:
    outcome = invariant.run(
        tmp_path,
        answers=NUM_ANSWERS,
        clients=NUM_CLIENTS,
        slice_s=0.3,
        num_prompts=6,
        mode=mode,
        num_cocktails=8,
        seed=4,
        replicas=2,
        pool_ids=("tied",),
    )
    assert outcome.wrong == []
    assert outcome.answers + outcome.lost == NUM_ANSWERS
    assert outcome.lost <= NUM_CLIENTS, "more than the one that was killed can have held"
    assert outcome.near_ties <= NUM_ANSWERS / 20
    assert outcome.swaps == 0 if mode == "unmerged" else outcome.swaps >= 10
