"""The fingerprint of a checkpoint: what its parameters are, wherever the folder lies and however it is sharded."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from filelock import FileLock

from cocktail_serve.checkpoints.adapters.reader import AdapterReader
from cocktail_serve.checkpoints.finite import CHUNK_BYTES, largest_and_not_finite
from cocktail_serve.checkpoints.kept_files import read_kept, write_kept
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.digest import digest_of
from cocktail_serve.dtypes import ITEM_BYTES
from cocktail_serve.errors import CheckpointError
from cocktail_serve.pool import FileState

logger = logging.getLogger(__name__)

FINGERPRINT_VERSION = 2
"""Raised when the same parameters come to have another fingerprint."""

FINGERPRINTS = "fingerprints"
"""Folder of the cache that they are kept in."""

_ENTRY_VERSION = 2
"""Raised when what is kept of a model comes to say more: what was kept before is read anew."""

_HASH_THREADS = min(8, os.cpu_count() or 1)

_TICK_NS = 20_000_000
"""File times move in steps: two writes within one may leave the same time. Linux takes steps of at most 10 ms."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a model is by content, and its files as they were when that was read.

    Attributes:
        fingerprint: SHA-256 hex.
        largest: bound of the magnitudes of its parameters, all of which are finite; of a quantised checkpoint, of those
            that it stores as floating numbers, scales among them.
        files: as `Member.files`.
    """

    fingerprint: str
    largest: float
    files: tuple[FileState, ...]


def identify(reader: CheckpointReader, *, progress: Callable[[int, int], None] | None = None) -> Identity:
    """Names a checkpoint by content: SHA-256 over names, dtypes, shapes and BLAKE3 digests of all tensors, sorted; and
    over what the configuration says of their quantisation, where they are quantised.

    Reads all parameters once, and looks for what is not finite meanwhile. BLAKE3 for the bytes: as hard to collide as
    SHA-256, and several times faster, so that reading decides.

    Args:
        progress: called with bytes done and bytes in all, from this thread.

    Raises:
        CheckpointError: tensors that the configuration ties together differ; a tensor holds what is not finite; or a
            file was written to meanwhile.
    """
    _let_times_pass(reader.files)
    for output, source in reader.tied.items():
        if not reader.get(output).equal(reader.get(source)):
            raise CheckpointError(
                f"{reader.folder}: tie_word_embeddings is true, but {output!r} differs from {source!r}; "
                "set it to false if they were trained apart, or save the model anew"
            )
    total, done = reader.num_bytes, 0
    if progress:
        progress(done, total)
    rows, largest = [], 0.0
    with ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="fingerprint") as pool:
        read = pool.map(
            lambda name: _digest(reader.folder, name, reader.get_bytes(name), reader.tensors[name].dtype),
            reader.tensors,
        )
        for (name, info), (digest, magnitude) in zip(reader.tensors.items(), read, strict=True):
            rows.append([name, info.dtype, list(info.shape), digest])
            largest = max(largest, magnitude)
            done += info.num_bytes
            if progress:
                progress(done, total)
    reader.check_unwritten()
    content: dict[str, object] = {"version": FINGERPRINT_VERSION, "tensors": sorted(rows)}
    if reader.quantisation is not None:
        content["quantisation"] = json.dumps(reader.quantisation.settings, sort_keys=True)
    return Identity(digest_of(content), largest, reader.files)


def identify_adapter(reader: AdapterReader, base: str, *, largest_of_base: float) -> Identity:
    """Names the full model that adapter and base make; a full checkpoint of the same values has another name.

    SHA-256 over the base's fingerprint, the factors' names, dtypes, shapes and BLAKE3 digests, and their scaling.

    Args:
        base: fingerprint.
        largest_of_base: bound of its magnitudes.

    Raises:
        CheckpointError: a factor holds what is not finite; or a file was written to meanwhile.
    """
    _let_times_pass(reader.files)
    rows, magnitudes = [], {}
    for name, info in sorted(reader.factors.items()):
        digest, magnitudes[name] = _digest(reader.folder, name, reader.factor_bytes(name), info.dtype)
        rows.append([name, info.dtype, list(info.shape), digest])
    reader.check_unwritten()
    content = {"version": FINGERPRINT_VERSION, "base": base, "factors": rows, "adapter": reader.identity()}
    return Identity(digest_of(content), reader.largest(largest_of_base, magnitudes), reader.files)


def identify_folder(
    folder: Path,
    *,
    cache_dir: Path,
    allow_quantised: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Identity:
    """Names a folder's checkpoint; the name is kept in `cache_dir` until one of its files changes path, size or time.

    Two processes that ask at once read the parameters once. A cache that is corrupt or cannot be written costs time,
    never the answer.

    Args:
        cache_dir: where the name is kept.
        allow_quantised: as of `CheckpointReader`.
        progress: as of `identify`.

    Raises:
        CheckpointError: the folder cannot be read as a checkpoint, or as `identify`.
    """
    folder = Path(folder).resolve()
    entry = Path(cache_dir) / FINGERPRINTS / f"{digest_of(str(folder))[:32]}.json"
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(entry.with_suffix(".lock"))
        with lock, CheckpointReader(folder, allow_quantised=allow_quantised) as reader:
            state = [["version", FINGERPRINT_VERSION, _ENTRY_VERSION], *map(_kept_state, reader.files)]
            known = _read_entry(entry)
            if known.get("state") == state:
                return Identity(str(known["fingerprint"]), float(str(known["largest"])), reader.files)
            identity = identify(reader, progress=progress)
            _write_entry(
                entry,
                {
                    "folder": str(folder),
                    "state": state,
                    "fingerprint": identity.fingerprint,
                    "largest": repr(identity.largest),
                },
            )
            return identity
    except OSError as error:
        _warn_not_kept(entry, error)
        with CheckpointReader(folder, allow_quantised=allow_quantised) as reader:
            return identify(reader, progress=progress)


def _kept_state(file: FileState) -> list[str | int]:
    """What must be the same for a kept fingerprint to hold: all but the device, whose number a restart may change."""
    return [file.path, file.inode, file.num_bytes, file.modified_ns, file.changed_ns, file.digest]


def _digest(folder: Path, name: str, content: memoryview, dtype: str) -> tuple[str, float]:
    """BLAKE3 hex of a tensor's bytes, and its largest magnitude.

    Raises:
        CheckpointError: not all of its elements are finite.
    """
    hasher, largest, not_finite = blake3(), 0.0, 0
    for begin in range(0, len(content), CHUNK_BYTES):
        chunk = content[begin : begin + CHUNK_BYTES]
        hasher.update(chunk)
        magnitude, count = largest_and_not_finite(chunk, dtype)
        largest, not_finite = max(largest, magnitude), not_finite + count
    if not_finite:
        raise CheckpointError(
            f"{folder}: in tensor {name!r}, {not_finite:,} of {len(content) // ITEM_BYTES[dtype]:,} elements are "
            "infinite or NaN, and would be in every mixture: take a checkpoint from before the training diverged, or "
            "leave the model out"
        )
    return hasher.hexdigest(), largest


def _let_times_pass(files: tuple[FileState, ...]) -> None:
    """Waits until a write to these files would leave another time than they have: a moment, if they are new."""
    newest = max(max(file.modified_ns, file.changed_ns) for file in files)
    age = time.time_ns() - newest
    if 0 <= age < _TICK_NS:
        time.sleep((_TICK_NS - age) / 1e9)


def _read_entry(entry: Path) -> dict[str, object]:
    """What was written, or nothing where the file is not what was written: a wrong fingerprint would be believed."""
    try:
        value = json.loads(read_kept(entry))
        if isinstance(value, dict) and value.pop("digest", None) == digest_of(value):
            return value
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        pass
    logger.warning("the kept fingerprint %s is not what was written; it is made again", entry)
    return {}


def _write_entry(entry: Path, value: dict[str, object]) -> None:
    """Keeps it for the next time; where that cannot be, what was read is told all the same."""
    try:
        write_kept(entry, json.dumps({**value, "digest": digest_of(value)}).encode())
    except OSError as error:
        _warn_not_kept(entry, error)


def _warn_not_kept(entry: Path, error: OSError) -> None:
    logger.warning("fingerprints are not kept: %s cannot be used: %s", entry.parent, error)
