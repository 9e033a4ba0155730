"""Files of parameters held open: mapped into memory where their loss can be survived, else read piece by piece."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from cocktail_serve.errors import CheckpointError
from cocktail_serve.merging.native import load_library
from cocktail_serve.pool import FileState

_SOURCE = Path(__file__).with_name("mapped.c")


class HeldFile:
    """A file as it was opened, whatever is put in its place.

    Where there is a C compiler its bytes are mapped, and reading them costs no copy. A file that is cut short by
    somebody else gives zeros then instead of ending the process. Without a compiler each piece is read into memory. In
    both cases `check_unwritten` tells afterwards whether what was read is what the file held.

    Attributes:
        state: of the descriptor that all bytes come from.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._file)
        self.state = _state_of(path, self._file)
        self._has_failed = False  # a disk, when a piece was read
        self._mapped = _map(self._file, self.state)

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes of the file: a view that outlives this object, to be treated as read-only.

        Raises:
            CheckpointError: the file is shorter.
        """
        if end > self.state.num_bytes:
            raise CheckpointError(f"{self._path} ends before byte {end}: it is truncated or corrupt, fetch it again")
        if self._mapped is not None:
            return memoryview(self._mapped).cast("B")[begin:end]
        return self.copy(begin, end)

    def copy(self, begin: int, end: int) -> memoryview:
        """The same bytes in memory of their own.

        Raises:
            CheckpointError: the file is shorter, was cut short, or its disk does not answer.
        """
        content = memoryview(bytearray(end - begin))
        done = 0
        while done < len(content):
            try:
                count = os.preadv(self._file, [content[done:]], begin + done)
            except OSError as error:
                self._has_failed = True
                raise CheckpointError(f"{self._path} could not be read: {error.strerror}") from error
            if not count:
                raise CheckpointError(f"{self._path} was cut short while it was read")
            done += count
        return content

    def open(self) -> BinaryIO:
        """The same file for a library that reads by itself, from its beginning."""
        return os.fdopen(os.dup(self._file), "rb")

    def check_unwritten(self) -> None:
        """Proves that all bytes read so far are those of `state`.

        Raises:
            CheckpointError: the file was written to, or cut short, since it was opened; or its disk did not answer.
        """
        now = os.fstat(self._file)
        # not the change time, which also moves when the file is renamed or another takes its name: its bytes stay
        is_same = (now.st_size, now.st_mtime_ns) == (self.state.num_bytes, self.state.modified_ns)
        if not is_same:
            raise CheckpointError(f"{self._path} was written to while it was read; wait until it is whole, try again")
        if self._has_failed or (self._mapped is not None and _is_lost(self._mapped)):
            raise CheckpointError(
                f"{self._path} could not be read to its end: its disk did not answer, which the system's log tells, or "
                "it was cut short and made whole again; try again"
            ) from OSError(errno.EIO, os.strerror(errno.EIO))

    def close(self) -> None:
        """Lets go of the file; what was read from it stays."""
        self._close()
        self._mapped = None


def settings_state(path: Path) -> FileState:
    """The state of a small file, with its bytes' digest.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return _state_of(path, file.fileno(), digest=blake3(file.read()).hexdigest())


@contextmanager
def library_reads(folder: Path) -> Iterator[None]:
    """While a library loads a model from files that it maps by itself: one that is cut short does not end the process.

    Raises:
        CheckpointError: that happened.
    """
    library = _library()
    if library is None:
        yield
        return
    library.cocktail_guard()
    before = library.cocktail_library_reads(1)
    try:
        yield
    finally:
        lost = library.cocktail_library_reads(-1) - before
        if lost:
            raise CheckpointError(
                f"a file of {folder} was cut short while it was loaded, or its disk did not answer; put it back whole"
            ) from OSError(errno.EIO, os.strerror(errno.EIO))


_mapped_files: weakref.WeakValueDictionary[FileState, ctypes.Array[ctypes.c_ubyte]] = weakref.WeakValueDictionary()
_places: dict[int, int] = {}
"""By address, the mapping's place in `mapped.c`."""
_mapping = threading.Lock()


def _map(file: int, state: FileState) -> ctypes.Array[ctypes.c_ubyte] | None:
    """The whole file in memory, once for all who hold it: what one has touched costs the next no page fault."""
    library = _library()
    if library is None or state.num_bytes == 0:
        return None
    library.cocktail_guard()
    with _mapping:
        mapped = _mapped_files.get(state)
        if mapped is None or _is_lost(mapped):
            place = ctypes.c_int()
            address = library.cocktail_map(file, state.num_bytes, ctypes.byref(place))
            if not address:
                return None
            mapped = (ctypes.c_ubyte * state.num_bytes).from_address(address)
            _places[address] = place.value
            weakref.finalize(mapped, _unmap, library, address).atexit = False
            _mapped_files[state] = mapped
    return mapped


def _unmap(library: ctypes.CDLL, address: int) -> None:
    library.cocktail_unmap(_places.pop(address))


def _is_lost(mapped: ctypes.Array[ctypes.c_ubyte]) -> bool:
    library = _library()
    assert library is not None
    return bool(library.cocktail_is_lost(_places[ctypes.addressof(mapped)]))


@cache
def _library() -> ctypes.CDLL | None:
    library = load_library(_SOURCE)
    if isinstance(library, str):
        return None
    library.cocktail_guard.restype = None
    library.cocktail_map.restype = ctypes.c_void_p
    library.cocktail_map.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p)
    library.cocktail_unmap.restype = None
    return library


def _state_of(path: Path, file: int, *, digest: str = "") -> FileState:
    status = os.fstat(file)
    return FileState(
        str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest
    )
