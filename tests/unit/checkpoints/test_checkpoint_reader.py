"""Reading model folders: what is there, and every way a folder can be broken."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import CheckpointError
from tests.models import make_decoder

Folders = dict[str, Path]
Copy = Callable[..., Path]
WEIGHTS = "model.safetensors"


def write_model(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "bert"}))
    save_file(tensors, folder / WEIGHTS)
    return folder


def write_safetensors(folder: Path, header: bytes, data: bytes = b"") -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data)


def shard(folder: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, str] | None = None) -> None:
    (folder / WEIGHTS).unlink(missing_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    index = weight_map or {name: file for file, tensors in shards.items() for name in tensors}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)})


def test_tensors_are_those_of_the_file(decoders: Folders) -> None:
    stored = load_file(decoders["nq"] / WEIGHTS)
    with CheckpointReader(decoders["nq"]) as reader:
        assert reader.tensors.keys() == stored.keys()
        for name, info in reader.tensors.items():
            assert (f"torch.{info.dtype}", info.shape) == (str(stored[name].dtype), tuple(stored[name].shape))
            assert torch.equal(reader.get(name), stored[name])
        assert reader.num_bytes == sum(tensor.nbytes for tensor in stored.values())
        assert reader.dtype == "float32"


def test_shards_are_one_checkpoint(tmp_path: Path, decoders: Folders) -> None:
    make_decoder(tmp_path / "sharded", perturbation_seed=1, max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    with CheckpointReader(tmp_path / "sharded") as reader, CheckpointReader(decoders["ag-news"]) as whole:
        assert dict(reader.tensors) == dict(whole.tensors)
        assert all(torch.equal(reader.get(name), whole.get(name)) for name in whole.tensors)


def test_names_come_in_the_order_of_the_bytes(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"z": torch.ones(1), "a": torch.ones(1)})
    entries = {n: {"dtype": "F32", "shape": [1], "data_offsets": [b, b + 4]} for n, b in (("a", 4), ("z", 0))}
    write_safetensors(folder, json.dumps(entries).encode(), bytes(8))
    with CheckpointReader(folder) as reader:
        assert list(reader.tensors) == ["z", "a"]


def test_opening_reads_no_parameters_and_tensors_outlive_the_reader(model: Path) -> None:
    with CheckpointReader(model) as reader:
        tensor = reader.get("a")
        assert tensor.data_ptr() == reader.get("a").data_ptr()  # mapped, not copied
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(CheckpointError, match="no tensor 'a'"):
        reader.get("a")


def test_unknown_tensor(model: Path) -> None:
    with CheckpointReader(model) as reader, pytest.raises(CheckpointError, match="holds no tensor 'c'"):
        reader.get("c")


def test_bin_is_read_as_tensors_alone(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    with CheckpointReader(model) as reader:
        assert reader.get("a").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert reader.tensors["b"].dtype == "int64"


def test_safetensors_go_before_bin(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"never read")
    with CheckpointReader(model) as reader:
        assert set(reader.tensors) == {"a", "b"}


class Code:
    """What a hostile pickle looks like: it asks for a call while it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(model: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "x": Code(tmp_path / "ran")}, model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read as tensors alone"):
        CheckpointReader(model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, not a state dict"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' is a dict"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is a Tensor"),
        ({1: torch.ones(1)}, "1 is a Tensor"),
    ],
    ids=["list", "nested", "sparse", "number"],
)
def test_bin_that_is_no_state_dict(model: Path, content: Any, message: str) -> None:
    torch.save(content, model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(model)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"PK\x03\x04", b"<html>not found</html>"])
def test_bin_that_is_corrupt(model: Path, content: bytes) -> None:
    (model / "pytorch_model.bin").write_bytes(content)
    (model / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="convert it to safetensors"):
        CheckpointReader(model)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        CheckpointReader(tmp_path / "none")


def test_no_parameters(model: Path) -> None:
    (model / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"holds no parameters: expected model\.safetensors"):
        CheckpointReader(model)


@pytest.mark.parametrize("content", [None, "", "[]", "{", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")])
def test_config_that_cannot_be_read(model: Path, content: str | bytes | None) -> None:
    config = model / "config.json"
    if content is None:
        config.unlink()
    else:
        config.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CheckpointReader(model)


def test_an_adapter_is_no_checkpoint(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        CheckpointReader(model)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantised_model_is_refused(model: Path, key: str) -> None:
    (model / "config.json").write_text(json.dumps({key: {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="is quantised"):
        CheckpointReader(model)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_quantised_dtype_is_refused(model: Path, dtype: str) -> None:
    write_safetensors(model, json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 1]}}).encode(), b"\0")
    with pytest.raises(CheckpointError, match=f"tensor 'a' is {dtype}"):
        CheckpointReader(model)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 50, -1])
def test_a_truncated_file_names_itself(model: Path, length: int) -> None:
    whole = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        CheckpointReader(model)


