"""`serve` as a process: it says where it listens, answers, and ends when told to."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import yaml

from tests.models import make_encoder_pool, pool_section


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    pool = make_encoder_pool(folder / "bge", ("quora",))
    path = folder / "config.yaml"
    section = pool_section("bge", "encoder", pool, {"type": "sentence_transformers"})
    path.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": [section]}))
    return path


def start(config, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cocktail_serve.cli", "serve", str(config), *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("COCKTAIL_")},
        text=True,
    )


def read_object(process) -> dict[str, object]:
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            return json.loads(text)
    pytest.fail(f"the server ended: {process.stderr.read()}")


def test_it_listens_answers_and_ends_on_an_interrupt(config):
    with start(config, "--port", "0", "--json") as process:
        try:
            announced = read_object(process)
            assert announced["pools"] == ["bge"]
            deadline = time.monotonic() + 60
            while httpx.get(f"{announced['url']}/ready").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert "leaked" not in process.stderr.read()
        finally:
            process.kill()


def test_it_says_when_it_is_ready_and_what_to_try(config):
    with start(config, "--port", "0") as process:
        try:
            told = ""
            for line in process.stderr:
                told += line
                if "cocktail-serve create" in line:
                    break
            process.send_signal(signal.SIGINT)
            process.stderr.read()
            assert process.wait(60) == 0
        finally:
            process.kill()
    url = re.search(r"listening on (\S+);", told)[1]
    assert re.search(rf"pool bge is ready after \d+\.\d s: {url}/v1", told)
    assert f"all pools are ready: {url}/v1" in told
    assert f"curl {url}/v1/embeddings" in told


def test_a_port_in_use_is_told_before_a_model_is_read(config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with start(config, "--port", str(port)) as process:
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert f"127.0.0.1:{port}: the port is in use" in err
    assert "reading" not in err
