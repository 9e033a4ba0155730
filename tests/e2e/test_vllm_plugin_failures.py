"""A mix that fails half-way, processes that die, a server started wrongly: real vLLM that does not survive."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from bench.plain_linear import python_path
from tests.e2e.conftest import VLLMServer, accepts, completion_body, running_vllm
from tests.models import make_decoder
from vllm_cocktail.launch import server_args, server_env

pytestmark = pytest.mark.vllm

FAULTS = """
    from pathlib import Path

    def register():
        from cocktail_serve.checkpoints.mixture import Mixture

        whole = Mixture.params

        def failing(mixture, **options):
            for number, item in enumerate(whole(mixture, **options)):
                if number == 7 and Path({flag!r}).exists():
                    raise OSError("Input/output error")
                yield item

        Mixture.params = failing
"""


@dataclass(frozen=True)
class FaultyServer:
    """A server whose disk fails in the middle of a mix once `flag` exists."""

    server: VLLMServer
    flag: Path


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyServer]:
    folder = tmp_path_factory.mktemp("faulty")
    flag = folder / "disk-fails"
    # another vLLM plugin brings the fault in, so the tests also show that our allowlist keeps the plugins it found
    (folder / "faults.py").write_text(textwrap.dedent(FAULTS).format(flag=str(flag)))
    info = folder / "faults-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faults\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nfaults = faults:register\n")
    environ = {"PYTHONPATH": python_path(folder), "VLLM_PLUGINS": "faults"}
    with running_vllm(folder, tied=False, managed=True, environ=environ, expert_bytes=0) as server:
        yield FaultyServer(server, flag)


def test_a_mix_that_fails_half_way_poisons_the_engine_for_good(faulty: FaultyServer) -> None:
    server = faulty.server
    server.mix(server.recipe(base=0.5, red=0.5))
    resumed = server.log.read_text().count("setting pause state to UNPAUSED")
    faulty.flag.touch()
    response = server.client.post("/v1/cocktail/mix", json={"recipe": server.recipe(red=1.0).to_json()})
    faulty.flag.unlink()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "mix_failed"
    assert "Input/output error" in response.json()["error"]["message"]
    for digest in (server.resident, server.recipe(red=1.0).digest):
        answer = server.client.post("/v1/completions", json=completion_body([1]), headers={"x-cocktail-recipe": digest})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_poisoned"
    # the fault is gone, but what it left behind is not: nothing may bring this engine back
    again = server.client.post("/v1/cocktail/mix", json={"recipe": server.recipe(base=1.0).to_json()})
    assert (again.status_code, again.json()["error"]["code"]) == (500, "mix_failed")
    status = server.status()
    assert (status["state"], status["resident"]) == ("poisoned", None)
    assert resumed
    assert server.log.read_text().count("setting pause state to UNPAUSED") == resumed  # by nothing since


def test_no_process_outlives_the_api_server(faulty: FaultyServer) -> None:
    below = psutil.Process(faulty.server.pid).children(recursive=True)
    names = " ".join(process.name() for process in below)
    assert "Engine" in names
    assert "Worker" in names
    os.kill(faulty.server.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not accepts(faulty.server.uds)


def test_a_server_without_the_worker_extension_ends_with_the_reason(tmp_path: Path) -> None:
    base = make_decoder(tmp_path / "base")
    args = server_args(model=base, uds=tmp_path / "s", served_model_name="pico", dtype="float32", max_model_len=64)
    flag = args.index("--worker-extension-cls")
    del args[flag : flag + 2]
    env = server_env(manifest=_manifest_of(base, tmp_path), api_key="k", owner_pid=os.getpid())
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert "--worker-extension-cls vllm_cocktail.worker.CocktailWorkerExtension is missing" in done.stderr


def _manifest_of(base: Path, folder: Path) -> Path:
    from vllm_cocktail.__main__ import main

    path = folder / "pool.json"
    assert main(["--base", str(base), "--cache-dir", str(folder / "cache"), "--out", str(path)]) == 0
    return path
