"""`init`: folders become a configuration that `doctor` accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cocktail_serve.config import load_settings
from tests.adapters import train_adapter
from tests.command_line import answer, exit_code, refusal, run
from tests.models import make_decoder, make_encoder_pool


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "bge"
    make_encoder_pool(folder, ("faq",))
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCKTAIL_STORE__CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COCKTAIL_SERVER__PORT", "0")
    monkeypatch.chdir(tmp_path)


def test_what_it_writes_passes_doctor(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "init", models, "--out", "pool.yaml")
    assert code == 0, err
    assert f"base: {models / 'base'} (its folder is called base)" in out
    assert "✓ pool bge encoder, base and 1 experts can be mixed" in out
    assert "next: cocktail-serve serve pool.yaml" in out
    settings = load_settings("pool.yaml")
    assert [(pool.id, pool.kind, list(pool.experts)) for pool in settings.pools] == [("bge", "encoder", ["faq"])]
    assert exit_code("doctor", "pool.yaml") == 0


def test_decoders_and_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_decoder(tmp_path / "llama")
    train_adapter(base, tmp_path / "billing" / "checkpoint-20")
    train_adapter(base, tmp_path / "returns", seed=2)
    told = answer(capsys, "init", tmp_path, "--no-check")
    assert (told["out"], told["checks"], told["left_out"]) == ("cocktail-serve.yaml", [], [])
    (pool,) = told["pools"]
    assert (pool["id"], pool["adapters"]) == ("llama", ["billing", "returns"])
    text = Path("cocktail-serve.yaml").read_text()
    assert yaml.safe_load(text)["pools"] == [
        {
            "id": "llama",
            "kind": "decoder",
            "base": "llama",
            "experts": {"billing": "billing/checkpoint-20", "returns": "returns"},
            "engine": {"type": "vllm"},
        }
    ]
    assert text.startswith("# Made by `cocktail-serve init ")
    assert load_settings("cocktail-serve.yaml").pools[0].base.path == str(base)


def test_what_doctor_refuses_is_not_written(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "broken"
    make_encoder_pool(folder, ("faq",))
    weights = folder / "faq" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\x00\x00\xc0\x7f" * 2)  # not numbers
    code, out, _ = run(capsys, "init", folder)
    assert code == 1
    assert "✗ pool broken" in out
    assert "nothing was written" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "cache"]
    told = run(capsys, "init", folder, "--json")
    assert told[0] == 1
    assert '"out": null' in told[1]
    assert run(capsys, "init", folder, "--no-check")[0] == 0


def test_nothing_is_overwritten(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cocktail-serve.yaml").write_text("mine")
    assert "nothing is overwritten" in refusal(capsys, "init", models)
    assert Path("cocktail-serve.yaml").read_text() == "mine"


def test_folders_without_a_pool_say_why(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "they hold no model" in refusal(capsys, "init", tmp_path / "empty")
    assert "nothing among these folders was fine-tuned from it" in refusal(capsys, "init", models / "base")
    assert "there is no folder" in refusal(capsys, "init", tmp_path / "none")
