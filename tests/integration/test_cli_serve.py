"""`serve` as a process: it says where it listens, answers, and ends when told to."""

import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
import yaml

from cocktail_serve.config import load_settings
from cocktail_serve.database.database import Database
from cocktail_serve.gateway.run_dir import own_run_dir
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


@pytest.fixture
def registry(config):
    """The place of the configuration's registry, empty before and after."""
    path = config.parent / "cache" / "registry.sqlite"

    def clear():
        for each in path.parent.glob("registry.sqlite*"):
            each.unlink()

    clear()
    yield path
    clear()


def make_registry(path, *statements: str) -> None:
    async def make() -> None:
        database = Database(f"sqlite:///{path}")
        await database.open()
        await database.close()

    path.parent.mkdir(exist_ok=True)
    asyncio.run(make())
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def refused(config) -> str:
    """The one line of a start that fails before a model is read."""
    with start(config, "--port", "0") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, ""), err
    (line,) = err.splitlines()
    return line


def test_a_registry_of_a_later_release_is_told_before_a_model_is_read(config, registry):
    make_registry(registry, "UPDATE alembic_version SET version_num = '9999'")
    assert "of revision '9999', which this release does not know" in refused(config)


@pytest.mark.parametrize("place", ["header", "middle"])
def test_a_damaged_registry_is_told_before_a_model_is_read(config, registry, place):
    make_registry(registry)
    content = bytearray(registry.read_bytes())
    start = 0 if place == "header" else len(content) // 2 // 4096 * 4096
    content[start : start + 4096] = b"\xff" * 4096
    registry.write_bytes(content)
    told = refused(config)
    assert told.startswith(f"error: the registry {registry} is damaged (")
    assert "put a copy in its place" in told
    page = re.search(r"\((docs/\S+\.md) says how\)", told)[1]
    assert "\n## Restore\n" in (Path(__file__).parents[2] / page).read_text()
    assert registry.read_bytes() == content


def test_a_registry_in_use_is_told_before_a_model_is_read(config, registry):
    make_registry(registry, "UPDATE alembic_version SET version_num = '0010'")
    with Path(f"{registry}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as a server of the earlier release does
        assert "while servers work with it; stop them first" in refused(config)
    with ExitStack() as stack:
        own_run_dir(load_settings(config), stack)
        assert "another server keeps its engines' files in" in refused(config)


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
