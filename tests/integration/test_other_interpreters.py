"""What holds in an interpreter that has run nothing else."""

from __future__ import annotations

import subprocess
import sys

from tests.unit.weighting.test_weighting_blackbox import run


def test_a_recipe_is_checked_without_torch() -> None:
    code = "import sys; import cocktail_serve.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_seed_gives_the_same_candidates_in_any_process() -> None:
    script = (
        "import random, numpy; random.seed(7); numpy.random.seed(7)\n"
        "from tests.unit.weighting.test_weighting_blackbox import run\n"
        "print(repr([c.merging_weights for c in run(seed=5, budget=12)[0]]))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert elsewhere.strip() == repr([candidate.merging_weights for candidate in run(seed=5, budget=12)[0]])
