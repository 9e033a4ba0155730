"""Which pages are walked in which order, with what a reader has beforehand; and what is not typed, and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.docs.pages import ROOT, blocks
from tests.docs.shell import Shell

ADMIN_KEY = "the-operators-own"


@dataclass(frozen=True, kw_only=True)
class Journey:
    """Pages that one reader walks, one after the other.

    Attributes:
        pages: files, relative to the checkout.
        prepare: makes what the reader has: models, rows, a configuration.
        first: commands that are typed before, which no page has to say.
        changes: what stands for a reader's own names, digests and keys.
        before: what else is typed before the command that holds a text.
        prints: of the command that holds a text, what is in its output.
        not_run: commands that hold a text, and why they are not typed.
        last: commands at the end, and what they print.
    """

    pages: tuple[str, ...]
    prepare: Callable[[Shell], None]
    first: tuple[str, ...] = ()
    changes: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    prints: Mapping[str, str] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)
    last: Mapping[str, str] = field(default_factory=dict)


NOT_WALKED: Mapping[str, str] = {
    "docs/how-to/deploy.md": "installs into the reader's machine; tests/integration/test_monitoring.py checks what it "
    "names",
    "docs/how-to/container.md": "tests/container builds and runs the image, without Docker",
    "docs/how-to/gpu.md": "needs a GPU",
    "docs/how-to/litellm.md": "tests/integration/test_litellm.py runs it, in an environment of its own",
    "docs/how-to/langchain-llamaindex.md": "tests/e2e/test_clients.py makes its calls",
    "examples/smollm2/README.md": "the demo makes the base of it; its experts are trained for minutes, from rows that "
    "are made elsewhere",
}
"""Pages of which nothing is typed."""

CHECKOUT = "installs into the reader's environment"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def yaml_of(page: str, number: int = 0) -> Any:
    """A configuration that a page shows."""
    return yaml.safe_load([block.text for block in blocks(page) if block.language == "yaml"][number])


def write_config(shell: Shell, name: str, config: Any) -> None:
    (shell.folder / name).write_text(yaml.safe_dump(config, sort_keys=False))


REFUND_ROWS = [
    {"input": "Customer: I sent it back two weeks ago. Agent:", "output": "Thank you, I see the parcel arrived."},
    {"input": "Customer: where is my refund? Agent:", "output": "It was paid out on Monday."},
    {"input": "Customer: the bill is wrong. Agent:", "output": "I am sorry, I will correct it."},
]


def make_decoders(folder: Path, base: str, *experts: str) -> None:
    """Llamas of one initialisation, with the context length that the pages ask for."""
    from tests.models import make_decoder

    for number, name in enumerate((base, *experts)):
        make_decoder(folder / name, perturbation_seed=number or None, max_position=4096)


def prepare_support(shell: Shell) -> None:
    """The pool of the README, of which its own configuration is written."""
    make_decoders(shell.folder / "models", "llama-base", "llama-billing", "llama-returns")
    write_rows(shell.folder / "task.jsonl", REFUND_ROWS)
    write_config(shell, "cocktail.yaml", yaml_of("README.md"))


def prepare_guarded(shell: Shell) -> None:
    """A pool `flan` of full models behind the tests' own engine, for pages about what the gateway does."""
    folder = shell.folder
    make_decoders(folder / "models", "base", "ag-news", "nq", "support-2026")
    (folder / "models" / "finetuned").mkdir()
    (folder / "models" / "support-2026").rename(folder / "models" / "finetuned" / "support-2026")
    write_rows(folder / "examples.jsonl", REFUND_ROWS)
    config = yaml_of("docs/how-to/keys.md")
    config["server"]["expert_roots"] = ["models/finetuned"]
    write_config(shell, "config.yaml", config | {"pools": [flan_pool()]})


def prepare_open(shell: Shell) -> None:
    """The same where nobody needs a key."""
    prepare_guarded(shell)
    write_config(shell, "config.yaml", {"pools": [flan_pool()]})


def flan_pool() -> dict[str, Any]:
    return {
        "id": "flan",
        "kind": "decoder",
        "base": "models/base",
        "experts": {"ag-news": "models/ag-news", "nq": "models/nq"},
        "engine": {"type": "fake", "max_model_len": 1024, "dtype": "float32", "replicas": 2},
    }


def prepare_own_pool(shell: Shell) -> None:
    from tests.models import make_encoder

    page = "docs/how-to/own-pool.md"
    make_decoders(shell.folder / "models", "llama-base", "llama-billing", "llama-returns")
    for number, name in enumerate(("bge-base", "bge-faq", "bge-code")):
        make_encoder(shell.folder / "models" / name, perturbation_seed=number or None)
    config = yaml_of(page)
    config["pools"][0]["experts"]["returns"] = "models/llama-returns"  # of the hub
    write_config(shell, "cocktail.yaml", config)
    Path(shell.environment["HOME"], ".cache", "huggingface", "hub").mkdir(parents=True)


