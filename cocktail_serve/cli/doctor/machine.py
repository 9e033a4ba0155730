"""The machine: processors and memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from cocktail_serve.cli.doctor.finding import Check


def check_machine() -> Iterator[Check]:
    gpus = list(_gpus())
    yield from gpus or [_check_cpu()]
    import psutil

    memory = psutil.virtual_memory()
    yield Check("memory", "ok", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available")


def _gpus() -> Iterator[Check]:
    try:
        import torch
    except ModuleNotFoundError:
        return  # what would compute on one is not installed either
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        yield Check(
            "gpu", "ok", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
        )


def _check_cpu() -> Check:
    flags = _cpu_flags()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    detail = f"{os.cpu_count()} cores, {', '.join(known) or 'no vector extensions known'}"
    if flags and "avx2" not in flags:
        return Check("cpu", "problem", detail, "vLLM's CPU build needs AVX2 at least")
    if flags and "avx512f" not in flags:
        return Check("cpu", "warning", detail, "vLLM's CPU build is fastest with AVX-512")
    return Check("cpu", "ok", detail)


def _cpu_flags() -> frozenset[str]:
    """The kernel's names for what the CPU can; empty where the kernel does not say (macOS)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()
