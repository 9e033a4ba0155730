"""Models that cannot be mixed, at every door: told before anything is written, started or run, and nothing stays."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.command_line import run
from tests.models import make_decoder, make_decoder_pool, make_encoder

PARAMS = "model.safetensors"


class Code:
    """A pickle that asks for a call while it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def truncated(expert: Path) -> None:
    content = (expert / PARAMS).read_bytes()
    (expert / PARAMS).write_bytes(content[: len(content) // 2])


def corrupt(expert: Path) -> None:
    content = (expert / PARAMS).read_bytes()
    (expert / PARAMS).write_bytes(content[:8] + b"\xff" * 64 + content[72:])


def without_a_shard(expert: Path) -> None:
    names = list(load_file(expert / PARAMS))
    (expert / PARAMS).rename(expert / "model-00001-of-00002.safetensors")
    index = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {names[0]: "model-00002-of-00002.safetensors"}
    (expert / f"{PARAMS}.index.json").write_text(json.dumps({"weight_map": index}))


def pickled_with_code(expert: Path) -> None:
    (expert / PARAMS).unlink()
    torch.save({"a": torch.ones(1), "x": Code(expert.parent / "ran")}, expert / "pytorch_model.bin")


def quantised(expert: Path) -> None:
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def of_another_architecture(expert: Path) -> None:
    shutil.rmtree(expert)
    make_encoder(expert)


def of_another_shape(expert: Path) -> None:
    shutil.rmtree(expert)
    make_decoder(expert, hidden_size=32, num_heads=1)


def of_another_vocabulary(expert: Path) -> None:
    params = load_file(expert / PARAMS)
    params["model.embed_tokens.weight"] = torch.zeros(328, 64)
    save_file(params, expert / PARAMS, metadata={"format": "pt"})


def missing(expert: Path) -> None:
    shutil.rmtree(expert)


DAMAGES: dict[Callable[[Path], None], list[str]] = {
    truncated: ["nq", PARAMS],
    corrupt: ["nq", PARAMS],
    without_a_shard: ["nq", "names the shard 'model-00002-of-00002.safetensors', which is missing"],
    pickled_with_code: ["nq", "pytorch_model.bin cannot be read as tensors alone"],
    quantised: ["nq", "is quantised"],
    of_another_architecture: ["nq", "bert", "llama"],
    of_another_shape: ["nq", "hidden_size", "32", "64"],
    of_another_vocabulary: [
        "nq",
        "model.embed_tokens.weight",
        "float32[320, 64]",
        "float32[328, 64]",
        "resize it back",
    ],
    missing: ["nq"],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    models = make_decoder_pool(tmp_path / "models", ("nq",))
    pool = {
        "id": "flan",
        "kind": "decoder",
        "base": str(models["base"]),
        "experts": {"nq": str(models["nq"])},
        "engine": {"type": "fake", "max_model_len": 64},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"server": {"port": 0}, "store": {"cache_dir": "cache"}, "pools": [pool]}))
    return path


def doors(config: Path) -> dict[str, list[str]]:
    mix = ["mix", str(config), "--pool", "flan", "--weights", "base=0.5,nq=0.5", "--out", str(config.parent / "mixed")]
    return {"mix": mix, "serve": ["serve", str(config)]}


def files(folder: Path) -> set[Path]:
    """What is there, the cache of fingerprints left out: it spares the next command work, and holds digests alone."""
    return {path for path in folder.rglob("*") if "fingerprints" not in path.parts and path.name != "cache"}


@pytest.mark.parametrize("door", ["mix", "serve"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_it_is_told_and_nothing_stays(
    config: Path, door: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(config.parent / "models" / "nq")
    before = files(config.parent)
    code, out, err = run(capsys, *doors(config)[door])
    assert (code, out) == (2, "")
    message = " ".join(err.split())
    assert [word for word in DAMAGES[damage] if word not in message] == [], message
    assert "Traceback" not in err
    assert files(config.parent) == before
    assert not [child for child in psutil.Process().children() if "fake" in " ".join(child.cmdline())]
