"""Model card and mergekit configuration of recipes that need no parameters to be described."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cocktail_serve.cli.mergekit import mergekit_yaml
from cocktail_serve.cli.model_card import model_card, sources_of
from cocktail_serve.config import PoolConfig
from cocktail_serve.pool import Member, Pool
from cocktail_serve.recipe import make_recipe

CONFIG = PoolConfig.model_validate(
    {
        "id": "llama",
        "kind": "decoder",
        "base": "meta-llama/Llama-2-7b-chat-hf",
        "experts": {"nq": {"path": "Shitao/llama2-nq", "revision": "3f2a9c1"}, "mnli": "Shitao/llama2-mnli"},
        "engine": {"type": "vllm"},
    }
)
MEMBERS = {
    name: Member(name=name, path=Path("cache"), fingerprint=name[0] * 64, dtype="bfloat16", num_bytes=0)
    for name in ("base", "nq", "mnli")
}
POOL = Pool("llama", "decoder", MEMBERS["base"], {name: MEMBERS[name] for name in ("nq", "mnli")}, text_digest="t")
BY_HAND = {"losses": {}, "target": None, "entropy": None}


def card_of(weights: dict[str, float], weighing: dict[str, object], **options: object) -> str:
    recipe = make_recipe(POOL, weights, dtype="bfloat16", **options)
    return model_card(recipe, POOL, CONFIG, weighing, out=Path("mixed"), command=["cocktail-serve", "mix", "a b"])


def config_of(weights: dict[str, float], **options: object) -> dict[str, object]:
    recipe = make_recipe(POOL, weights, dtype="bfloat16", **options)
    written = yaml.safe_load(mergekit_yaml(recipe, POOL, sources_of(CONFIG)))
    assert (written.pop("dtype"), written.pop("out_dtype")) == ("float32", "bfloat16")
    return written


def test_hub_models_are_linked_where_they_take_part():
    text = card_of({"base": 0.25, "nq": 0.75}, BY_HAND)
    front_matter = yaml.safe_load(text.split("---")[1])
    assert front_matter["base_model"] == ["meta-llama/Llama-2-7b-chat-hf", "Shitao/llama2-nq"]
    assert front_matter["library_name"] == "transformers"
    assert "| nq | Shitao/llama2-nq@3f2a9c1 |  | 0.75 |" in text
    assert "given by hand" in text
    assert "cocktail-serve mix 'a b'" in text


def test_the_reasons_of_a_weighed_mixture():
    weighing = {
        "losses": {"base": 2.0, "nq": 1.0, "mnli": 3.0},
        "num_examples": 5,
        "weighting": "softmax",
        "temperature": 0.5,
        "target": None,
        "alpha": None,
        "entropy": 0.4242,
    }
    text = card_of({"base": 0.25, "nq": 0.75}, weighing)
    assert "measured on 5 examples" in text
    assert "`softmax`, temperature 0.5." in text
    assert "0.424 nats" in text
    assert "| mnli | Shitao/llama2-mnli | 3.0000 | 0.0 |" in text


def test_a_target_without_examples():
    text = card_of({"base": 0.5, "nq": 0.5}, BY_HAND | {"target": "nq", "alpha": 0.5})
    assert "the target `nq` is mixed with the base, alpha 0.5" in text


def test_an_adapter_for_mergekit(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    pool = replace(POOL, experts={"nq": replace(MEMBERS["nq"], path=tmp_path)})
    recipe = make_recipe(pool, {"nq": 1.0}, dtype="bfloat16")
    written = yaml.safe_load(mergekit_yaml(recipe, pool, sources_of(CONFIG)))
    base = "meta-llama/Llama-2-7b-chat-hf"
    assert [model["model"] for model in written["models"]] == [base, f"{base}+Shitao/llama2-nq@3f2a9c1"]


def test_linear_for_mergekit():
    assert config_of({"base": 0.25, "nq": 0.75}) == {
        "merge_method": "linear",
        "base_model": "meta-llama/Llama-2-7b-chat-hf",
        "models": [
            {"model": "meta-llama/Llama-2-7b-chat-hf", "parameters": {"weight": 0.25}},
            {"model": "Shitao/llama2-nq@3f2a9c1", "parameters": {"weight": 0.75}},
        ],
        "parameters": {"normalize": False},
    }


def test_slerp_for_mergekit():
    written = config_of({"mnli": 0.4, "nq": 0.6}, method="slerp")
    first, second = (entry["model"] for entry in written["models"])
    assert {first, second} == {"Shitao/llama2-mnli", "Shitao/llama2-nq@3f2a9c1"}
    assert written["base_model"] == first
    assert written["parameters"] == {"t": 0.6 if second.startswith("Shitao/llama2-nq") else 0.4}


@pytest.mark.parametrize(
    ("method", "params", "of_models", "of_all"),
    [
        ("task_arithmetic", {"lambda": 0.8}, {}, {"normalize": False, "lambda": 0.8}),
        ("ties", {"density": 0.3}, {"density": 0.3}, {"normalize": True, "lambda": 1.0}),
        ("dare_linear", {}, {"density": 0.5}, {"normalize": False, "lambda": 1.0, "rescale": True}),
    ],
)
def test_task_vectors_for_mergekit(method, params, of_models, of_all):
    written = config_of({"nq": 0.7}, method=method, method_params=params)
    assert written["base_model"] == "meta-llama/Llama-2-7b-chat-hf"
    assert written["models"] == [{"model": "Shitao/llama2-nq@3f2a9c1", "parameters": {"weight": 0.7, **of_models}}]
    assert written["parameters"] == of_all