def prepare_training(shell: Shell) -> None:
    make_decoders(shell.folder / "models", "llama-base")
    for name in ("billing", "returns"):
        write_rows(shell.folder / f"{name}.jsonl", REFUND_ROWS * 4)


def prepare_evaluation(shell: Shell) -> None:
    make_decoders(shell.folder / "models", "base", "ag_news", "nq")
    choices = ["World", "Sports", "Business"]
    tasks = {
        "ag_news": [{"input": f"story {i}:", "output": choices[i % 3], "choices": choices} for i in range(9)],
        "nq_open": [{"input": f"question {i}?", "output": "a dog"} for i in range(6)],
    }
    for name, rows in tasks.items():
        write_rows(shell.folder / "data" / name / "test.jsonl", rows)
        write_rows(
            shell.folder / "data" / name / "train.jsonl", [{k: row[k] for k in ("input", "output")} for row in rows]
        )
    experts = {"ag_news": "models/ag_news", "nq": "models/nq"}
    engine = {"type": "vllm", "dtype": "float32"}
    pool = {"id": "small", "kind": "decoder", "base": "models/base", "experts": experts, "engine": engine}
    write_config(shell, "config.yaml", {"pools": [pool]})


def prepare_reranker(shell: Shell) -> None:
    from tests.models import make_encoder_decoder, make_reranker

    page, models = "docs/how-to/reranker.md", shell.folder / "models"
    for number, name in enumerate(("ranker-base", "ranker-support", "ranker-legal")):
        make_reranker(models / name, perturbation_seed=number or None)
    for number, name in enumerate(("t5-base", "t5-news", "t5-support")):
        make_encoder_decoder(models / name, perturbation_seed=number or None)
    ranker, t5 = yaml_of(page, 0), yaml_of(page, 1)
    ranker["pools"][0]["base"], t5["pools"][0]["base"] = "models/ranker-base", "models/t5-base"  # of the hub
    write_config(shell, "ranker.yaml", ranker)
    write_config(shell, "t5.yaml", t5)
    write_rows(shell.folder / "task.jsonl", REFUND_ROWS)


def prepare_plain_vllm(shell: Shell) -> None:
    make_decoders(shell.folder / "models", "base", "ag-news", "nq")


_FUNCTIONS = r"""
id_of() { cocktail-serve show "$1" --json | python -c 'import json, sys; print(json.load(sys.stdin)["id"])'; }
start_printed() {
  echo "export VLLM_API_KEY=$KEY" > start.sh
  sed -n '/^VLLM_COCKTAIL_MANIFEST/,$p' printed.txt | sed "1 s/^/exec env /; \$ s/\$/ --port $WALK_PORT/" >> start.sh
  bash start.sh > "$WALK/server.log" 2>&1 &
  echo $! > "$WALK/server.pid"
  for _ in $(seq 600); do
    curl -s localhost:8000/health > /dev/null 2>&1 && return
    sleep 0.5
  done
  tail -40 "$WALK/server.log"
  return 1
}
key_id() { cocktail-serve keys list --config config.yaml --tenant acme --json \
  | python -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])'; }
"""

_KEY = (
    "export KEY=$(cocktail-serve keys create --config config.yaml --tenant acme --json "
    "| python -c 'import json, sys; print(json.load(sys.stdin)[\"key\"])')"
)

