"""How many engines a decoder pool gets, and what each is started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from cocktail_serve.config import FakeEngineConfig
from cocktail_serve.engines.replicas.engine import ReplicatedEngine
from cocktail_serve.engines.replicas.placement import ResidentPlacement, SharedPlacement
from cocktail_serve.engines.vllm import build
from cocktail_serve.engines.vllm.build import build_decoder_engine
from cocktail_serve.engines.vllm.engine import VLLMEngine
from cocktail_serve.pool import Member, Mode, Pool


def built(tmp_path: Path, *, mode: Mode = "merged", **config: Any) -> Any:
    base = Member("base", tmp_path, fingerprint="b", dtype="float32", num_bytes=0)
    pool = Pool("flan", "decoder", base, {}, "text", mode=mode)
    return build_decoder_engine(pool, FakeEngineConfig.model_validate(config), run_dir=tmp_path / "run")


def environments(engine: ReplicatedEngine) -> list[dict[str, str]]:
    replicas = cast(list[VLLMEngine], engine._replicas)
    return [replica._launcher.command_and_env(Path("s"), "k")[1] for replica in replicas]


def test_one_engine_is_one_and_keeps_its_files_where_they_were(tmp_path: Path) -> None:
    engine = built(tmp_path)
    assert isinstance(engine, VLLMEngine)
    assert engine._launcher.log == tmp_path / "run" / "flan.log"


@pytest.mark.parametrize(("mode", "placement"), [("merged", ResidentPlacement), ("unmerged", SharedPlacement)])
def test_several_have_folders_of_their_own_and_share_what_they_know_of_tenants(
    tmp_path: Path, mode: Mode, placement: type
) -> None:
    engine = built(tmp_path, mode=mode, replicas=3)
    assert isinstance(engine, ReplicatedEngine)
    assert isinstance(engine._dispatcher._placement, placement)
    replicas = cast(list[VLLMEngine], engine._replicas)
    assert [replica._launcher.log for replica in replicas] == [
        tmp_path / "run" / f"flan.{number}" / "flan.log" for number in range(3)
    ]
    assert len({id(replica._turns._slots._served_tokens) for replica in replicas}) == 1  # type: ignore[attr-defined]
    assert len({id(replica._tokens) for replica in replicas}) == 1
    assert len({id(replica._bodies._salt_key) for replica in replicas}) == 3


@pytest.mark.parametrize(("is_cpu", "variable"), [(True, "VLLM_CPU_OMP_THREADS_BIND"), (False, "CUDA_VISIBLE_DEVICES")])
def test_each_is_told_its_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cpu: bool, variable: str) -> None:
    monkeypatch.setattr(build, "is_cpu_build", lambda: is_cpu)
    engine = built(tmp_path, replicas=2, devices=["0-3", "4-7"], env={"MORE": "1"})
    assert [(env[variable], env["MORE"]) for env in environments(engine)] == [("0-3", "1"), ("4-7", "1")]
    monkeypatch.delenv(variable, raising=False)
    assert all(variable not in env for env in environments(built(tmp_path, replicas=2)))
