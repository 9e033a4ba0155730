"""A gateway of decoders leaves torch and transformers to others, and runs where they are not installed."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from bench.server import RunningServer, free_port, running_server
from tests.models import make_decoder_pool, pool_section

LIBRARIES = {"torch", "transformers", "sentence_transformers"}

ADMIN = "the-operators-own"

MAX_RESIDENT_BYTES = 150 * 2**20

EXAMPLES = [
    {"messages": [{"role": "user", "content": f"what is {word}"}, {"role": "assistant", "content": "paris"}]}
    for word in ("the capital", "of france")
]

WATCH = """\
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {libraries}:
            if {is_missing}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
            with open({file!r}, "a") as file:
                file.write(f"{{os.getpid()}} {{name}}\\n")

sys.meta_path.insert(0, Watch())

if {is_missing}:
    from importlib import metadata

    version = metadata.version

    def installed(name):
        if name.replace("-", "_") in {libraries}:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    metadata.version = installed
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return make_decoder_pool(tmp_path_factory.mktemp("decoders"))


class Watched:
    """Processes that tell when they import one of the libraries, or are told that it is not installed."""

    def __init__(self, folder: Path, *, is_missing: bool = False) -> None:
        self._file = folder / "imports"
        self._file.touch()
        code = WATCH.format(libraries=LIBRARIES, is_missing=is_missing, file=str(self._file))
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(code)
        self.env = {"PYTHONPATH": ":".join([str(folder / "site"), *sys.path[1:]]), "COCKTAIL_ADMIN_KEY": ADMIN}

    @property
    def imports(self) -> Mapping[int, set[str]]:
        """What each process imported, by its id."""
        found: defaultdict[int, set[str]] = defaultdict(set)
        for line in self._file.read_text().splitlines():
            pid, name = line.split()
            found[int(pid)].add(name)
        return found


def write_config(folder: Path, folders: Mapping[str, Path]) -> Path:
    section = pool_section("flan", "decoder", folders, {"type": "fake", "max_model_len": 256})
    path = folder / "config.yaml"
    server = {"port": free_port(), "expert_roots": [str(folder)]}
    path.write_text(yaml.safe_dump({"server": server, "store": {"cache_dir": "cache"}, "pools": [section]}))
    return path


@contextmanager
def served(config: Path, watched: Watched) -> Iterator[RunningServer]:
    with running_server(config, log=config.parent / "log", timeout_s=60, env=watched.env) as server:
        yield server


def ask(server: RunningServer, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "what is"}], "max_tokens": 3}
    content: str = server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    return content


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    """Though experts are compared by what their settings mean, one while it serves, and examples are tokenised."""
    other = tmp_path / "other"
    other.mkdir()
    for file in folders["nq"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")  # says the same
    settings = other / "config.json"
    settings.write_text(settings.read_text().replace("{", '{"trained_with": "a tool",', 1))
    config = write_config(tmp_path, {**folders, "other": other})
    watched = Watched(tmp_path)
    with served(config, watched) as server:
        gateway = psutil.Process(server.process.pid)
        assert gateway.memory_info().rss <= MAX_RESIDENT_BYTES
        created = server.post("/v1/cocktails?wait=60", {"name": "mine", "pool": "flan", "examples": EXAMPLES})
        assert created["status"] == "ready"
        assert set(created["losses"]) == {"base", "ag-news", "nq", "other"}
        assert ask(server, "mine")
        late = {"name": "late", "path": str(other)}
        added = server.http.post("/admin/pools/flan/experts", json=late, headers={"authorization": f"Bearer {ADMIN}"})
        assert added.status_code == 201, added.text
        assert ask(server, "flan/late")
        mapped = {Path(each.path).name for each in gateway.memory_maps()}
    assert server.process.pid not in watched.imports
    assert not any("torch" in name for name in mapped)
    assert any(name.startswith("tokenizers") for name in mapped), "mapped files are seen"
    helpers = Counter(name for names in watched.imports.values() for name in names)
    assert helpers["transformers"] == 3, "a process for the models, one for the tokenizer, one for the late expert"


def test_an_installation_without_them_serves_decoders(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    config = write_config(tmp_path, folders)
    watched = Watched(tmp_path, is_missing=True)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cocktail_serve.cli", *words]
        return subprocess.run(command, env=watched.env, capture_output=True, text=True, check=False, timeout=60)

    assert run("--help").returncode == 0
    diagnosis = run("doctor", str(config))
    assert diagnosis.returncode == 0, diagnosis.stdout + diagnosis.stderr
    assert "pip install 'cocktail-serve[encoders]'" in diagnosis.stdout
    with served(config, watched) as server:
        assert ask(server, "flan/nq")
        body = {"pool": "flan", "name": "a", "examples": EXAMPLES}
        refused = server.http.post("/v1/cocktails?wait=60", json=body)
        assert "transformers is not installed: pip install 'cocktail-serve[" in refused.text
        body = {"pool": "flan", "name": "b", "merging_weights": {"nq": 0.5, "base": 0.5}}
        made = server.post("/v1/cocktails?wait=60", body)
        assert made["status"] == "ready"
        assert ask(server, "b")


def test_without_them_what_needs_them_names_the_extra(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    config = write_config(tmp_path, folders)
    watched = Watched(tmp_path, is_missing=True)
    section = pool_section("bge", "encoder", {"base": folders["base"]}, {"type": "sentence_transformers"})
    encoders = tmp_path / "encoders.yaml"
    encoders.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": [section]}))
    weights = ("--pool", "flan", "--weights", "base=0.5,nq=0.5", "--method", "slerp", "--out", str(tmp_path / "out"))
    for words, said in (
        (("serve", str(encoders)), "pool 'bge': sentence-transformers is not installed: "),
        (("mix", str(config), *weights), "torch is not installed: "),
    ):
        command = [sys.executable, "-m", "cocktail_serve.cli", *words]
        ended = subprocess.run(command, env=watched.env, capture_output=True, text=True, check=False, timeout=60)
        assert ended.returncode == 2
        assert f"{said}pip install 'cocktail-serve[encoders]'" in ended.stderr
        assert "Traceback" not in ended.stderr
