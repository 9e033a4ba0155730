"""A mixture as a folder that any tool loads: parameters in safetensors, and the base's other files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocktail_serve.checkpoints.generation_files import write_settings
from cocktail_serve.checkpoints.layout import CONFIG, model_folder, read_config, read_modules
from cocktail_serve.checkpoints.mixture import Mixture, address_of
from cocktail_serve.checkpoints.tensor_files import SAFETENSORS_DTYPES, TensorInfo
from cocktail_serve.dtypes import ITEM_BYTES
from cocktail_serve.errors import ConflictError, StorageError
from cocktail_serve.merging.native import Kernel, Operand, load_kernel
from cocktail_serve.merging.threads import in_parallel
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe, settings_of

RECIPE_FILE = "recipe.json"

_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe")
_COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_NEVER_COPIED = frozenset({CONFIG, RECIPE_FILE, "trainer_state.json", "all_results.json", "train_results.json"})

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

CHUNK_NUMEL = 1 << 18
"""Elements that a thread mixes and then writes. What it mixed, half a megabyte, is still in its cache when written."""


@dataclass(frozen=True, slots=True)
class _Shard:
    """A safetensors file to be written.

    Attributes:
        prefix: what its tensors' names start with in the pool and not in the file (`2_Dense/`).
        tensors: what it will hold, by full name, in the order they come.
    """

    path: Path
    prefix: str
    tensors: dict[str, TensorInfo]


def save_mixture(
    recipe: Recipe,
    pool: Pool,
    out: Path,
    *,
    extra_files: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 1000**3,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Mixes a recipe into a folder that transformers, sentence-transformers and vLLM load.

    It holds the mixed parameters, the base's configuration with the mixture's dtype, tokenizer and pooling modules,
    the mixture's chat template and generation settings, and `recipe.json`. Code and training state of the base are left
    out. The folder appears whole or not at all. Inputs are mapped; beside them memory stays at one chunk per thread,
    or, where the compiled kernel is missing, at one tensor.

    Args:
        out: must not exist, or be an empty folder.
        extra_files: further text files by name, such as a report.
        max_shard_bytes: larger mixtures are cut into shards with an index.
        progress: called with bytes written and bytes in all.

    Raises:
        ConflictError: `out` exists and is not an empty folder.
        StorageError: the disk is full or refuses; nothing is left behind.
        CheckpointError, IncompatibleModelsError, InvalidMixError, NotFiniteError: as `Mixture` and its `params`.
    """
    with new_folder(out) as folder, Mixture(recipe, pool.by_fingerprint) as mixture:
        shards = _plan(mixture, folder, max_shard_bytes)
        total = sum(info.num_bytes for info in mixture.tensors.values())
        check_room(folder, total, "the mixture")
        _write_shards(shards, mixture, total, progress)
        _write_indexes(shards)
        copy_files(pool.base.path, folder)
        write_config(pool.base.path, folder, dtype=recipe.dtype)
        if (settings := settings_of(recipe, pool)) is not None:
            write_settings(folder, settings, base=pool.base.generation)
        write_json(folder / RECIPE_FILE, describe(recipe, pool))
        for name, text in (extra_files or {}).items():
            (folder / name).write_text(text)
        mixture.check_unwritten()


def describe(recipe: Recipe, pool: Pool) -> dict[str, Any]:
    """What `recipe.json` holds: the recipe, its digest, and the names its models have in the pool."""
    settings = settings_of(recipe, pool)
    names = {fingerprint: member.name for fingerprint, member in pool.by_fingerprint.items()}
    described = {
        "digest": recipe.digest,
        "recipe": recipe.to_json(),
        "pool": pool.id,
        "merging_weights": {names[fingerprint]: coefficient for fingerprint, coefficient in recipe.coefficients},
        "fingerprints": {names[fingerprint]: fingerprint for fingerprint, _ in recipe.coefficients},
    }
    if pool.kind == "decoder" and settings is not None:
        described["generation"] = settings.to_json()
    return described


