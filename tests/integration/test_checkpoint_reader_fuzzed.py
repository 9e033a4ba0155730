"""Whatever bytes lie in a safetensors file, the reader gives its tensors or raises a `CheckpointError`."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import CheckpointError

WEIGHTS = "model.safetensors"
VALID_HEADER = json.dumps(
    {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1, 1], "data_offsets": [8, 12]},
        "__metadata__": {"format": "pt"},
    }
).encode()
VALID = struct.pack("<Q", len(VALID_HEADER)) + VALID_HEADER + bytes(12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {}, optional={"dtype": JSON, "shape": JSON | st.lists(st.integers(), max_size=3), "data_offsets": JSON}
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return tmp_path


def assert_only_checkpoint_errors(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    try:
        with CheckpointReader(folder) as reader:
            for name, info in reader.tensors.items():
                assert tuple(reader.get(name).shape) == info.shape
    except CheckpointError:
        pass


fuzzed = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_give_checkpoint_errors_alone(model: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(VALID)
    for place, byte in changes:
        content[place] = byte
    assert_only_checkpoint_errors(model, bytes(content))


@fuzzed
@given(begin=st.integers(0, len(VALID)), cut=st.integers(0, 40), put=st.binary(max_size=40))
def test_cut_and_inserted_bytes_give_checkpoint_errors_alone(model: Path, begin: int, cut: int, put: bytes) -> None:
    assert_only_checkpoint_errors(model, VALID[:begin] + put + VALID[begin + cut :])


@fuzzed
@given(header=st.dictionaries(st.text(max_size=4), ENTRIES | JSON, max_size=4), data=st.binary(max_size=16))
@example(header={"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, data=b"")
@example(header={"a": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}}, data=b"")
@example(header={"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, data=b"")
def test_invented_headers_give_checkpoint_errors_alone(model: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    assert_only_checkpoint_errors(model, struct.pack("<Q", len(text)) + text + data)
