"""The folder that engines write to: what cannot be written is told with the folder."""

from __future__ import annotations

import re
import resource
from contextlib import ExitStack
from pathlib import Path

import pytest

from cocktail_serve.config import Settings
from cocktail_serve.errors import StorageError
from cocktail_serve.gateway.run_dir import own_run_dir, place_of


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    pool = {"id": "flan", "kind": "decoder", "base": "b", "engine": {"type": "fake"}}
    return Settings.model_validate({"store": {"cache_dir": str(tmp_path / "cache")}, "pools": [pool]})


def test_a_disk_that_is_full_is_told_with_the_folder(settings: Settings, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ExitStack() as stack:
        run_dir = own_run_dir(settings, stack)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        try:
            with pytest.raises(StorageError, match=f"{re.escape(str(run_dir))}: File too large; make room there"):
                place_of(run_dir)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(place_of(run_dir)) == 32


def test_a_folder_that_cannot_be_made_is_told(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with (
        ExitStack() as stack,
        pytest.raises(StorageError, match=r"cache/engines: Not a directory; .* store\.cache_dir"),
    ):
        own_run_dir(settings, stack)
