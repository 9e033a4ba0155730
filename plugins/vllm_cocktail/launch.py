"""How a vLLM server with this plugin is started: its command line and its environment, in one place.

Imports no vLLM, so that the owner of the process stays free of it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import Any

from cocktail_serve.dtypes import DType
from cocktail_serve.errors import ConfigError
from cocktail_serve.pool import Mode
from vllm_cocktail.manifest import MANIFEST_VARIABLE, OWNER_VARIABLE

WORKER_EXTENSIONS: Mapping[Mode, str] = {
    "merged": "vllm_cocktail.worker.CocktailWorkerExtension",
    "unmerged": "vllm_cocktail.unmerged.worker.UnmergedWorkerExtension",
}
"""What vLLM's Worker is extended by, by the mode of the recipes that it answers."""

PLUGIN_NAME = "cocktail"
"""Name of the entry points in both vLLM groups, because `VLLM_PLUGINS` is one allowlist over all groups."""

OWN_ARGS = frozenset(
    {
        "api-key",
        "api-server-count",
        "config",
        "data-parallel-size",
        "dtype",
        "enable-log-requests",
        "enable-lora",
        "host",
        "max-model-len",
        "model",
        "port",
        "quantization",
        "served-model-name",
        "uds",
        "worker-extension-cls",
    }
)
"""Arguments that a configuration may not set: set here, or refused by the plugin because the fence cannot hold."""

_KV_CACHE_BOUNDS = frozenset({"gpu-memory-utilization", "kv-cache-memory-bytes", "num-gpu-blocks-override"})

OWN_VARIABLES = frozenset({MANIFEST_VARIABLE, OWNER_VARIABLE, "VLLM_API_KEY", "VLLM_SERVER_DEV_MODE"})

_COMPILE_NOTHING = "TORCH_COMPILE_DISABLE"

CPU_VARIABLES: Mapping[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; otherwise vLLM claims a share of all memory
    # vLLM's own --enforce-eager leaves single kernels to compile: 20 s for the first log-probabilities of a prompt
    _COMPILE_NOTHING: "1",
}
"""Environment of an eager server of vLLM's CPU build, where nothing else is said."""

_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the build for CPUs, which is a distribution of its own."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def server_args(
    *,
    model: Path,
    uds: Path,
    served_model_name: str,
    dtype: DType,
    max_model_len: int | None = None,
    extra: Mapping[str, Any] | None = None,
    expert_bytes: int = 0,
    mode: Mode = "merged",
) -> list[str]:
    """Command line of vLLM's OpenAI server on a Unix socket.

    The module is run instead of the `vllm` command, which fails with the CPU build: it asks for the metadata of a
    distribution named `vllm`.

    Args:
        model: folder of the pool's base; what is resident after the start.
        uds: path of the socket. vLLM never unlinks it: a fresh path for every start, in a folder of mode 0700.
        extra: further engine arguments by command-line name without the dashes. `true` is a bare flag, `false` leaves
            a flag out, a list repeats its values, a mapping becomes JSON.
        expert_bytes: memory that the manifest sets aside for models.
        mode: of the recipes that the server answers.

    Raises:
        ConfigError: `extra` sets an argument that is set here or that the plugin cannot work with, or leaves a KV cache
            on a GPU unbounded beside models.
    """
    extra = _normalised(extra)
    for name in extra:
        if (own := _own_arg(name)) is not None:
            meant = "" if own == name else f", which may be read as {own!r}"
            raise ConfigError(
                f"engine.args may not set {name!r}{meant}: cocktail-serve sets it itself or cannot work with it",
                param=f"engine.args.{name}",
            )
    if expert_bytes and not is_cpu_build() and not extra.keys() & _KV_CACHE_BOUNDS:
        raise ConfigError(
            "engine.expert_memory needs room that vLLM would give to its KV cache, which it sizes before models are "
            "kept: set kv-cache-memory-bytes, or a lower gpu-memory-utilization, in engine.args",
            param="engine.expert_memory",
        )
    if _is_eager(extra):
        extra["enforce-eager"] = True
    args = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    args += ["--model", str(model), "--uds", str(uds), "--served-model-name", served_model_name, "--dtype", dtype]
    args += ["--worker-extension-cls", WORKER_EXTENSIONS[mode], "--disable-uvicorn-access-log"]
    if max_model_len is not None:
        args += ["--max-model-len", str(max_model_len)]
    return args + flags(extra)


