"""Adapters beside a quantised base in real vLLM: its weights as they are stored, every row by its own coefficients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from bench.server import running_server
from cocktail_serve.dtypes import DType
from cocktail_serve.examples import parse_examples
from cocktail_serve.scoring.decoder import score_with_transformers, tokenize_examples
from tests.adapters import train_adapter
from tests.e2e.conftest import VLLMServer, running_vllm
from tests.e2e.reference import assert_greedy_of
from tests.e2e.test_vllm_unmerged import PROMPTS, post_all, request_of
from tests.e2e.test_vllm_unmerged_gateway import ROWS, completion
from tests.models import make_decoder, pool_section
from tests.quantised import dequantised, is_quantised, quantise
from vllm_cocktail.replies import SCORE_PATH

pytestmark = pytest.mark.vllm

MIXTURES: list[dict[str, float]] = [
    {"base": 1.0},
    {"red": 1.0},
    {"green": 1.0},
    {"base": 0.5, "red": 0.5},
    {"base": 0.3, "red": 0.3, "green": 0.4},
    {"base": 1.5, "green": -0.5},
]


@dataclass(frozen=True)
class Case:
    """A format, as it is run.

    Attributes:
        tolerance: of a token's log-probability: the reference computes in float64, these kernels in the engine's dtype,
            and what lies between two integers for one is rounded otherwise by the other.
        loss_tolerance: of a mean over tokens.
    """

    quantisation: str
    dtype: DType
    tolerance: float
    loss_tolerance: float


HAS_AMX = "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
"""There vLLM multiplies int8 by another kernel, whose engine starts in bfloat16 alone."""

CASES = [
    pytest.param(Case("w8a8", "bfloat16", 3e-1, 6e-2) if HAS_AMX else Case("w8a8", "float32", 1e-2, 1e-3), id="w8a8"),
    pytest.param(Case("w4a16", "float16", 5e-2, 5e-3), id="w4a16", marks=pytest.mark.full),
    pytest.param(Case("gptq", "float16", 5e-2, 5e-3), id="gptq", marks=pytest.mark.full),
    pytest.param(Case("awq", "float16", 5e-2, 5e-3), id="awq", marks=pytest.mark.full),
]


@dataclass(frozen=True)
class QuantisedPool:
    """A quantised base and its adapters, and what these change.

    Attributes:
        full: the base before it was quantised.
        folders: of the members, base first.
        deltas: what peft adds to each parameter, by expert.
    """

    case: Case
    full: Path
    folders: Mapping[str, Path]
    deltas: Mapping[str, Mapping[str, Tensor]]

    def reference(self, weights: Mapping[str, float]) -> LlamaForCausalLM:
        """transformers in float64: dequantised weights, and what peft adds merged into them.

        Where the format rounds what comes into a layer, the sum is of two products, for an adapter's is not rounded.
        """
        model = LlamaForCausalLM.from_pretrained(self.full, dtype=torch.float64).eval()
        state = {name: tensor.double() for name, tensor in dequantised(self.full, self.case.quantisation).items()}
        changes = {
            name: sum((c * self.deltas[expert][name] for expert, c in weights.items() if expert != "base"), 0 * tensor)
            for name, tensor in state.items()
        }
        rounds = self.case.quantisation == "w8a8"
        apart = {name for name in state if rounds and is_quantised(name)}
        model.load_state_dict({n: tensor if n in apart else tensor + changes[n] for n, tensor in state.items()})
        for name in apart:
            layer = model.get_submodule(name.removesuffix(".weight"))
            parent = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
            setattr(parent, name.split(".")[-2], _RoundedInputs(layer, changes[name]))
        return model


class _RoundedInputs(nn.Module):
    """A linear layer whose inputs are rounded to int8, each token by its own scale, beside one that has them whole."""

    def __init__(self, layer: Any, change: Tensor) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, inputs: Tensor) -> Tensor:
        scale = inputs.abs().amax(-1, keepdim=True) / 127
        return self.layer((inputs / scale).round() * scale) + inputs @ self.change.T


def flatten_logits(folder: Path) -> None:
    """Makes a pico model's logits as small as a real one's, for rounding to tell no more than it does there."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] /= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True)
class Served:
    pool: QuantisedPool
    server: VLLMServer


def make_pool(folder: Path, case: Case) -> QuantisedPool:
    full = make_decoder(folder / "full")
    flatten_logits(full)
    adapters = {
        "red": train_adapter(full, folder / "red", seed=1),
        "green": train_adapter(
            full, folder / "green", seed=2, r=8, target_modules=["v_proj", "down_proj", "embed_tokens", "lm_head"]
        ),
    }
    before = LlamaForCausalLM.from_pretrained(full, dtype=torch.float32).state_dict()
    deltas = {}
    for name, trained in adapters.items():
        merged = trained.merged()
        deltas[name] = {parameter: merged[parameter].double() - before[parameter].double() for parameter in before}
    folders = {"base": quantise(full, folder / "base", case.quantisation), **{n: folder / n for n in adapters}}
    return QuantisedPool(case, full, folders, deltas)


