import json
import os
import subprocess
import sys

PROGRAM = """
import json, os, sys
from cocktail_serve.engines.in_process.openmp import import_torch_waiting_passively

assert "torch" not in sys.modules
import_torch_waiting_passively()
import torch

torch.randn(512, 512) @ torch.randn(512, 512)
print(json.dumps({"policy": os.environ.get("OMP_WAIT_POLICY"), "spins": os.environ.get("GOMP_SPINCOUNT")}))
"""


def run(**environ: str) -> tuple[dict[str, str | None], str]:
    """What a fresh process ends with, and what its OpenMP runtime says it was configured with."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**clean, "OMP_DISPLAY_ENV": "VERBOSE", **environ},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(process.stdout.splitlines()[-1]), process.stderr


def test_the_runtime_waits_passively_and_children_do_not_inherit_it() -> None:
    environ, display = run()
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in display
    assert environ["policy"] is None


def test_the_environment_decides_where_it_says_anything() -> None:
    environ, display = run(GOMP_SPINCOUNT="500")
    assert "GOMP_SPINCOUNT = '500'" in display
    assert environ == {"policy": None, "spins": "500"}
