"""How the processes of vLLM's server wait for each other on a CPU.

EngineCore and its workers exchange messages in shared memory. Whoever waits for one asks for it again and again, for a
second after the last one, and calls `sched_yield` in between. So one core is taken by whoever waits, all the time that
requests run, beside those that compute. A gateway on the same machine then waits for a core: Linux shares cores out
between sessions first (autogroups), so what a thread yields goes to others of its own server. With two cores, requests
of a tenant that met a full engine waited a second and more outside of every queue.

Here a wait spins for a moment and then sleeps in naps: the moment covers the fast answers, and each nap costs a step
some hundredth of a millisecond. A wait that has become longer than a step, for a mix above all, sleeps longer: short
naps took a sixth of a core from the sums.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

SPIN_S = 2e-4
NAP_S = 2e-5
"""The kernel adds some 50 microseconds of its own."""

LONG_WAIT_S = 5e-2
LONG_NAP_S = 1e-3

SAME_WAIT_S = 1e-4
"""Two pauses of one thread that are no further apart belong to one wait: to look whether a message has come takes a few
microseconds, to do something about it takes longer."""


class Pauses(threading.local):
    """What a thread does between two looks at whether its message has come."""

    def __init__(self, give_way: Callable[[], object]) -> None:
        self._give_way = give_way
        self._since = 0.0
        self._ended = -1.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._ended > SAME_WAIT_S:
            self._since = now
        if now - self._since < SPIN_S:
            self._give_way()
        else:
            time.sleep(NAP_S if now - self._since < LONG_WAIT_S else LONG_NAP_S)
        self._ended = time.monotonic()


def nap_while_waiting() -> None:
    """Has vLLM's queues in this process sleep where they would spin. May be called many times."""
    from vllm.distributed.device_communicators import shm_broadcast

    give_way = getattr(shm_broadcast, "sched_yield", None)
    if give_way is None:
        logger.warning(
            "vllm_cocktail: this vLLM waits for its workers in another way; a waiting process may take a core"
        )
    elif not isinstance(give_way, Pauses):
        shm_broadcast.sched_yield = Pauses(give_way)