def entry(begin: int, end: int, *, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "num_bytes"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12),
        ({"a": entry(0, 8)}, 4),
        ({"a": entry(0, 8)}, 12),
        ({"a": entry(0, 8, shape=[3])}, 8),
        ({"a": entry(0, 8, shape=[2**40, 2**40])}, 8),
        ({"a": entry(0, 8, shape=[-2])}, 8),
        ({"a": entry(8, 0)}, 8),
        ({"a": entry(0, 8, dtype="Q9")}, 8),
        ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8),
        ({"a": 5}, 8),
        ([], 0),
    ],
    ids=[
        "overlap",
        "hole",
        "short",
        "long",
        "size",
        "overflow",
        "negative",
        "order",
        "dtype",
        "missing",
        "int",
        "list",
    ],
)
def test_a_header_that_lies(model: Path, header: Any, num_bytes: int) -> None:
    write_safetensors(model, json.dumps(header).encode(), bytes(num_bytes))
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        CheckpointReader(model)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 101 * 2**20])
def test_an_absurd_header_length(model: Path, length: int) -> None:
    (model / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        CheckpointReader(model)


def test_a_name_given_twice_in_one_header(model: Path) -> None:
    one = json.dumps(entry(0, 4))
    write_safetensors(model, f'{{"a": {one}, "a": {one}}}'.encode(), bytes(4))
    with pytest.raises(CheckpointError, match="names 'a' twice"):
        CheckpointReader(model)


def test_a_missing_shard_is_named(model: Path) -> None:
    shard(model, {"one.safetensors": {"a": torch.ones(1)}, "two.safetensors": {"b": torch.ones(1)}})
    (model / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the shard 'two\.safetensors', which is missing"):
        CheckpointReader(model)


def test_index_and_shard_disagree(model: Path) -> None:
    tensors = {"one.safetensors": {"a": torch.ones(1)}}
    shard(model, tensors, {"a": "one.safetensors", "lost": "one.safetensors"})
    with pytest.raises(CheckpointError, match="tensor 'lost' is not in it"):
        CheckpointReader(model)
    shard(model, {"one.safetensors": {"a": torch.ones(1), "b": torch.ones(1)}}, {"a": "one.safetensors"})
    with pytest.raises(CheckpointError, match="tensor 'b' is in it and not in the index"):
        CheckpointReader(model)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "a\\b", "x\0y"])
def test_an_index_may_not_lead_out_of_the_folder(model: Path, file: str) -> None:
    shard(model, {}, {"a": file})
    with pytest.raises(CheckpointError, match="lies outside its folder"):
        CheckpointReader(model)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"])
def test_a_malformed_index(model: Path, index: str) -> None:
    (model / WEIGHTS).unlink()
    (model / f"{WEIGHTS}.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        CheckpointReader(model)


@pytest.mark.parametrize(("tied", "expected"), [(True, {"lm_head.weight": "model.embed_tokens.weight"}), (False, {})])
def test_stored_output_embeddings_are_left_out_where_they_are_tied(
    tmp_path: Path, tied: bool, expected: dict[str, str]
) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(4, 2)}
    folder = write_model(tmp_path / "m", tensors, {"tie_word_embeddings": tied})
    with CheckpointReader(folder) as reader:
        assert reader.tied == expected
        assert ("lm_head.weight" in reader.tensors) is not tied
        assert torch.equal(reader.get("lm_head.weight"), torch.ones(4, 2))


def test_whether_embeddings_are_tied_may_follow_from_the_architecture(tmp_path: Path) -> None:
    tensors = {"transformer.wte.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(4, 2)}
    with CheckpointReader(write_model(tmp_path / "m", tensors, {"model_type": "gpt2"})) as reader:
        assert list(reader.tied) == ["lm_head.weight"]


def test_rotary_frequencies_are_no_parameters(tmp_path: Path) -> None:
    tensors = {"layers.0.rotary_emb.inv_freq": torch.ones(4), "w": torch.ones(4)}
    with CheckpointReader(write_model(tmp_path / "m", tensors)) as reader:
        assert list(reader.tensors) == ["w"]


def test_parameters_of_further_modules_carry_their_folder(encoders: Folders, copy: Copy) -> None:
    folder = copy(encoders["base"])
    dense = folder / "2_Normalize"
    save_file({"linear.weight": torch.eye(32)}, dense / WEIGHTS)
    with CheckpointReader(folder) as reader:
        assert torch.equal(reader.get("2_Normalize/linear.weight"), torch.eye(32))
        assert reader.prefix_of("2_Normalize/linear.weight") == "2_Normalize/"
        assert reader.prefix_of("embeddings.word_embeddings.weight") == ""


def test_the_older_layout_of_sentence_transformers(encoders: Folders, copy: Copy, edit_json: Any) -> None:
    folder = copy(encoders["base"])
    inner = folder / "0_Transformer"
    inner.mkdir()
    for name in (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(inner / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    with CheckpointReader(folder) as reader, CheckpointReader(encoders["base"]) as flat:
        assert dict(reader.tensors) == dict(flat.tensors)
