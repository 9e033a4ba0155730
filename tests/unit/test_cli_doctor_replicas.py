"""What `doctor` says of the memory and the devices of a pool's engines, before any is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cocktail_serve.cli.doctor import replicas
from cocktail_serve.cli.doctor.finding import Check
from cocktail_serve.config import VLLMEngineConfig
from cocktail_serve.pool import Member, Mode, Pool

GB = 10**9

Checks = Callable[..., dict[str, Check]]


def member(name: str, num_bytes: int) -> Member:
    return Member(name, Path("/models") / name, fingerprint=name, dtype="float32", num_bytes=num_bytes)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    """On a machine of 20 GB, with vLLM's build for CPUs."""

    def checked(*, is_cpu: bool = True, mode: Mode = "merged", **config: Any) -> dict[str, Check]:
        monkeypatch.setattr(replicas, "is_cpu_build", lambda: is_cpu)
        monkeypatch.setattr(replicas.psutil, "virtual_memory", lambda: SimpleNamespace(total=20 * GB))
        pool = Pool("flan", "decoder", member("base", 4 * GB), {"nq": member("nq", GB)}, "text", mode=mode)
        defaults = {"cache_bytes": 2 * GB, "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}
        settings = VLLMEngineConfig.model_validate(defaults | config)
        return {each.name: each for each in replicas.check_replicas(pool, settings)}

    return checked


def test_the_memory_of_all_replicas_is_added_up(checks: Checks) -> None:
    memory = checks(replicas=2, devices=["0", "1"])["pool flan: memory"]
    assert memory.status == "ok"
    assert memory.detail.startswith(
        "2 of 7.1 GB (parameters 4.0, mixtures kept, at most 2.0, KV cache 1.1), 14.1 of the machine's 20.0 GB"
    )
    assert checks()["pool flan: memory"].detail.startswith("one of 7.1 GB")
    over = checks(replicas=3, devices=["0", "1", "2"])["pool flan: memory"]
    assert (over.status, over.fix[:14]) == ("warning", "fewer replicas")


def test_parameters_count_as_the_engine_has_them_and_rows_keep_no_mixtures(checks: Checks) -> None:
    assert "parameters 2.0," in checks(dtype="bfloat16")["pool flan: memory"].detail
    rows = checks(mode="unmerged")["pool flan: memory"].detail
    assert "(parameters 4.0, experts' factors 1.0, KV cache 1.1)" in rows


def test_replicas_without_devices_are_in_each_others_way(checks: Checks) -> None:
    assert "pool flan: devices" not in checks(replicas=1)
    assert "pool flan: devices" not in checks(replicas=2, devices=["0", "1"])
    on_cpu = checks(replicas=2)["pool flan: devices"]
    assert (on_cpu.status, "same cores" in on_cpu.detail) == ("warning", True)
    on_gpu = checks(replicas=2, is_cpu=False)
    assert on_gpu["pool flan: devices"].status == "problem"
    assert "pool flan: memory" not in on_gpu, "the memory of a GPU is not the machine's"