@pytest.fixture(scope="module", params=CASES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("quantised")
    pool = make_pool(folder, request.param)
    how = {"folders": pool.folders, "mode": "unmerged", "dtype": pool.case.dtype}
    with running_vllm(folder, tied=False, managed=True, **how) as server:
        yield Served(pool, server)


def test_losses_are_those_of_dequantised_weights_with_each_rows_own_mixture(served: Served) -> None:
    examples = [{"token_ids": prompt, "output_start": 2} for prompt in PROMPTS]

    def request(weights: dict[str, float]) -> dict[str, Any]:
        recipe = served.server.recipe(**weights)
        xargs = {"cocktail_recipe": json.dumps(recipe.to_json())}
        headers = {"x-cocktail-recipe": recipe.digest}
        return {"url": SCORE_PATH, "json": {"examples": examples, "vllm_xargs": xargs}, "headers": headers}

    answers = post_all(served.server, [request(weights) for weights in MIXTURES])
    for weights, answer in zip(MIXTURES, answers, strict=True):
        assert answer.status_code == 200, answer.text
        model = served.pool.reference(weights)
        for prompt, loss in zip(PROMPTS, answer.json()["losses"], strict=True):
            tokens = torch.tensor([prompt])
            with torch.inference_mode():
                log_probs = model(tokens).logits[0, :-1].log_softmax(-1)
            wanted = float(-log_probs.gather(1, tokens[0, 1:, None])[1:].mean())
            assert loss == pytest.approx(wanted, abs=served.pool.case.loss_tolerance)


def test_answers_are_those_of_each_rows_own_mixture(served: Served) -> None:
    asked = [(weights, prompt) for weights in MIXTURES for prompt in PROMPTS]
    requests = [request_of(served.server, served.server.recipe(**weights), prompt) for weights, prompt in asked]
    models = {str(weights): served.pool.reference(weights) for weights in MIXTURES}
    answers = post_all(served.server, requests)
    for (weights, prompt), answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert_greedy_of(models[str(weights)], prompt, choice, tolerance=served.pool.case.tolerance)
    assert len({tuple(answer.json()["choices"][0]["token_ids"]) for answer in answers}) > len(PROMPTS)


@pytest.mark.full
@pytest.mark.parametrize("case", [param.values[0] for param in CASES], ids=lambda case: case.quantisation)
def test_a_gateway_makes_cocktails_of_it_and_answers_from_them(case: Case, tmp_path: Path) -> None:
    pool = make_pool(tmp_path, case)
    engine = {"type": "vllm", "dtype": case.dtype, "args": {"max-num-seqs": 16}}
    config = tmp_path / "config.yaml"
    settings = {
        "server": {"port": 0},
        "store": {"cache_dir": str(tmp_path / "cache")},
        "pools": [pool_section("pico", "decoder", pool.folders, engine)],
    }
    config.write_text(yaml.safe_dump(settings))
    tokenizer = AutoTokenizer.from_pretrained(pool.folders["base"])
    tokenized = tokenize_examples(tokenizer, parse_examples(ROWS, "decoder"), max_tokens=255)
    with (
        running_server(config, log=tmp_path / "server.log") as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        body = {"name": "films", "pool": "pico", "examples": ROWS, "temperature": 5.0}
        posted = http.post("/v1/cocktails?wait=60", json=body)
        assert posted.status_code == 201, posted.text
        made = posted.json()
        assert (made["status"], made["recipe"]["form"]) == ("ready", "unmerged")
        models: dict[str, dict[str, float]] = {
            "pico": {"base": 1.0},
            "pico/red": {"red": 1.0},
            "pico/green": {"green": 1.0},
            made["id"]: made["merging_weights"],
        }
        answers = {
            (name, number): http.post("/v1/completions", json=completion(name, prompt))
            for name in models
            for number, prompt in enumerate(PROMPTS)
        }
    losses = {name: ({name: 1.0}, loss) for name, loss in made["losses"].items()}
    losses["mixture"] = made["merging_weights"], made["mixed_loss"]
    for weights, loss in losses.values():
        of_examples = score_with_transformers(pool.reference(weights), tokenized)
        assert loss == pytest.approx(sum(of_examples) / len(of_examples), abs=case.loss_tolerance)
    references = {name: pool.reference(weights) for name, weights in models.items()}
    for (name, number), answer in answers.items():
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert_greedy_of(references[name], PROMPTS[number], choice, tolerance=case.tolerance)
