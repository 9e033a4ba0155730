"""`python -m vllm_cocktail`: the manifest of somebody who has vLLM and no gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import make_decoder, make_decoder_pool
from vllm_cocktail import __main__ as main_module
from vllm_cocktail.__main__ import main
from vllm_cocktail.manifest import Manifest


def run(tmp_path: Path, base: Path, *experts: str, more: tuple[str, ...] = ()) -> int:
    words = [word for expert in experts for word in ("--expert", expert)]
    options = ["--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "pool.json"), *more]
    return main(["--base", str(base), *words, *options])


def test_it_writes_a_manifest_and_prints_the_start_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_module, "is_cpu_build", lambda: False)
    folders = make_decoder_pool(tmp_path, ("red",))
    sizes = ("--cache-bytes", "1MiB", "--expert-memory", "2MiB")
    assert run(tmp_path, folders["base"], f"red={folders['red']}", more=sizes) == 0
    manifest = Manifest.read(tmp_path / "pool.json")
    assert (manifest.dtype, manifest.cache_bytes, manifest.managed) == ("float32", 2**20, False)
    assert manifest.expert_bytes == 2**21
    assert set(manifest.names) == {"base", "red"}
    assert manifest.members[manifest.names["red"]].path == folders["red"]
    out = capsys.readouterr().out
    assert manifest.names["red"] in out
    assert f"vllm serve {folders['base']} --dtype float32 --worker-extension-cls vllm_cocktail.worker." in out


def test_the_start_line_of_the_cpu_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `vllm` command fails, and left alone it takes nearly all memory for its KV cache."""
    monkeypatch.setattr(main_module, "is_cpu_build", lambda: True)
    base = make_decoder(tmp_path / "base")
    assert run(tmp_path, base) == 0
    out = capsys.readouterr().out
    assert "vllm serve" not in out
    variables, command = out.strip().splitlines()[-2:]
    assert {"VLLM_CPU_KVCACHE_SPACE=1", "TORCH_COMPILE_DISABLE=1"} <= set(variables.split())
    assert command.startswith(f"python -m vllm.entrypoints.openai.api_server --model {base} --enforce-eager --dtype ")


def test_models_that_cannot_be_mixed_are_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_decoder(tmp_path / "base")
    wide = make_decoder(tmp_path / "wide", hidden_size=32)
    assert run(tmp_path, base, f"wide={wide}") == 2
    assert run(tmp_path, base, "gone=/no/such/folder") == 2
    assert run(tmp_path, base, f"Wide={base}") == 2
    assert "/no/such/folder" in capsys.readouterr().err
    assert not (tmp_path / "pool.json").exists()


@pytest.mark.parametrize("words", [["--expert", "red"], ["--cache-bytes", "much"], ["--dtype", "int8"], []])
def test_usage_errors_exit_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words, "--out", "pool.json"])
    assert caught.value.code == 2
