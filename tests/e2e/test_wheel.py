"""The wheel alone, in an environment without a clone: its demo runs, its trainer starts, and it knows its commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from cocktail_serve import build
from cocktail_serve.cli.demo.pools import CHAT_EXPERTS, DECODER_EXPERTS

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.full, pytest.mark.slow]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make wheel` does."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--out-dir", out, ROOT], check=True)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel in it; what it depends on is read from where these tests have it, and the
    project's own editable installation there is not, since its `.pth` is not looked at."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return python


def run(python: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environ
    return subprocess.run([python, *words], capture_output=True, text=True, env=env, cwd=python.parent, check=False)


def test_it_carries_demo_and_trainer(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    examples = "cocktail_serve/carried/examples"
    pool = f"{examples}/demo_pool"
    assert {f"{pool}/decoder/{name}/model.safetensors" for name in ("base", *DECODER_EXPERTS)} <= names
    assert {f"{examples}/smollm2/experts/{name}/adapter_model.safetensors" for name in CHAT_EXPERTS} <= names
    assert {f"{pool}/make_encoder_pool.py", f"{examples}/smollm2/make_base.py"} <= names
    assert "cocktail_serve/train_experts/__main__.py" in names
    assert {"cocktail_serve/merging/linear.c", "vllm_cocktail/unmerged/native_kernel.c"} <= names
    assert not [name for name in names if name.startswith(("tests/", "examples/", "bench/")) or "__pycache__" in name]


def test_it_knows_what_it_was_built_from(python: Path) -> None:
    told = run(python, "-m", "cocktail_serve.cli", "--version")
    assert f"build {build.commit_of(ROOT) or 'not known'}" in told.stderr.splitlines()


def test_its_trainer_starts(python: Path) -> None:
    told = run(python, "-m", "cocktail_serve.train_experts", "--help")
    assert (told.returncode, "--task" in told.stdout) == (0, True), told.stderr


@pytest.mark.vllm
def test_its_demo_runs(python: Path, tmp_path: Path) -> None:
    told = run(python, "-m", "cocktail_serve.cli", "demo", "--json", COCKTAIL_DEMO_DIR=str(tmp_path))
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)
    assert str(python.parents[1]) in (tmp_path / "demo.yaml").read_text(), "the pool is the wheel's own"