def check_free(out: Path) -> None:
    """Raises ConflictError unless a mixture can be written there: what is long in the making asks first."""
    try:
        is_taken = out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir())))
    except OSError as error:
        raise StorageError(f"cannot look at {out}: {error.strerror}") from error
    if is_taken:
        raise ConflictError(f"{out} exists; name a folder that does not, nothing is overwritten")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when all is written: it appears whole or not at all.

    Raises:
        ConflictError: `out` exists and is not an empty folder.
        StorageError: the disk is full or refuses; nothing is left behind.
    """
    out = Path(out).absolute()
    check_free(out)
    try:
        with _temporary_beside(out) as folder:
            yield folder
            _sync_tree(folder)
            folder.rename(out)
            _sync(out.parent)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}; nothing was left there") from error


@contextlib.contextmanager
def _temporary_beside(out: Path) -> Iterator[Path]:
    """A folder on the same file system, for the rename to be atomic. A failure takes it and made parents away.

    What a killed process left half-written for the same `out` is removed first: whoever writes one holds a lock on it.
    """
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(out)
        folder, lock = _make_locked(out)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                parent.rmdir()
        raise


def _make_locked(out: Path) -> tuple[Path, int]:
    """A new folder beside `out`, locked for as long as the descriptor is open, on file systems that know locks."""
    while True:
        folder = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.is_dir():
                return folder, descriptor
            os.close(descriptor)  # somebody took it for one left behind, in the moment before the lock


def _remove_left_behind(out: Path) -> None:
    """Removes what killed processes were writing: whoever lives holds a lock on it."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.partial")
    for folder in [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)]:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def check_room(folder: Path, num_bytes: int, what: str) -> None:
    """Raises StorageError where the disk has less room than `what` is going to take."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise StorageError(f"{what} needs {num_bytes:,} bytes, {folder.parent} has {free:,} free; make room")


def _plan(mixture: Mixture, folder: Path, max_shard_bytes: int) -> list[_Shard]:
    base = mixture.base.folder
    root = model_folder(base).relative_to(base)
    prefix_of = mixture.base.prefix_of
    shards = []
    for prefix in sorted({prefix_of(name) for name in mixture.tensors}):
        place = folder / (prefix or root)
        groups: list[dict[str, TensorInfo]] = [{}]
        size = 0
        for name, info in ((name, info) for name, info in mixture.tensors.items() if prefix_of(name) == prefix):
            if groups[-1] and size + info.num_bytes > max_shard_bytes:
                groups.append({})
                size = 0
            groups[-1][name] = info
            size += info.num_bytes
        for number, group in enumerate(groups, start=1):
            file = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
            shards.append(_Shard(place / file, prefix, group))
    return shards


class _Writer:
    """Writes bytes to where a tensor's header says it lies, from any thread, and counts them.

    Args:
        places: file and offset of each tensor.
    """

    def __init__(
        self, places: Mapping[str, tuple[int, int]], total: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self._places = places
        self._total = total
        self._progress = progress
        self._done = 0
        self._counting = threading.Lock()
        if progress:
            progress(0, total)

    def write(self, name: str, content: memoryview, begin: int = 0) -> None:
        """Writes bytes of a tensor, which begin at its byte `begin`.

        Raises:
            OSError: the disk is full or refuses.
        """
        file, offset = self._places[name]
        offset += begin
        size = len(content)
        while content:
            written = os.pwrite(file, content, offset)
            content, offset = content[written:], offset + written
        with self._counting:
            self._done += size
            if self._progress:
                self._progress(self._done, self._total)


def _write_shards(
    shards: list[_Shard], mixture: Mixture, total: int, progress: Callable[[int, int], None] | None
) -> None:
    """Writes each part where its header says it goes, as it comes, so that no shard is held in memory."""
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[int, int]] = {}
        for shard in shards:
            shard.path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(shard.path.open("wb", buffering=0)).fileno()
            header, offsets = _header(shard)
            os.pwrite(file, header, 0)
            places |= {name: (file, len(header) + offset) for name, offset in offsets.items()}
        writer = _Writer(places, total, progress)
        kernel = load_kernel()
        if isinstance(kernel, Kernel) and mixture.method.name == "linear" and mixture.is_mapped:
            _write_chunks(kernel, mixture, writer)
        else:
            _write_tensors(mixture, writer)


def _write_tensors(mixture: Mixture, writer: _Writer) -> None:
    import torch

    for name, tensor in mixture.params():
        writer.write(name, tensor.reshape(-1).view(torch.uint8).numpy().data)


def _write_chunks(kernel: Kernel, mixture: Mixture, writer: _Writer) -> None:
    """Every thread mixes a chunk and writes it, so that computing, reading and writing go on together."""
    chunks = [
        (name, begin, min(begin + CHUNK_NUMEL, info.num_elements))
        for name, info in mixture.tensors.items()
        for begin in range(0, info.num_elements, CHUNK_NUMEL)
    ]
    own = threading.local()

    def write(first: int, last: int) -> None:
        for name, begin, end in chunks[first:last]:
            info = mixture.tensors[name]
            item_bytes = ITEM_BYTES[info.dtype]
            if not info.is_floating:
                content = mixture.base.get_bytes(name)
                writer.write(name, content[begin * item_bytes : end * item_bytes], begin * item_bytes)
                continue
            if not hasattr(own, "buffer"):
                own.buffer = memoryview(bytearray(CHUNK_NUMEL * max(ITEM_BYTES.values())))
            merged = own.buffer[: (end - begin) * item_bytes]
            operands, _alive = mixture.operands(name)
            inputs = [operand.at(begin) for operand in operands]
            kernel.merge(inputs, mixture.weights, Operand(address_of(merged), info.dtype), end - begin)
            if mixture.may_overflow:
                mixture.check_finite(name, merged)
            writer.write(name, merged, begin * item_bytes)

    in_parallel(write, len(chunks), 1)


def _header(shard: _Shard) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, and where behind it each tensor begins."""
    # larger elements first keeps every tensor aligned to its element, as the format wants
    ordered = sorted(shard.tensors.items(), key=lambda item: -ITEM_BYTES[item[1].dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, begin = {}, 0
    for name, info in ordered:
        end = begin + info.num_bytes
        header[name.removeprefix(shard.prefix)] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, end],
        }
        begins[name], begin = begin, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begins