JOURNEYS: Mapping[str, Journey] = {
    "demo": Journey(
        pages=(
            "docs/tutorials/first-cocktail.md",
            "docs/how-to/fine-tuning.md",
            "docs/how-to/decisions.md",
            "docs/how-to/from-openai-fine-tuning.md",
            "examples/demo_pool/README.md",
            "README.md",
            "docs/how-to/extract-adapters.md",
        ),
        prepare=prepare_support,
        changes={
            "capitals-and-languages@<digest of the first>": "'\"$(id_of capitals-and-languages)\"'",
        },
        before={
            "cocktail-serve mix cocktail.yaml": "rm -r mixed",  # of the tutorial
            "cocktail-serve doctor support-adapters": "stop-server",  # of the README: it keeps the same folder
        },
        prints={
            'print(chunk.choices[0].delta.content or "", end="")': "Rabat, Arabic",
            "print(answer.choices[0].message.content)  # Stockholm, Swedish": "Stockholm, Swedish",
            'print(answer.model, "says"': "says Stockholm, Swedish",
            "| grep '\"id\"'": "travel-desk@",
            "localhost:8000/v1/decisions": '"choice":"Stockholm"',
            "import-openai": "2 examples, 0 rows refused",
        },
        not_run={
            "make demo ": "tests/e2e/test_demo.py runs it, and `make serve` here",
            "messages=[...], extra_body": "not a whole program",
            "client.decisions.create": "the client installed has none; tests/e2e/test_clients.py asks by a newer one",
            "pip install": CHECKOUT,
            "docker build": "needs docker",
            "make wheel": "tests/e2e/test_wheel.py installs what it builds",
            "make test": "these are the tests",
            "make check": "the tests of these tests",
            "make_decoder_pool.py": "makes anew what is committed, in minutes",
            "make_encoder_adapters.py": "makes anew what is committed, in minutes",
            "make_encoder_pool.py": "the demo does",
        },
    ),
    "gateway": Journey(
        pages=(
            "docs/how-to/keys.md",
            "docs/how-to/limits.md",
            "docs/how-to/operate.md",
            "docs/how-to/replicas.md",
            "docs/how-to/command-line.md",
        ),
        prepare=prepare_guarded,
        changes={
            "keys rotate 4f1c09a2b7de": "keys rotate $(key_id)",
            "keys revoke 4f1c09a2b7de": "keys revoke $(key_id)",
            "ck-4f1c09a2b7de-...": "$KEY",
            "bank-intents@1a2b3c4d": "$(id_of bank-intents)",
            "http://other:8000": "http://127.0.0.1:8000",
        },
        before={
            "cocktail-serve limits set": _KEY,
            '{"pin": "bank-intents"': (
                "cocktail-serve create bank-intents --pool flan --examples examples.jsonl --key $KEY --server $SERVER"
            ),
            # operate.md drains all
            "cocktail-serve restart flan": (
                'curl -H "$AUTH" -H "$JSON" localhost:8000/admin/engines/flan -d \'{"drain": false}\''
            ),
            "cocktail-serve list --models": (
                'curl -H "$AUTH" -H "$JSON" localhost:8000/admin/engines/flan -d \'{"pin": null, "drain": false}\' && '
                # `mix` knows the experts of the configuration
                'curl -X DELETE -H "$AUTH" "localhost:8000/admin/pools/flan/experts/support-2026?force=true"'
            ),
            # an older version, so that the name is still there
            "cocktail-serve delete bank-intents@": (
                "cocktail-serve create bank-intents --pool flan --examples examples.jsonl --temperature 3"
            ),
        },
        prints={"cocktail-serve usage --config": "day,tenant,model"},
    ),
    "backup": Journey(
        pages=("docs/how-to/backup-and-upgrade.md",),
        prepare=prepare_open,
        first=(
            "cocktail-serve serve config.yaml",
            "cocktail-serve create kept --pool flan --examples examples.jsonl --server $SERVER",
        ),
        before={"export REGISTRY=": "stop-server"},
        not_run={
            "pg_dump": "needs a PostgreSQL server; the command is what `backup` prints",
            "createdb": "needs a PostgreSQL server",
            "pg_restore": "needs a PostgreSQL server",
        },
        last={
            "cocktail-serve serve config.yaml": "ready",
            "cocktail-serve list --server $SERVER": "kept@",
        },
    ),
    "own pool": Journey(
        pages=("docs/how-to/own-pool.md",),
        prepare=prepare_own_pool,
        changes={"models/expert-a": "models/llama-billing", "models/base": "models/llama-base"},
    ),
    "training": Journey(
        pages=("docs/how-to/train-experts.md",), prepare=prepare_training, not_run={"pip install": CHECKOUT}
    ),
    "evaluation": Journey(
        pages=("docs/how-to/evaluate.md",),
        prepare=prepare_evaluation,
        not_run={
            "pip install": CHECKOUT,
            "lm_eval --model": "tests/e2e/test_harnesses.py runs it, in an environment of its own",
            "import mteb": "tests/e2e/test_harnesses.py runs it, in an environment of its own",
        },
    ),
    "reranker": Journey(
        pages=("docs/how-to/reranker.md",),
        prepare=prepare_reranker,
        first=("cocktail-serve serve ranker.yaml",),
    ),
    "plain vLLM": Journey(
        pages=("docs/how-to/plain-vllm.md",),
        prepare=prepare_plain_vllm,
        first=("export KEY=secret",),
        changes={
            "--out pool.json": "--out pool.json | tee printed.txt",
            # the CPU's line is another, which the page says: the one that was printed is typed
            "VLLM_API_KEY=$KEY VLLM_COCKTAIL_MANIFEST=pool.json VLLM_PLUGINS=... vllm serve models/base "
            "--dtype bfloat16 \\\n    --worker-extension-cls vllm_cocktail.worker.CocktailWorkerExtension": (
                "start_printed"
            ),
        },
        prints={"localhost:8000/v1/cocktail/mix": '"source":"files"'},
        not_run={
            "pip install": CHECKOUT,
            "make install": CHECKOUT,
        },
    ),
}

__all__ = ["JOURNEYS", "NOT_WALKED", "ROOT", "Journey"]
