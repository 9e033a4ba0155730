"""lm-evaluation-harness and mteb against the served endpoint, by the snippets of docs/how-to/evaluate.md.

They need an environment of their own: `COCKTAIL_HARNESS_PYTHON` names its Python (lm-eval[api], mteb and openai there).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from cocktail_serve.config import load_settings
from cocktail_serve.evaluation.backend import EnsemblePart
from cocktail_serve.evaluation.runs import Evaluation, open_evaluation
from cocktail_serve.evaluation.systems import Contender
from cocktail_serve.evaluation.tasks import load_task
from cocktail_serve.recipe import one_hot
from tests.conftest import Stack
from tests.e2e.test_evaluation import DECODER, ENCODER, make_config, make_tasks

PYTHON = os.environ.get("COCKTAIL_HARNESS_PYTHON")
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "evaluate.md"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.full,
    pytest.mark.skipif(PYTHON is None, reason="COCKTAIL_HARNESS_PYTHON names no environment with lm-eval and mteb"),
]


def snippet(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return found[-1]


def harness(*words: str, folder: Path) -> str:
    assert PYTHON is not None
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "OPENAI_API_KEY": "x",
    }
    environ.pop("PYTHONPATH", None)
    command = [PYTHON, *words]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_lm_evaluation_harness_finds_what_we_find(stack: Stack, tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path)
    (tmp_path / "own.yaml").write_text(snippet("yaml"))
    (tmp_path / "test.jsonl").write_text((tasks / DECODER / "test.jsonl").read_text())
    words = "-m lm_eval --model local-completions --tasks own --include_path . --output_path out --model_args".split()
    model = f"model=tied/north,base_url={stack.base_url}/completions,tokenizer={stack.decoders['tied']['base']}"
    harness(*words, f"{model},add_bos_token=True,num_concurrent=4", folder=tmp_path)
    told = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]["own"]["acc,none"]

    task = load_task(tasks / DECODER, "decoder")
    with open_evaluation(load_settings(make_config(stack, tmp_path)), "tied") as evaluation:
        cell = evaluation.measure("north", _single(evaluation, "north"), task)
    assert told == pytest.approx(cell.mean("accuracy"))


def test_mteb_finds_what_we_find(stack: Stack, tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path)
    (tmp_path / "own.py").write_text(snippet("python"))
    said = harness("own.py", stack.base_url, "mini/faq", str(tasks / ENCODER), folder=tmp_path)
    told = json.loads(said.strip().splitlines()[-1])
    task = load_task(tasks / ENCODER, "encoder")
    with open_evaluation(load_settings(make_config(stack, tmp_path)), "mini") as evaluation:
        cell = evaluation.measure("faq", _single(evaluation, "faq"), task)
    assert told["ndcg@10"] == pytest.approx(cell.mean("ndcg@10"), abs=1e-4)


def _single(evaluation: Evaluation, name: str) -> Contender:
    return Contender((EnsemblePart(one_hot(evaluation.pool, name, dtype=evaluation.backend.dtype), 1.0),))


def test_the_snippets_are_whole() -> None:
    assert yaml.safe_load(snippet("yaml"))["output_type"] == "multiple_choice"
    compile(snippet("python"), "own.py", "exec")
