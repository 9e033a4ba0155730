"""Files that are replaced, written to, cut short, put back: what is mixed is what the fingerprint says, or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cocktail_serve.checkpoints import mapping, unchanged
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.mixture import Mixture, iter_mixture
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.engines.start_failures import may_pass
from cocktail_serve.errors import ModelChangedError
from cocktail_serve.merging import native
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe, make_recipe

Folders = dict[str, Path]
Open = Callable[..., Pool]
Copy = Callable[..., Path]
WEIGHTS = "model.safetensors"


@pytest.fixture
def folders(decoders: Folders, copy: Copy) -> Folders:
    return {name: copy(folder, name) for name, folder in decoders.items()}


@pytest.fixture
def pool(folders: Folders, opened: Open) -> Pool:
    return opened(folders)


@pytest.fixture(params=["mapped", "read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler files are mapped, without one they are read."""
    if request.param == "read":
        monkeypatch.setattr(mapping, "_library", lambda: None)
    elif isinstance(native.load_kernel(), str):
        pytest.skip(str(native.load_kernel()))


def half(pool: Pool, name: str = "nq") -> Recipe:
    return make_recipe(pool, {"base": 0.5, name: 0.5}, dtype="float32")


def mixed(pool: Pool, name: str = "nq") -> dict[str, torch.Tensor]:
    return dict(iter_mixture(half(pool, name), pool.by_fingerprint))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def write_over(folder: Path, other: Path) -> None:
    (folder / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())


def write_over_and_set_the_time_back(folder: Path, other: Path) -> None:
    status = (folder / WEIGHTS).stat()
    write_over(folder, other)
    os.utime(folder / WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))


def rename_over(folder: Path, other: Path) -> None:
    shutil.copy2(other / WEIGHTS, folder / "new")
    (folder / "new").rename(folder / WEIGHTS)


def truncate(folder: Path, other: Path) -> None:
    os.truncate(folder / WEIGHTS, 4096)


def delete(folder: Path, other: Path) -> None:
    (folder / WEIGHTS).unlink()


def delete_all(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)


def change_settings(folder: Path, other: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 3.0}))


CHANGES = [
    write_over,
    write_over_and_set_the_time_back,
    rename_over,
    truncate,
    delete,
    delete_all,
    change_settings,
]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["base", "nq"])
def test_other_files_are_refused_and_the_old_ones_taken_again(
    pool: Pool, folders: Folders, tmp_path: Path, change: Callable[[Path, Path], None], name: str
) -> None:
    expected = mixed(pool)
    kept = shutil.copytree(folders[name], tmp_path / "kept")
    change(folders[name], folders["ag-news"])
    for _ in range(2):
        with pytest.raises(ModelChangedError, match=f"'{name}' are not what they were") as caught:
            mixed(pool)
        assert caught.value.code == "model_changed"
        assert str(folders[name]) in caught.value.message
        assert "put the old ones back" in caught.value.message
        assert "plain vLLM with a manifest that is written again" in caught.value.message
    if name == "nq":
        mixed(pool, "ag-news")  # which needs none of it
    shutil.rmtree(folders[name], ignore_errors=True)
    shutil.copytree(kept, folders[name])
    assert same(mixed(pool), expected)


