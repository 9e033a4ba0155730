"""Finished measurements: kept whole or not at all, found by what they depend on."""

from pathlib import Path

import pytest

from cocktail_serve.errors import StorageError
from cocktail_serve.evaluation.cells import CellStore


def test_a_value_is_found_by_its_key_in_a_later_run(tmp_path: Path):
    CellStore(tmp_path / "cells").put({"recipe": "a", "task": "t"}, [1.0, 0.5])
    later = CellStore(tmp_path / "cells")
    assert later.get({"task": "t", "recipe": "a"}) == [1.0, 0.5]
    assert later.get({"task": "t", "recipe": "b"}) is None


def test_without_a_folder_values_live_as_long_as_the_store():
    store = CellStore(None)
    store.put({"a": 1}, 2.0)
    assert store.get({"a": 1}) == 2.0
    assert CellStore(None).get({"a": 1}) is None


def test_a_file_that_was_cut_short_is_measured_again(tmp_path: Path):
    CellStore(tmp_path).put({"a": 1}, 2.0)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-3])
    assert CellStore(tmp_path).get({"a": 1}) is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/cells"):
        CellStore(tmp_path / "file" / "cells")
