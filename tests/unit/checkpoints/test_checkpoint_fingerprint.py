"""Fingerprints: by content alone, kept until a file changes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cocktail_serve.checkpoints import fingerprint as module
from cocktail_serve.checkpoints.fingerprint import Identity, identify, identify_folder
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import CheckpointError
from tests.models import make_decoder

Folders = dict[str, Path]
Copy = Callable[..., Path]
WEIGHTS = "model.safetensors"


def fingerprint(folder: Path) -> str:
    with CheckpointReader(folder) as reader:
        return identify(reader).fingerprint


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders whose parameters were read."""
    read: list[Path] = []
    original = module.identify

    def spy(reader: CheckpointReader, **options: Any) -> Identity:
        read.append(reader.folder)
        return original(reader, **options)

    monkeypatch.setattr(module, "identify", spy)
    return read


def test_is_the_same_in_every_process_and_release(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1, dtype=torch.int64)}, tmp_path / WEIGHTS)
    assert fingerprint(tmp_path) == "523def6075a8018e5e83fcef770bc2e5ec853562fd841b109e9e079e9dbd1f09"


def test_does_not_depend_on_shards_place_or_file_format(decoders: Folders, tmp_path: Path, copy: Copy) -> None:
    expected = fingerprint(decoders["nq"])
    sharded = make_decoder(tmp_path / "sharded", perturbation_seed=2, max_shard_size="100KB")
    assert fingerprint(sharded) == expected
    pickled = copy(decoders["nq"])
    torch.save(load_file(pickled / WEIGHTS), pickled / "pytorch_model.bin")
    (pickled / WEIGHTS).unlink()
    assert fingerprint(pickled) == expected


def test_models_differ(decoders: Folders) -> None:
    assert len({fingerprint(folder) for folder in decoders.values()}) == len(decoders)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "a": t["a"].clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(1e-30))},
        lambda t: {**t, "a": -t["a"]},
        lambda t: {**t, "a": t["a"].view(3, 2)},
        lambda t: {**t, "a": t["a"].view(torch.int32)},
        lambda t: {"c": t["a"], "b": t["b"]},
        lambda t: {"a": t["b"], "b": t["a"]},
        lambda t: {"a": t["a"]},
    ],
    ids=["value", "sign of zero", "shape", "dtype", "name", "swapped", "fewer"],
)
def test_changes_with_names_dtypes_shapes_and_bytes(tmp_path: Path, change: Callable[..., Any]) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(2, 3)}
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / WEIGHTS)
    before = fingerprint(tmp_path)
    save_file({name: tensor.contiguous().clone() for name, tensor in change(tensors).items()}, tmp_path / WEIGHTS)
    assert fingerprint(tmp_path) != before


def test_tied_embeddings_count_once(tied_decoders: Folders, copy: Copy) -> None:
    stored = copy(tied_decoders["base"])
    tensors = load_file(stored / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, stored / WEIGHTS)
    assert fingerprint(stored) == fingerprint(tied_decoders["base"])
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, stored / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        fingerprint(stored)


def test_progress_ends_at_the_size_of_the_model(decoders: Folders) -> None:
    calls: list[tuple[int, int]] = []
    with CheckpointReader(decoders["base"]) as reader:
        identify(reader, progress=lambda done, total: calls.append((done, total)))
        assert calls[-1] == (reader.num_bytes, reader.num_bytes)
    assert calls == sorted(calls)


def test_an_unchanged_folder_is_read_once(decoders: Folders, tmp_path: Path, reads: list[Path]) -> None:
    first = identify_folder(decoders["nq"], cache_dir=tmp_path).fingerprint
    assert identify_folder(decoders["nq"], cache_dir=tmp_path).fingerprint == first == fingerprint(decoders["nq"])
    assert len(reads) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_changed_file_is_read_again_even_with_its_old_time(
    decoders: Folders, copy: Copy, tmp_path: Path, reads: list[Path]
) -> None:
    folder = copy(decoders["nq"])
    before = identify_folder(folder, cache_dir=tmp_path / "cache").fingerprint
    status = (folder / WEIGHTS).stat()
    (folder / WEIGHTS).write_bytes((decoders["base"] / WEIGHTS).read_bytes())
    os.utime(folder / WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (folder / WEIGHTS).stat().st_size == status.st_size
    assert identify_folder(folder, cache_dir=tmp_path / "cache").fingerprint == fingerprint(decoders["base"]) != before
    assert len(reads) == 2


def test_on_a_full_disk_a_model_is_read_once_and_nothing_is_left(
    decoders: Folders, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    assert identify_folder(decoders["nq"], cache_dir=tmp_path).fingerprint == fingerprint(decoders["nq"])
    assert reads == [decoders["nq"].resolve()]
    assert [path.suffix for path in (tmp_path / "fingerprints").iterdir()] == [".lock"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"state": 3}', b'{"fingerprint": "x"}', b"[" * 99999])
def test_a_corrupt_cache_costs_time_alone(decoders: Folders, tmp_path: Path, content: bytes) -> None:
    expected = identify_folder(decoders["nq"], cache_dir=tmp_path).fingerprint
    (entry,) = (tmp_path / "fingerprints").glob("*.json")
    entry.write_bytes(content)
    assert identify_folder(decoders["nq"], cache_dir=tmp_path).fingerprint == expected


def test_an_entry_in_which_a_digit_changed_is_found_and_made_again(decoders: Folders, tmp_path: Path) -> None:
    expected = identify_folder(decoders["nq"], cache_dir=tmp_path).fingerprint
    (entry,) = (tmp_path / "fingerprints").glob("*.json")
    written = entry.read_text()
    wrong = ("1" if expected[0] == "0" else "0") + expected[1:]
    entry.write_text(written.replace(expected, wrong))
    assert identify_folder(decoders["nq"], cache_dir=tmp_path).fingerprint == expected
    assert entry.read_text() == written


def test_a_cache_that_cannot_be_written_costs_time_alone(decoders: Folders, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert identify_folder(decoders["nq"], cache_dir=tmp_path / "file").fingerprint == fingerprint(decoders["nq"])


def test_a_folder_that_changes_while_it_is_read(decoders: Folders, copy: Copy, tmp_path: Path) -> None:
    folder = copy(decoders["nq"])
    with pytest.raises(CheckpointError, match="was written to while it was read"):
        identify_folder(folder, cache_dir=tmp_path / "cache", progress=lambda done, total: (folder / WEIGHTS).touch())
    assert not list(tmp_path.rglob("fingerprints/*.json"))


def test_a_new_file_is_read_once_a_write_would_leave_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of files move in steps: a write within the step in which it was read would not be seen."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / WEIGHTS)
    with CheckpointReader(tmp_path) as reader:
        (config, weights) = reader.files
        fingerprint_of = identify(reader)
        assert time.time_ns() - max(config.changed_ns, weights.changed_ns) >= 20_000_000
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("an older one is read at once"))
        assert identify(reader) == fingerprint_of


def test_who_asks_at_the_same_time_reads_once(decoders: Folders, tmp_path: Path, reads: list[Path]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: identify_folder(decoders["nq"], cache_dir=tmp_path).fingerprint, range(8)))
    assert len(found) == 1
    assert len(reads) == 1
