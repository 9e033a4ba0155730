"""The worker extension on a Worker that only notes what it is given: no vLLM."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe
from tests.plugin import make_plugin_pool, recipe_of
from vllm_cocktail.manifest import MANIFEST_VARIABLE, Manifest
from vllm_cocktail.worker import CocktailWorkerExtension


class Embedding(nn.Module):
    """Stands for vLLM's `VocabParallelEmbedding`; counts how often it was packed."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.num_packed = 0
        self.quant_method = SimpleNamespace(process_weights_after_loading=self.pack)

    def pack(self, layer: Embedding) -> None:
        assert layer is self
        self.num_packed += 1


class Head(Embedding):
    """Stands for vLLM's `ParallelLMHead`."""


class Model(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = Embedding(nn.Parameter(torch.zeros(2)))
        self.head = Head(self.embed.weight if tied else nn.Parameter(torch.zeros(2)))


class Worker(CocktailWorkerExtension):
    """vLLM's Worker as the extension sees it; `fault` says what its reload does wrong."""

    def __init__(self, base: Path, *, tied: bool = True) -> None:
        model_config = SimpleNamespace(model=str(base), dtype=torch.float32, quantization=None)
        parallel_config = SimpleNamespace(world_size=1)
        self.vllm_config = SimpleNamespace(model_config=model_config, parallel_config=parallel_config, lora_config=None)
        self.model = Model(tied=tied)
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)
        self.live: dict[str, Tensor] = {}
        self.fault = ""

    def reload_weights(  # type: ignore[override]  # an attribute there
        self, weights_iterator: Iterable[tuple[str, Tensor]], weights_path: None, is_checkpoint_format: bool
    ) -> None:
        assert (weights_path, is_checkpoint_format) == (None, True)
        assert self.cocktail_resident is None, "while parameters change, nothing is resident"
        for number, (name, tensor) in enumerate(weights_iterator):
            self.live[name] = tensor.clone()
            if self.fault == "stops" and number == 3:
                return  # vLLM only logs what did not come
            if self.fault == "raises" and number == 3:
                raise RuntimeError("out of memory")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return make_plugin_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def worker(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    manifest = Manifest.of_pool(pool, dtype="float32", cache_bytes=0, managed=True).write(tmp_path / "pool.json")
    monkeypatch.setenv(MANIFEST_VARIABLE, str(manifest))
    layers = ModuleType("vocab_parallel_embedding")
    layers.__dict__.update(ParallelLMHead=Head, VocabParallelEmbedding=Embedding)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.vocab_parallel_embedding", layers)
    config = ModuleType("config")
    config.__dict__.update(set_current_vllm_config=nullcontext)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    return Worker(pool.base.path)


def text_of(recipe: Recipe) -> str:
    return json.dumps(recipe.to_json())


def test_every_name_is_its_own() -> None:
    names = {name for name in vars(CocktailWorkerExtension) if not name.startswith("__")}
    assert names
    assert [name for name in names if not name.removeprefix("_").startswith("cocktail_")] == []


@pytest.mark.parametrize(("world_size", "on_cpu"), [(1, True), (2, True), (1, False)])
def test_a_worker_alone_mixes_on_all_cores_of_the_server(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, world_size: int, on_cpu: bool
) -> None:
    """The process that starts it has them; on a CPU it is tied to its own from the first instruction on."""
    allowed: list[set[int]] = []
    monkeypatch.setattr("vllm_cocktail.worker.allow_cores", allowed.append)
    monkeypatch.setattr(os, "sched_getaffinity", {os.getppid(): {0, 1, 2, 3}}.get)
    monkeypatch.setattr("vllm_cocktail.worker.is_cpu_build", lambda: on_cpu)
    worker.vllm_config.parallel_config.world_size = world_size
    assert worker.cocktail_prepare()["ok"]
    assert allowed == ([{0, 1, 2, 3}] if world_size == 1 and on_cpu else [])


def test_a_mix_replaces_every_parameter_and_says_so(worker: Worker, pool: Pool) -> None:
    worker.cocktail_prepare()
    probed = worker.cocktail_probe()
    assert (probed["ok"], probed["digest"]) == (True, recipe_of(pool, base=1.0).digest)
    recipe = recipe_of(pool, base=0.3, red=0.7)
    reply = worker.cocktail_mix(text_of(recipe))
    kept = worker.cocktail_probe()["cached"]
    said = {"ok": True, "error": None, "digest": recipe.digest, "source": "files", "cached": kept}
    assert json.loads(json.dumps(reply)) == said
    expected = dict(iter_mixture(recipe, pool.by_fingerprint))
    assert worker.live.keys() == expected.keys()
    assert all(torch.equal(worker.live[name], tensor) for name, tensor in expected.items())
    assert worker.cocktail_probe()["digest"] == recipe.digest


@pytest.mark.parametrize(("tied", "num_packed"), [(True, 1), (False, 0)])
def test_a_tied_head_is_packed_anew(worker: Worker, pool: Pool, tied: bool, num_packed: int) -> None:
    worker.model = Model(tied=tied)
    worker.cocktail_prepare()
    assert worker.cocktail_mix(text_of(recipe_of(pool, red=1.0)))["ok"]
    # a head of its own parameters is packed by the reload, as an embedding is
    assert (worker.model.head.num_packed, worker.model.embed.num_packed) == (num_packed, 0)


@pytest.mark.parametrize(("fault", "message"), [("stops", "the reload took 3 of"), ("raises", "out of memory")])
def test_half_a_mix_leaves_nothing_resident(worker: Worker, pool: Pool, fault: str, message: str) -> None:
    worker.cocktail_prepare()
    worker.fault = fault
    reply = worker.cocktail_mix(text_of(recipe_of(pool, red=1.0)))
    assert not reply["ok"]
    assert message in reply["error"]
    assert worker.cocktail_probe()["digest"] is None


@pytest.mark.parametrize("recipe", ["{", "[]", "{}", "null", '{"version": 99}'])
def test_nothing_is_raised_and_a_bad_recipe_changes_nothing(worker: Worker, pool: Pool, recipe: str) -> None:
    assert "was not prepared" in worker.cocktail_check(text_of(recipe_of(pool, red=1.0)))["error"]
    worker.cocktail_prepare()
    before = worker.cocktail_resident
    reply = worker.cocktail_check(recipe)
    assert not reply["ok"]
    assert reply["error"]
    assert worker.cocktail_resident == before
    assert worker.live == {}


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("model_config", {"model": "/somewhere/else"}, "start it on the base"),
        ("model_config", {"dtype": torch.bfloat16}, "--dtype"),
        ("model_config", {"quantization": "fp8"}, "unquantised"),
        (None, {"lora_config": object()}, "--enable-lora"),
    ],
)
def test_an_engine_that_cannot_be_mixed_is_refused(
    worker: Worker, part: str | None, changes: dict[str, Any], message: str
) -> None:
    target = worker.vllm_config if part is None else getattr(worker.vllm_config, part)
    vars(target).update(changes)
    reply = worker.cocktail_prepare()
    assert not reply["ok"]
    assert message in reply["error"]
    assert worker.cocktail_mixer is None


