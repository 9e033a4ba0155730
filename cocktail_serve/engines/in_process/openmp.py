"""How torch's OpenMP threads wait for each other in a process that also runs an event loop."""

from __future__ import annotations

import os

_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def import_torch_waiting_passively() -> None:
    """Imports torch with OpenMP threads that sleep while they wait, unless the environment says how they should.

    They spin by default, for milliseconds after each operator. Alone on the cores that is faster; beside an event
    loop, a tokenizer and clients it takes the core from the very thread that is waited for: on two busy cores, 16
    clients with short queries got 10 embeddings a second instead of 110. The runtime reads the variable once, when it
    is loaded, so this must come before any other import of torch; it is taken back then, so that processes started
    later (vLLM pins threads of its own) do not inherit it.
    """
    if any(variable in os.environ for variable in _VARIABLES):
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        import torch  # noqa: F401
    finally:
        del os.environ["OMP_WAIT_POLICY"]
