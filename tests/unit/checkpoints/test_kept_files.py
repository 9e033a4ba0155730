"""What is kept in the cache is bounded: the least recently used goes first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cocktail_serve.checkpoints.fingerprint import identify_folder
from cocktail_serve.checkpoints.kept_files import read_kept, trim, use_kept, write_kept
from cocktail_serve.config import Settings
from cocktail_serve.gateway.run_dir import trim_cache
from tests.models import make_decoder


def keep(folder: Path, name: str, *, size: int = 100, age_s: float = 0) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_kept(path, b"x" * size)
    used_at = 1_700_000_000 - age_s
    os.utime(path, (used_at, used_at))
    return path


def names(*folders: Path) -> set[str]:
    return {path.name for folder in folders for path in folder.iterdir()}


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    keep(one, "oldest.json", age_s=40)
    old = keep(two, "old.tokenizer", age_s=30)
    keep(one, "new.json", age_s=20)
    keep(two, "newest.tokenizer", age_s=10)
    (one / "old.lock").touch()
    trim([one, two, tmp_path / "none"], 400)
    assert names(one, two) == {"oldest.json", "old.tokenizer", "new.json", "newest.tokenizer", "old.lock"}
    read_kept(old)
    trim([one, two], 399)
    assert names(one, two) == {"old.tokenizer", "new.json", "newest.tokenizer", "old.lock"}
    trim([one, two], 200)
    assert names(one, two) == {"old.tokenizer", "newest.tokenizer", "old.lock"}
    trim([one, two], 99)
    assert names(one, two) == {"old.lock"}, "locks are held by name"


def test_what_is_used_counts_as_new(tmp_path: Path) -> None:
    first, second = keep(tmp_path, "first.json", age_s=20), keep(tmp_path, "second.json", age_s=10)
    assert use_kept(first)
    assert not use_kept(tmp_path / "none.json")
    trim([tmp_path], 100)
    assert (first.exists(), second.exists()) == (True, False)


def test_what_cannot_be_deleted_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, other = keep(tmp_path, "stuck.json", age_s=20), keep(tmp_path, "other.json", age_s=10)
    unlink = Path.unlink

    def refuse(path: Path, **options: bool) -> None:
        if path == stuck:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    trim([tmp_path], 100)
    assert (stuck.exists(), other.exists()) == (True, False)
    assert f"larger than store.cache_bytes: cannot delete {stuck}: Operation not permitted" in caplog.text


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = keep(tmp_path, "kept.json", size=3)

    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space left"):
            write_kept(path, b"other")
    assert read_kept(path) == b"xxx"
    assert names(tmp_path) == {"kept.json"}


def test_the_configured_bound_holds_for_fingerprints(tmp_path: Path) -> None:
    """Those of the models in use stay: they were read last."""
    folder, cache = make_decoder(tmp_path / "decoder"), tmp_path / "cache"
    forgotten = keep(cache / "fingerprints", "forgotten.json", size=5000, age_s=10)
    tokenizer = keep(cache / "engines" / "tokenizers", "gone.tokenizer", size=5000, age_s=20)
    log = keep(cache / "engines", "flan.log", size=5000, age_s=30)
    before = identify_folder(folder, cache_dir=cache)
    pool = {"id": "flan", "kind": "decoder", "base": "b", "engine": {"type": "fake"}}
    store = {"cache_dir": str(cache), "cache_bytes": "6kB"}
    trim_cache(Settings.model_validate({"store": store, "pools": [pool]}))
    assert (forgotten.exists(), tokenizer.exists(), log.exists()) == (True, False, True)
    trim_cache(Settings.model_validate({"store": {**store, "cache_bytes": "4kB"}, "pools": [pool]}))
    assert not forgotten.exists()
    reads: list[int] = []
    assert identify_folder(folder, cache_dir=cache, progress=lambda done, _total: reads.append(done)) == before
    assert not reads, "it was kept"
