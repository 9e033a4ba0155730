"""The fingerprint of a checkpoint: what its parameters are, wherever the folder lies and however it is sharded."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3
from filelock import FileLock

from cocktail_serve.checkpoints.adapter import AdapterReader
from cocktail_serve.checkpoints.layout import CONFIG, model_folder, weight_files
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.digest import digest_of
from cocktail_serve.errors import CheckpointError

logger = logging.getLogger(__name__)

FINGERPRINT_VERSION = 2
"""Raised when the same parameters come to have another fingerprint."""

_HASH_THREADS = min(8, os.cpu_count() or 1)


def fingerprint_parameters(reader: CheckpointReader, *, progress: Callable[[int, int], None] | None = None) -> str:
    """SHA-256 over the sorted names, dtypes, shapes and BLAKE3 digests of all tensors. Reads all parameters once.

    BLAKE3 for the bytes: as hard to collide as SHA-256, and several times faster, so that reading decides.

    Args:
        progress: called with bytes done and bytes in all, from this thread.

    Raises:
        CheckpointError: tensors that the configuration ties together differ.
    """
    for output, source in reader.tied.items():
        if not reader.get(output).equal(reader.get(source)):
            raise CheckpointError(
                f"{reader.folder}: tie_word_embeddings is true, but {output!r} differs from {source!r}; "
                "set it to false if they were trained apart, or save the model anew"
            )
    total, done = reader.num_bytes, 0
    if progress:
        progress(done, total)
    rows = []
    with ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="fingerprint") as pool:
        digests = pool.map(lambda name: blake3(reader.get_bytes(name)).hexdigest(), reader.tensors)
        for (name, info), digest in zip(reader.tensors.items(), digests, strict=True):
            rows.append([name, info.dtype, list(info.shape), digest])
            done += info.num_bytes
            if progress:
                progress(done, total)
    return digest_of({"version": FINGERPRINT_VERSION, "tensors": sorted(rows)})


def fingerprint_adapter(reader: AdapterReader, base: str) -> str:
    """SHA-256 over the base's fingerprint, the factors' names, dtypes, shapes and BLAKE3 digests, and their scaling.

    It names the full model that adapter and base make; a full checkpoint of the same values has another.
    """
    rows = [
        [name, info.dtype, list(info.shape), blake3(reader.factor_bytes(name)).hexdigest()]
        for name, info in sorted(reader.factors.items())
    ]
    identity = {"version": FINGERPRINT_VERSION, "base": base, "factors": rows, "adapter": reader.identity()}
    return digest_of(identity)


def fingerprint_folder(folder: Path, *, cache_dir: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """The fingerprint of a folder, kept in `cache_dir` until one of its files changes path, size or time.

    Two processes that ask at once read the parameters once. A cache that is corrupt or cannot be written costs time,
    never the answer.

    Raises:
        CheckpointError: the folder cannot be read as a checkpoint.
    """
    folder = Path(folder).resolve()
    entry = Path(cache_dir) / "fingerprints" / f"{digest_of(str(folder))[:32]}.json"
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_suffix(".lock")):
            state = _state_of(folder)
            known = _read_entry(entry)
            if known.get("state") == state:
                return str(known["fingerprint"])
            fingerprint = _compute(folder, progress)
            if _state_of(folder) != state:
                raise CheckpointError(f"{folder} changed while it was read; wait until it is written, then try again")
            _write_entry(entry, {"folder": str(folder), "state": state, "fingerprint": fingerprint})
            return fingerprint
    except OSError as error:
        logger.warning("fingerprints are not kept: %s cannot be used: %s", entry.parent, error)
        return _compute(folder, progress)


def _compute(folder: Path, progress: Callable[[int, int], None] | None) -> str:
    with CheckpointReader(folder) as reader:
        return fingerprint_parameters(reader, progress=progress)


def _state_of(folder: Path) -> list[list[str | int]]:
    """What changes when a file is written; the change time also catches copies that keep the modification time."""
    paths = [model_folder(folder) / CONFIG, *(file.path for file in weight_files(folder))]
    state: list[list[str | int]] = [["version", FINGERPRINT_VERSION]]
    for path in paths:
        status = path.stat()
        state.append([str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return state


def _read_entry(entry: Path) -> dict[str, object]:
    """What was written, or nothing where the file is not what was written: a wrong fingerprint would be believed."""
    try:
        value = json.loads(entry.read_bytes())
        if isinstance(value, dict) and value.pop("digest", None) == digest_of(value):
            return value
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        pass
    logger.warning("the kept fingerprint %s is not what was written; it is made again", entry)
    return {}


def _write_entry(entry: Path, value: dict[str, object]) -> None:
    temporary = entry.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            json.dump({**value, "digest": digest_of(value)}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(entry)
    finally:
        temporary.unlink(missing_ok=True)
