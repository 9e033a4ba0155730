"""`cocktail-serve mix` killed in the middle of writing: nothing half-written has the final name; a rerun succeeds."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.models import make_decoder_pool

TIMEOUT_S = 60

STOPS_HALF_WAY = """
    # run by the process at its start: its third write is done in half, then nothing more happens
    import os
    import pathlib
    import time

    whole = os.pwrite
    writes = []

    def torn(file, content, offset):
        writes.append(offset)
        if len(writes) < 3:
            return whole(file, content, offset)
        whole(file, content[: len(content) // 2], offset)
        pathlib.Path({reached!r}).touch()
        time.sleep(600)

    os.pwrite = torn
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folders = make_decoder_pool(tmp_path / "pool")
    experts = {name: str(path) for name, path in folders.items() if name != "base"}
    pool = {
        "id": "flan",
        "kind": "decoder",
        "base": str(folders["base"]),
        "experts": experts,
        "engine": {"type": "fake"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"store": {"cache_dir": str(tmp_path / "cache")}, "pools": [pool]}))
    return path


def mix_command(config: Path, out: Path) -> list[str]:
    expert = next(iter(yaml.safe_load(config.read_text())["pools"][0]["experts"]))
    weights = f"base=0.4,{expert}=0.6"
    command = [sys.executable, "-m", "cocktail_serve.cli", "mix", str(config), "--pool", "flan", "--weights", weights]
    return [*command, "--out", str(out)]


def killed_half_way(command: list[str], folder: Path) -> None:
    """Starts the command and kills it when it has written half."""
    reached = folder / "reached"
    (folder / "sitecustomize.py").write_text(textwrap.dedent(STOPS_HALF_WAY).format(reached=str(reached)))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not reached.exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()


def test_a_killed_mix_leaves_nothing_under_its_name_and_can_be_run_again(config: Path, tmp_path: Path) -> None:
    results, faults = tmp_path / "results", tmp_path / "faults"
    faults.mkdir()
    out = results / "mixed"
    killed_half_way(mix_command(config, out), faults)
    assert not out.exists()
    (left,) = results.iterdir()  # so the kill came in the middle
    assert left.name.startswith(".mixed.")
    assert (left / "model.safetensors").stat().st_size > 0

    done = subprocess.run(mix_command(config, out), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert list(results.iterdir()) == [out]  # what was left behind has gone
    again = subprocess.run(
        mix_command(config, results / "other"), capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    assert again.returncode == 0
    mixed, expected = (load_file(folder / "model.safetensors") for folder in (out, results / "other"))
    assert mixed.keys() == expected.keys()
    assert all(torch.equal(mixed[name], expected[name]) for name in mixed)


def test_a_mix_that_is_still_written_is_nobodys_to_remove(config: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    alive = results / ".mixed.0123abcd.partial"
    alive.mkdir()
    script = (
        "import fcntl, os, sys; file = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(1, flush=True); input()"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(alive)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline()
        subprocess.run(mix_command(config, results / "mixed"), capture_output=True, timeout=TIMEOUT_S, check=True)
        assert alive.is_dir()
    finally:
        writer.communicate("")
    assert (results / "mixed" / "model.safetensors").is_file()