@pytest.mark.parametrize("name", ["base", "red"])
def test_files_that_changed_are_told_by_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: Worker, name: str
) -> None:
    """Of the base at the start, after vLLM's loader has read it; of others when they are needed."""
    pool = make_plugin_pool(tmp_path / "own")
    manifest = Manifest.of_pool(pool, dtype="float32", cache_bytes=0, managed=True).write(tmp_path / "own.json")
    monkeypatch.setenv(MANIFEST_VARIABLE, str(manifest))
    worker.vllm_config.model_config.model = str(pool.base.path)
    (pool.member(name).path / "model.safetensors").write_bytes(
        (pool.member("green").path / "model.safetensors").read_bytes()
    )
    prepared = worker.cocktail_prepare()
    if name == "base":
        assert (prepared["ok"], prepared["code"]) == (False, "model_changed")
        assert "'base' are not what they were" in prepared["error"]
        return
    assert prepared["ok"]
    checked = worker.cocktail_check(text_of(recipe_of(pool, red=1.0)))
    assert (checked["ok"], checked["code"]) == (False, "model_changed")
    assert worker.cocktail_check(text_of(recipe_of(pool, green=1.0)))["ok"]
    assert worker.cocktail_probe()["digest"] == recipe_of(pool, base=1.0).digest
