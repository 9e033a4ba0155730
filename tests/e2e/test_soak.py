"""A short soak: what twenty minutes of it show is in docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import soak


@pytest.mark.vllm
@pytest.mark.full
def test_answers_and_the_ledger_are_right_under_a_mixed_load(tmp_path: Path) -> None:
    outcome = soak.run(tmp_path, seconds=60, clients=2)
    assert outcome["wrong"] == 0, outcome["first_wrong"]
    assert outcome["ledger"]
    assert all(row["agrees"] for row in outcome["ledger"]), outcome["ledger"]
    assert outcome["did"].keys() == soak.WORK.keys(), "every kind of work was done"
    assert outcome["swaps"] > 10
