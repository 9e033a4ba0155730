"""The start command: what is always in it, what a configuration may add, what it may not."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.errors import ConfigError
from vllm_cocktail import launch
from vllm_cocktail.launch import plugin_allowlist, server_args, server_env

MANIFEST = Path("/run/pool.json")


def args_with(**extra: Any) -> list[str]:
    return server_args(
        model=Path("/models/base"),
        uds=Path("/run/engine.sock"),
        served_model_name="flan",
        dtype="bfloat16",
        max_model_len=512,
        extra={name.replace("_", "-"): value for name, value in extra.items()},
    )


def env_with(environ: dict[str, str] | None = None, **options: Any) -> dict[str, str]:
    return server_env(manifest=MANIFEST, api_key="secret", environ=environ or {}, **options)


def value_of(args: list[str], flag: str) -> str:
    return args[args.index(flag) + 1]


@pytest.fixture(params=[True, False], ids=["cpu", "cuda"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(launch, "is_cpu_build", lambda: request.param)
    return bool(request.param)


def test_the_command_serves_the_base_with_the_extension() -> None:
    args = args_with()
    assert args[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert value_of(args, "--model") == "/models/base"
    assert value_of(args, "--uds") == "/run/engine.sock"
    assert value_of(args, "--dtype") == "bfloat16"
    assert value_of(args, "--max-model-len") == "512"
    assert value_of(args, "--worker-extension-cls") == "vllm_cocktail.worker.CocktailWorkerExtension"


def test_the_key_is_in_the_environment_and_not_on_the_command_line() -> None:
    assert env_with()["VLLM_API_KEY"] == "secret"
    assert "--api-key" not in args_with()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, ["--flag"]),
        (False, []),
        (None, []),
        (3, ["--flag", "3"]),
        (["a", "b"], ["--flag", "a", "b"]),
        ({"a": 1}, ["--flag", '{"a": 1}']),
    ],
)
def test_further_arguments_become_flags(value: Any, words: list[str]) -> None:
    assert [word for word in args_with(flag=value) if word not in args_with()] == words


@pytest.mark.parametrize(
    "name",
    [
        *("uds", "--uds", "worker_extension_cls", "data-parallel-size", "enable-lora", "config"),
        # as vLLM's parser reads them
        *("max-mod", "api_serv", "worker-ext", "port=8000", "max-model-len=8", "quantization.x", "-data-par"),
    ],
)
def test_arguments_that_are_ours_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.args"):
        server_args(model=Path("m"), uds=Path("s"), served_model_name="n", dtype="float32", extra={name: "x"})


def test_a_cpu_compiles_nothing_unless_asked(cpu: bool) -> None:
    assert ("--enforce-eager" in args_with()) == cpu
    assert ("TORCH_COMPILE_DISABLE" in env_with()) == cpu


@pytest.mark.parametrize("asked", [{"enforce-eager": False}, {"compilation-config": {"mode": 3}}])
def test_a_cpu_compiles_when_asked(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    monkeypatch.setattr(launch, "is_cpu_build", lambda: True)
    assert "--enforce-eager" not in args_with(**asked)
    assert "TORCH_COMPILE_DISABLE" not in env_with(args=asked)


def test_a_gpu_runs_eagerly_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_cpu_build", lambda: False)
    assert "--enforce-eager" in args_with(enforce_eager=True)


@pytest.mark.parametrize("bound", [None, "kv_cache_memory_bytes", "gpu-memory-utilization"])
def test_experts_on_a_gpu_need_a_bound_of_the_kv_cache(cpu: bool, bound: str | None) -> None:
    def start() -> list[str]:
        return server_args(
            model=Path("m"),
            uds=Path("s"),
            served_model_name="n",
            dtype="float32",
            extra={bound: 0.5} if bound else {},
            expert_bytes=2**30,
        )

    if cpu or bound:
        assert start()
    else:
        with pytest.raises(ConfigError, match="kv-cache-memory-bytes"):
            start()


def test_the_environment_names_manifest_and_owner() -> None:
    env = env_with(owner_pid=42)
    assert env["VLLM_COCKTAIL_MANIFEST"] == str(MANIFEST)
    assert env["VLLM_COCKTAIL_OWNER_PID"] == "42"
    assert "VLLM_COCKTAIL_OWNER_PID" not in env_with({"VLLM_COCKTAIL_OWNER_PID": "7"})


def test_the_gateways_secrets_and_dangerous_switches_stay_behind() -> None:
    env = env_with({"COCKTAIL_ADMIN_KEY": "x", "VLLM_SERVER_DEV_MODE": "1", "PATH": "/bin"})
    assert "COCKTAIL_ADMIN_KEY" not in env
    assert "VLLM_SERVER_DEV_MODE" not in env
    assert env["PATH"] == "/bin"


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "VLLM_COCKTAIL_MANIFEST", "VLLM_SERVER_DEV_MODE"])
def test_variables_that_are_ours_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        env_with(extra={name: "x"})


def test_a_configuration_goes_over_the_defaults(cpu: bool) -> None:
    env = env_with({"HF_HUB_OFFLINE": "0"}, extra={"VLLM_CPU_KVCACHE_SPACE": "4"})
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert env["HF_HUB_OFFLINE"] == "0"


def test_nothing_reaches_for_a_network_by_default() -> None:
    assert env_with()["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("current", "expected"),
    [("", "cocktail"), ("mine", "mine,cocktail"), ("a, b", "a,b,cocktail"), ("cocktail", "cocktail")],
)
def test_an_allowlist_keeps_the_plugins_it_names(current: str, expected: str) -> None:
    assert plugin_allowlist(current) == expected


def test_no_allowlist_keeps_every_plugin() -> None:
    names = plugin_allowlist(None).split(",")
    assert "cocktail" in names
    assert {point.name for point in entry_points(group="vllm.general_plugins")} <= set(names)
