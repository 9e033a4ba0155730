"""Processes of vLLM that wait for each other leave the cores to others."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from vllm_cocktail import register, waiting
from vllm_cocktail.manifest import OWNER_VARIABLE
from vllm_cocktail.waiting import (
    LONG_NAP_S,
    LONG_WAIT_S,
    NAP_S,
    SAME_WAIT_S,
    SPIN_S,
    Pauses,
    nap_while_waiting,
)

with contextlib.suppress(ImportError):  # before a test runs: vLLM asks the machine by processes while it is imported
    import vllm.distributed.device_communicators.shm_broadcast  # noqa: F401


class Clock:
    """Time that passes where the code sleeps or gives way."""

    def __init__(self) -> None:
        self.now = 100.0
        self.naps: list[float] = []
        self.num_yields = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds

    def give_way(self) -> None:
        self.num_yields += 1
        self.now += SPIN_S / 10


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


def test_a_wait_spins_for_a_moment_and_then_sleeps(clock: Clock) -> None:
    pause = Pauses(clock.give_way)
    for _ in range(100):
        pause()
    assert clock.num_yields in (10, 11)  # by how the tenths add up
    assert clock.naps == [NAP_S] * (100 - clock.num_yields)


def test_a_long_wait_sleeps_longer(clock: Clock) -> None:
    pause = Pauses(clock.give_way)
    begun = clock.now
    while clock.now < begun + LONG_WAIT_S:
        pause()
    assert set(clock.naps) == {NAP_S}
    for _ in range(10):
        pause()
    assert clock.naps[-10:] == [LONG_NAP_S] * 10
    clock.now += 2 * SAME_WAIT_S
    num_naps = len(clock.naps)
    for _ in range(12):
        pause()
    assert set(clock.naps[num_naps:]) == {NAP_S}  # the next wait begins anew


def test_the_next_wait_spins_again(clock: Clock) -> None:
    pause = Pauses(clock.give_way)
    for _ in range(50):
        pause()
    num_yields = clock.num_yields
    clock.now += SAME_WAIT_S / 2
    pause()
    assert clock.num_yields == num_yields
    clock.now += 2 * SAME_WAIT_S
    pause()
    assert clock.num_yields == num_yields + 1


@pytest.fixture
def shm_broadcast() -> Iterator[ModuleType]:
    module = pytest.importorskip("vllm.distributed.device_communicators.shm_broadcast", reason="vLLM's own queues")
    before = module.sched_yield
    yield module
    module.sched_yield = before


def test_vllms_own_wait_takes_no_core(shm_broadcast: ModuleType, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds the names in vLLM that this rests on: a queue's reader that waits for its next message."""
    condition = object.__new__(shm_broadcast.SpinCondition)
    condition.is_reader, condition.busy_loop_s, condition.last_read = True, 1e9, time.monotonic()
    monkeypatch.setattr(shm_broadcast, "sched_yield", clock.give_way)
    nap_while_waiting()
    nap_while_waiting()  # once is enough: naps are not wrapped in naps
    for _ in range(100):
        condition.wait()
    assert clock.num_yields in (10, 11)
    assert len(clock.naps) == 100 - clock.num_yields


@pytest.mark.parametrize("owned", [True, False])
def test_a_server_of_the_gateways_waits_so_on_a_cpu(
    owned: bool, shm_broadcast: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(OWNER_VARIABLE, raising=False)
    if owned:
        monkeypatch.setenv(OWNER_VARIABLE, str(os.getpid()))
    monkeypatch.setattr("vllm_cocktail.launch.is_cpu_build", lambda: True)
    register()
    assert isinstance(shm_broadcast.sched_yield, Pauses) is owned


def test_another_way_to_wait_is_left_as_it_is(
    shm_broadcast: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(shm_broadcast, "sched_yield")
    nap_while_waiting()
    monkeypatch.undo()
    assert "may take a core" in caplog.text