def _write_indexes(shards: list[_Shard]) -> None:
    for folder in {shard.path.parent for shard in shards}:
        inside = [shard for shard in shards if shard.path.parent == folder]
        if len(inside) > 1:
            size = sum(info.num_bytes for shard in inside for info in shard.tensors.values())
            weight_map = {
                name.removeprefix(shard.prefix): shard.path.name for shard in inside for name in shard.tensors
            }
            write_json(
                folder / "model.safetensors.index.json",
                {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))},
            )


def copy_files(base: Path, folder: Path) -> None:
    """Copies what stands beside the parameters, but code, training state and the configuration (`write_config`)."""
    places = {base, model_folder(base), *(base / module.path for module in read_modules(base))}
    for place in places | {base / "additional_chat_templates"}:
        if not place.is_dir():
            continue
        target = folder / place.relative_to(base)
        target.mkdir(parents=True, exist_ok=True)
        for file in place.iterdir():
            if file.is_file() and _is_copied(file.name, at_root=place == model_folder(base)):
                shutil.copyfile(file, target / file.name)


def _is_copied(name: str, *, at_root: bool) -> bool:
    if name.endswith(".index.json") or (name in _NEVER_COPIED and (at_root or name != CONFIG)):
        return False
    return name.endswith(_COPIED_SUFFIXES) or name.startswith(_COPIED_NAMES)


def write_config(base: Path, folder: Path, *, dtype: str) -> None:
    """Writes the base's configuration for parameters of `dtype`."""
    config = read_config(base)
    # remote code is not copied, so nothing may point to it
    config.pop("auto_map", None)
    # releases of transformers from 4.56 on say dtype, those before torch_dtype; each reads both
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = dtype
    write_json(folder / model_folder(base).relative_to(base) / CONFIG, config)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value for people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
