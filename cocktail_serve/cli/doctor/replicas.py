"""The servers of a decoder pool: what they take of the machine together, and whether each has its own part of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import psutil

from cocktail_serve.cli.doctor.finding import Check
from cocktail_serve.config import VLLMEngineConfig
from cocktail_serve.dtypes import ITEM_BYTES
from cocktail_serve.pool import Pool
from vllm_cocktail.launch import CPU_VARIABLES, is_cpu_build

_KV_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE"


def check_replicas(pool: Pool, config: VLLMEngineConfig) -> Iterator[Check]:
    """Of vLLM's build for CPUs the memory of all replicas; of several on any machine whether they share devices."""
    name = f"pool {pool.id}: devices"
    if is_cpu_build():
        yield _memory(pool, config)
    if config.replicas > 1 and not config.devices:
        if is_cpu_build():
            yield Check(
                name,
                "warning",
                "vLLM binds the threads of all of them to the same cores",
                "set devices to the cores of each, such as [0-7, 8-15]",
            )
        else:
            yield Check(
                name, "problem", "all of them would start on the first GPU", "set devices, one entry for each replica"
            )


def _memory(pool: Pool, config: VLLMEngineConfig) -> Check:
    name = f"pool {pool.id}: memory"
    parts = {
        "parameters": _parameter_bytes(pool, config),
        "experts' factors": sum(expert.num_bytes for expert in pool.experts.values()) if _is_unmerged(pool) else 0,
        "mixtures kept, at most": 0 if _is_unmerged(pool) else int(config.cache_bytes),
        "models kept, at most": int(config.expert_memory),
        "KV cache": _kv_cache_bytes(config),
    }
    each, total = sum(parts.values()), psutil.virtual_memory().total
    told = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items() if size)
    replicas = f"{config.replicas} of" if config.replicas > 1 else "one of"
    detail = (
        f"{replicas} {each / 1e9:.1f} GB ({told}), {config.replicas * each / 1e9:.1f} of the machine's "
        f"{total / 1e9:.1f} GB, vLLM's own processes not counted"
    )
    if config.replicas * each > total:
        return Check(name, "warning", detail, "fewer replicas, or a smaller cache_bytes or VLLM_CPU_KVCACHE_SPACE")
    return Check(name, "ok", detail)


def _is_unmerged(pool: Pool) -> bool:
    return pool.mode == "unmerged"


def _parameter_bytes(pool: Pool, config: VLLMEngineConfig) -> int:
    """Of the base in the engine's dtype; of one that is quantised as it is stored."""
    base = pool.base
    if base.quantisation is not None:
        return base.num_bytes
    return base.num_bytes * ITEM_BYTES[config.dtype_over(base)] // ITEM_BYTES[base.dtype]


def _kv_cache_bytes(config: VLLMEngineConfig) -> int:
    told = config.env.get(_KV_CACHE_GIB, CPU_VARIABLES[_KV_CACHE_GIB])
    try:
        size = float(told)
    except ValueError:
        return 0  # vLLM says so at the start
    return int(size * 2**30) if math.isfinite(size) else 0