def test_the_same_content_is_read_once_more_and_no_more(
    pool: Pool, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    identify = unchanged.identify

    def spy(reader: CheckpointReader) -> object:
        read.append(reader.folder)
        return identify(reader)

    monkeypatch.setattr(unchanged, "identify", spy)
    expected = mixed(pool)
    assert read == []
    (folders["nq"] / WEIGHTS).touch()
    assert same(mixed(pool), expected)
    shutil.copy2(folders["nq"] / WEIGHTS, folders["nq"] / "copy")
    (folders["nq"] / "copy").rename(folders["nq"] / WEIGHTS)
    for _ in range(3):
        assert same(mixed(pool), expected)
    assert read == [folders["nq"]] * 2
    write_over(folders["nq"], folders["ag-news"])
    for _ in range(3):
        with pytest.raises(ModelChangedError):
            mixed(pool)
    assert read == [folders["nq"]] * 3


@pytest.mark.usefixtures("way")
def test_a_disk_that_did_not_answer_is_asked_again(
    pool: Pool, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = mixed(pool)
    (folders["nq"] / WEIGHTS).touch()
    read = os.preadv

    def fail(file: int, buffers: list[memoryview], begin: int) -> int:
        if begin > 8:  # behind the header
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, buffers, begin)

    with monkeypatch.context() as disk:
        disk.setattr(os, "preadv", fail)
        disk.setattr(mapping, "_is_lost", lambda _: True)
        for _ in range(2):
            with pytest.raises(ModelChangedError, match=r"'nq' are others .*/nq/model\.safetensors could") as caught:
                mixed(pool)
            assert may_pass(caught.value), "what is started with these files is started again"
    assert same(mixed(pool), expected)


def test_nobody_waits_for_the_files_of_another_model(
    pool: Pool, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = mixed(pool, "ag-news")
    for name in ("nq", "ag-news"):
        (folders[name] / WEIGHTS).touch()
    identify, is_read, may_end = unchanged.identify, threading.Event(), threading.Event()

    def slow(reader: CheckpointReader) -> object:
        if reader.folder == folders["nq"]:
            is_read.set()
            assert may_end.wait(60)
        return identify(reader)

    monkeypatch.setattr(unchanged, "identify", slow)
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(mixed, pool)
        try:
            assert is_read.wait(60)
            assert same(threads.submit(mixed, pool, "ag-news").result(timeout=20), expected)
        finally:
            may_end.set()
        waiting.result(timeout=60)


def test_the_same_parameters_in_two_folders_are_read_once_each(
    folders: Folders, opened: Open, copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = copy(folders["nq"], "twin")
    pools = [opened({"base": folders["base"], "nq": folder}) for folder in (folders["nq"], twin)]
    read: list[Path] = []
    identify = unchanged.identify
    monkeypatch.setattr(unchanged, "identify", lambda reader: (read.append(reader.folder), identify(reader))[1])
    for folder in (folders["nq"], twin):
        (folder / WEIGHTS).touch()
    for pool in pools * 3:
        mixed(pool)
    assert read == [folders["nq"], twin]


def test_bin_files_are_held_too(folders: Folders, opened: Open) -> None:
    for folder in (folders["nq"], folders["ag-news"]):
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
    pool = opened(folders)
    mixed(pool)
    shutil.copyfile(folders["ag-news"] / "pytorch_model.bin", folders["nq"] / "pytorch_model.bin")
    with pytest.raises(ModelChangedError, match=r"nq/pytorch_model\.bin holds other parameters"):
        mixed(pool)


def test_safetensors_that_appear_beside_a_bin(folders: Folders, opened: Open) -> None:
    torch.save(load_file(folders["nq"] / WEIGHTS), folders["nq"] / "pytorch_model.bin")
    (folders["nq"] / WEIGHTS).unlink()
    pool = opened(folders)
    shutil.copyfile(folders["ag-news"] / WEIGHTS, folders["nq"] / WEIGHTS)
    with pytest.raises(ModelChangedError, match=r"nq/model\.safetensors holds other parameters"):
        mixed(pool)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapters_files_are_held_too(folders: Folders, opened: Open, tmp_path: Path, file: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shape = load_file(folders["base"] / WEIGHTS)["model.layers.0.self_attn.q_proj.weight"].shape
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{prefix}.lora_A.weight": torch.ones(2, shape[1]), f"{prefix}.lora_B.weight": torch.ones(shape[0], 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    pool = opened({"base": folders["base"], "lora": adapter})
    expected = mixed(pool, "lora")
    (adapter / file).touch()
    assert same(mixed(pool, "lora"), expected)
    if file == "adapter_config.json":
        (adapter / file).write_text(json.dumps(config | {"lora_alpha": 8}))
    else:
        save_file({name: factor * 2 for name, factor in factors.items()}, adapter / file)
    with pytest.raises(ModelChangedError, match=f"'lora' are not what they were: .*{file}"):
        mixed(pool, "lora")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("change", [write_over, truncate])
def test_what_is_written_to_in_the_middle_of_a_mix_is_thrown_away(
    pool: Pool, folders: Folders, change: Callable[[Path, Path], None]
) -> None:
    params = iter_mixture(half(pool), pool.by_fingerprint)
    next(params)
    change(folders["nq"], folders["ag-news"])
    with pytest.raises(ModelChangedError, match=r"'nq', .*model\.safetensors was (written to|cut short)"):
        list(params)


def test_a_file_renamed_over_in_the_middle_of_a_mix_leaves_the_mixture_right(pool: Pool, folders: Folders) -> None:
    expected = mixed(pool)
    params = iter_mixture(half(pool), pool.by_fingerprint)
    got = dict([next(params)])
    rename_over(folders["nq"], folders["ag-news"])
    assert same(got | dict(params), expected)


def test_nothing_is_written_of_files_that_change_meanwhile(pool: Pool, folders: Folders, tmp_path: Path) -> None:
    def change(done: int, total: int) -> None:
        if done == total:
            truncate(folders["nq"], folders["ag-news"])

    with pytest.raises(ModelChangedError, match="thrown away"):
        save_mixture(half(pool), pool, tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_error_in_a_mix_is_told_by_its_cause(pool: Pool, folders: Folders) -> None:
    def fail(name: str, reason: str, change: Callable[[Path, Path], None] | None = None) -> None:
        with Mixture(half(pool, name), pool.by_fingerprint):
            if change is not None:
                change(folders[name], folders["base"])
            raise OSError(reason)

    with pytest.raises(ModelChangedError):
        fail("nq", "bad address", truncate)
    with pytest.raises(OSError, match="disk"):
        fail("ag-news", "the disk is full")


def test_a_pool_without_known_files_is_read_before_it_is_trusted(pool: Pool, folders: Folders) -> None:
    """A member written by hand has a fingerprint that nobody checked."""
    from dataclasses import replace

    members = {f: replace(member, files=()) for f, member in pool.by_fingerprint.items()}
    assert same(dict(iter_mixture(half(pool), members)), mixed(pool))
    nq = pool.experts["nq"].fingerprint
    members[nq] = replace(members[nq], path=folders["ag-news"])
    with pytest.raises(ModelChangedError):
        iter_mixture(half(pool), members)
