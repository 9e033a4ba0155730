"""What is written in C: the kernel `linear.c` and others, built once for this machine by its own C compiler.

Imports no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from cocktail_serve.dtypes import ITEM_BYTES

_SOURCE = Path(__file__).with_name("linear.c")

_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=gnu11", "-shared", "-fPIC", "-pthread")
"""What the bits hang on is `-ffp-contract=off`; `-march=native` is why every kind of machine gets a file of its own."""

_BUILD_TIMEOUT_S = 60.0

DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3}
"""As in `linear.c`; float64 is read and never written."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Elements of one dtype that lie one after the other in memory, which whoever passes it keeps alive."""

    address: int
    dtype: str

    def at(self, index: int) -> Operand:
        """The elements from this one on."""
        return Operand(self.address + index * ITEM_BYTES[self.dtype], self.dtype)


class Kernel:
    """The compiled kernel. Holds no state: called from any number of threads, it runs without Python's lock."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._merge = library.cocktail_merge
        self._merge.restype = None
        self._merge.argtypes = (
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_size_t,
        )

    def merge(self, inputs: Sequence[Operand], merging_weights: Sequence[float], out: Operand, size: int) -> None:
        """Writes `size` elements of sum_i merging_weights[i] * inputs[i], as `merge_param` defines it, to `out`."""
        count = len(inputs)
        self._merge(
            (ctypes.c_void_p * count)(*(operand.address for operand in inputs)),
            bytes(DTYPE_CODES[operand.dtype] for operand in inputs),
            (ctypes.c_double * count)(*merging_weights),
            count,
            out.address,
            DTYPE_CODES[out.dtype],
            size,
        )


@cache
def load_kernel() -> Kernel | str:
    """The kernel, built where it is not yet (half a second), or why there is none."""
    library = load_library(_SOURCE)
    return library if isinstance(library, str) else Kernel(library)


def load_library(source: Path, flags: Sequence[str] = ()) -> ctypes.CDLL | str:
    """A C source of ours, built where it is not yet, or why it cannot be. `flags` come after `_FLAGS`."""
    if sys.byteorder != "little" or os.name != "posix":
        return "the kernel is written for little-endian POSIX machines"
    compiler = find_compiler()
    if compiler is None:
        return "there is no C compiler (cc, gcc or clang)"
    name = f"{source.stem}-{_digest(compiler, source, flags)[:16]}.so"
    try:
        try:
            built = _cache_folder() / name
            if not built.is_file():
                build(compiler, source, built, flags)
            _require_own(built)
            return ctypes.CDLL(str(built))
        except (OSError, PermissionError):  # a home that cannot be written, or a cache that somebody else could
            with tempfile.TemporaryDirectory(prefix="cocktail-kernel-") as folder:
                built = Path(folder) / name
                build(compiler, source, built, flags)
                return ctypes.CDLL(str(built))
    except subprocess.TimeoutExpired:
        return f"{shlex.join(compiler)} did not build it within {_BUILD_TIMEOUT_S:g} s"
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        return f"{shlex.join(compiler)} cannot build it: {str(reason).strip()[:300]}"


def kernel_name() -> Literal["compiled", "torch"]:
    """What merges tensors on this machine's CPU; the bits are the same."""
    return "compiled" if isinstance(load_kernel(), Kernel) else "torch"


def find_compiler() -> list[str] | None:
    if chosen := shlex.split(os.environ.get("CC", "")):
        return chosen if shutil.which(chosen[0]) else None
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return [found] if found else None


def _digest(compiler: Sequence[str], source: Path, flags: Sequence[str]) -> str:
    """Names a build by all that decides it. A home may be shared between machines, so the CPU is part of it."""
    digest = hashlib.sha256(source.read_bytes())
    for part in (*compiler, *_FLAGS, *flags, platform.machine(), _cpu_features()):
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()


def _cpu_features() -> str:
    try:
        # arm64 says Features, x86 flags
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor()


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cocktail-serve" / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _require_own(folder)
    return folder


def _require_own(path: Path) -> None:
    """Code is loaded from there: nobody else may have written it."""
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by others")


def build(compiler: Sequence[str], source: Path, built: Path, flags: Sequence[str] = ()) -> None:
    """Compiles to a name of its own and renames, so that two processes may build at once.

    Raises:
        OSError, subprocess.SubprocessError: the compiler cannot be run, or fails.
    """
    partial = built.with_suffix(f".{os.getpid()}.partial")
    try:
        subprocess.run(
            [*compiler, *_FLAGS, *flags, "-o", str(partial), str(source), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_BUILD_TIMEOUT_S,
        )
        partial.chmod(0o700)
        partial.replace(built)
    finally:
        partial.unlink(missing_ok=True)
