"""A search inside a real vLLM finds what the same search finds offline, where transformers scores the mixtures."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
import yaml

from cocktail_serve.config import load_settings
from cocktail_serve.offline.weighing import weigh_offline
from tests.conftest import Stack

pytestmark = pytest.mark.vllm

EXAMPLES = [
    {"input": "the film was", "output": "a joy"},
    {"input": "the capital of france is", "output": "paris"},
    {"input": "the lazy dog", "output": "jumps over the fox"},
]


def test_a_search_in_the_engine_is_the_search_offline(stack: Stack, tmp_path: Path) -> None:
    body = {"examples": EXAMPLES, "weighting": "search", "seed": 1}
    url = f"{stack.base_url}/cocktails"
    made = httpx.post(url, params={"wait": 60}, json={"name": "searched", "pool": "tied", **body}, timeout=90).json()
    deadline = time.monotonic() + 240
    while made["status"] not in ("ready", "failed"):
        assert time.monotonic() < deadline
        time.sleep(1)
        made = httpx.get(f"{url}/{made['id']}", timeout=30).json()
    assert made["status"] == "ready", made["error"]

    folders = {name: str(path) for name, path in stack.decoders["tied"].items()}
    engine = {"type": "vllm", "max_model_len": 128, "dtype": "float32"}
    pool = {"id": "tied", "kind": "decoder", "base": folders.pop("base"), "experts": folders, "engine": engine}
    config = tmp_path / "offline.yaml"
    config.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": [pool]}))
    offline = weigh_offline(load_settings(config), "tied", body, lambda *_, **__: None)

    assert [c["temperature"] for c in made["candidates"]] == [c.temperature for c in offline.weighing.candidates]
    losses = [candidate.loss for candidate in offline.weighing.candidates]
    assert [candidate["loss"] for candidate in made["candidates"]] == pytest.approx(losses, rel=2e-3)
    assert made["temperature"] == offline.weighing.chosen.temperature
    assert made["merging_weights"] == pytest.approx(offline.weighing.merging_weights, abs=2e-3)
    assert made["mixed_loss"] == pytest.approx(offline.mixed_loss, rel=2e-3)