def flags(args: Mapping[str, Any]) -> list[str]:
    """Engine arguments as a command line gives them; see `extra` of `server_args`."""
    return [part for name, value in args.items() for part in _flag(name, value)]


def check_args(args: Sequence[str]) -> list[str]:
    """Command line of `vllm_cocktail.check` for a server's (of `server_args`)."""
    python, _, _server, *arguments = args
    return [python, "-m", "vllm_cocktail.check", *arguments]


def server_env(
    *,
    manifest: Path,
    api_key: str,
    owner_pid: int | None = None,
    environ: Mapping[str, str] | None = None,
    args: Mapping[str, Any] | None = None,
    extra: Mapping[str, str] | None = None,
    mode: Mode = "merged",
) -> dict[str, str]:
    """Environment of the server process.

    Args:
        manifest: file that `Manifest.write` wrote.
        api_key: guards the routes under `/v1`; given by environment because a command line is readable by everybody.
        owner_pid: process that the server dies with; None: it outlives whoever started it.
        environ: what to build on; `os.environ` if omitted. Secrets of the gateway (`COCKTAIL_*`) are left out.
        args: the `extra` of `server_args`, some of which have a variable to go with them.
        extra: variables of the configuration, over the defaults and under what the plugin needs.
        mode: as of `server_args`.

    Raises:
        ConfigError: `extra` sets a variable that is set here or that the plugin cannot work with.
    """
    extra = dict(extra or {})
    if refused := sorted(OWN_VARIABLES & extra.keys()):
        raise ConfigError(
            f"engine.env may not set {refused[0]}: cocktail-serve sets it itself or cannot work with it",
            param=f"engine.env.{refused[0]}",
        )
    environ = os.environ if environ is None else environ
    env = {k: v for k, v in environ.items() if not k.startswith("COCKTAIL_") and k not in OWN_VARIABLES}
    env.setdefault("HF_HUB_OFFLINE", "1")  # the pool is a folder by now: nothing may reach for a network
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    if mode == "unmerged":
        env.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # lays its steps out otherwise than `unmerged.step` reads them
    if is_cpu_build():
        is_eager = _is_eager(_normalised(args))
        for name, value in CPU_VARIABLES.items():
            if is_eager or name != _COMPILE_NOTHING:
                env.setdefault(name, value)
    env.update(extra)
    env["VLLM_PLUGINS"] = plugin_allowlist(env.get("VLLM_PLUGINS"))
    env["VLLM_API_KEY"] = api_key
    env[MANIFEST_VARIABLE] = str(manifest)
    if owner_pid is not None:
        env[OWNER_VARIABLE] = str(owner_pid)
    return env


def plugin_allowlist(current: str | None) -> str:
    """`VLLM_PLUGINS` with this plugin in it and no other plugin lost.

    Endpoint plugins load only when named, but naming one hides every plugin that is not, in all groups. Unset means
    that all others load, so they are named too.
    """
    if current is None:
        names = sorted({point.name for group in _GROUPS for point in entry_points(group=group)})
    else:
        names = [name for name in current.split(",") if name.strip()]
    return ",".join(dict.fromkeys([*(name.strip() for name in names), PLUGIN_NAME]))


def _normalised(args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments by the name that vLLM's own help gives them."""
    return {name.lstrip("-").replace("_", "-"): value for name, value in (args or {}).items()}


def _own_arg(name: str) -> str | None:
    """The argument of `OWN_ARGS` that vLLM's parser may take a name for, which may be cut short, and be `name=value` or
    `name.key` in one word."""
    word = re.split("[=.]", name, maxsplit=1)[0]
    if word in OWN_ARGS:
        return word
    return next((own for own in sorted(OWN_ARGS) if word and own.startswith(word)), None)


def _is_eager(args: Mapping[str, Any]) -> bool:
    """Whether nothing is compiled. On a CPU that costs 20 to 60 s per start for little speed: it must be asked for."""
    if "enforce-eager" in args:
        return args["enforce-eager"] is True
    return is_cpu_build() and not args.keys() & {"no-enforce-eager", "compilation-config", "optimization-level"}


def _flag(name: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{name}"]
    if value is False or value is None:
        return []
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, Mapping):
        return [f"--{name}", json.dumps(value)]
    return [f"--{name}", str(value)]
