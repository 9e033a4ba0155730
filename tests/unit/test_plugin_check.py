"""What is said of a server's environment before it starts."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from cocktail_serve.errors import ConfigError
from vllm_cocktail.check import _cli_args, unknown_variables


@pytest.fixture
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm, envs = ModuleType("vllm"), ModuleType("vllm.envs")
    # more than other suggestions look at, and the one that was meant is the last
    many = {f"VLLM_OTHER_{number}": None for number in range(300)}
    envs.environment_variables = many | {"VLLM_CPU_KVCACHE_SPACE": None}  # type: ignore[attr-defined]
    vllm.envs = envs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)


@pytest.mark.usefixtures("_vllm")
def test_variables_that_vllm_does_not_read() -> None:
    names = ["VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_KV_CACHE_SPACE", "VLLM_COCKTAIL_MANIFEST", "PATH", "VLLM_X"]
    nearest, unlike = unknown_variables(names)
    assert nearest == (
        "vLLM reads no variable 'VLLM_CPU_KV_CACHE_SPACE' (engine.env, or the environment of the server). "
        "Did you mean 'VLLM_CPU_KVCACHE_SPACE'?"
    )
    assert unlike.startswith("vLLM reads no variable 'VLLM_X' (")


@pytest.mark.parametrize("place", ["common", "launchers", "openai"])
def test_the_command_line_is_found_where_a_release_has_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("common", "launchers", "openai"):
        monkeypatch.setitem(sys.modules, f"vllm.entrypoints.{other}.cli_args", None)
    with pytest.raises(ConfigError, match="elsewhere"):
        _cli_args()
    there = ModuleType("cli_args")
    monkeypatch.setitem(sys.modules, f"vllm.entrypoints.{place}.cli_args", there)
    monkeypatch.setitem(sys.modules, f"vllm.entrypoints.{place}", ModuleType(place))
    assert _cli_args() is there
