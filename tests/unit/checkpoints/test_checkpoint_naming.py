"""One model under several names: what publishers store, and what a library that saves it anew makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from cocktail_serve.checkpoints.adapters.reader import read_expert
from cocktail_serve.checkpoints.compatibility import compare
from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.checkpoints.naming import parameter_names
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.pool import Member, Pool
from cocktail_serve.recipe import Recipe, make_recipe

WEIGHTS = "model.safetensors"
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
SMALL = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}

Model = transformers.PreTrainedModel
Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def gpt2(cls: type[Model] = transformers.GPT2LMHeadModel) -> Model:
    return cls(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, **SMALL))


def neox() -> Model:
    config = transformers.GPTNeoXConfig(**BERT, max_position_embeddings=64, **SMALL)
    return transformers.GPTNeoXForCausalLM(config)


def bert(cls: type[Model] = transformers.BertModel) -> Model:
    return cls(transformers.BertConfig(**BERT, max_position_embeddings=64, **SMALL))


def nomic() -> Model:
    return transformers.NomicBertModel(transformers.NomicBertConfig(**BERT, max_position_embeddings=64, **SMALL))


def t5(cls: type[Model] = transformers.T5ForConditionalGeneration) -> Model:
    sizes = {"num_layers": 2, "num_heads": 2, "d_model": 32, "d_ff": 64, "d_kv": 16, "vocab_size": 96}
    return cls(transformers.T5Config(**sizes))


def mixtral() -> Model:
    config = transformers.MixtralConfig(
        **BERT, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **SMALL
    )
    return transformers.MixtralForCausalLM(config)


def save(model: Model, folder: Path, *, seed: int, rename: Rename = dict, encoder: bool = False) -> Path:
    """Saves a model with random parameters, under the names that `rename` gives its stored tensors."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    model.tie_weights()
    model.save_pretrained(folder)
    save_file(rename(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    if encoder:
        (folder / "modules.json").write_text(json.dumps(MODULES))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    return folder


def as_openai_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 on the hub: no `transformer.`, and causal masks as numbers."""
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks


def as_eleuther_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pythia on the hub: masks and their value, infinite in half precision, and rotary frequencies."""
    buffers = {
        f"gpt_neox.layers.{layer}.attention.{name}": value.clone()
        for layer in range(2)
        for name, value in {
            "masked_bias": torch.tensor(-torch.inf),
            "bias": torch.ones(1, 1, 64, 64).tril().bool(),
            "rotary_emb.inv_freq": torch.ones(4),
        }.items()
    }
    return tensors | buffers


def as_google_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT of 2018: TensorFlow's names of the normalisation."""
    tf_names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = dict(tensors)
    for name in tensors:
        for new, old in tf_names.items():
            if name.endswith(new):
                renamed[name.removesuffix(new) + old] = renamed.pop(name)
    return renamed


def without_pooler(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "pooler" not in name}


def as_t5_was_saved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embeddings three times, as releases before safetensors wrote them."""
    shared = tensors["shared.weight"]
    return tensors | {f"{half}.embed_tokens.weight": shared.clone() for half in ("encoder", "decoder")}


PAIRS: dict[str, tuple[Callable[[], Model], Rename, Callable[[], Model], Rename, type[Model], bool]] = {
    # base, its stored names, expert, its stored names, what an engine loads, whether it is an encoder
    "gpt2": (gpt2, as_openai_published, gpt2, dict, transformers.GPT2LMHeadModel, False),
    "gpt2 from its headless class": (
        gpt2,
        dict,
        lambda: gpt2(transformers.GPT2Model),
        dict,
        transformers.GPT2LMHeadModel,
        False,
    ),
    "pythia": (neox, as_eleuther_published, neox, dict, transformers.GPTNeoXForCausalLM, False),
    "bert with its head": (
        lambda: bert(transformers.BertForMaskedLM),
        as_google_published,
        bert,
        dict,
        transformers.BertModel,
        True,
    ),
    "bert without pooler": (bert, without_pooler, bert, dict, transformers.BertModel, True),
    "nomic": (nomic, dict, nomic, dict, transformers.NomicBertModel, True),
    "t5": (t5, as_t5_was_saved, t5, dict, transformers.T5ForConditionalGeneration, False),
    "half of t5": (t5, dict, lambda: t5(transformers.T5EncoderModel), dict, transformers.T5EncoderModel, True),
    "mixture of experts": (mixtral, dict, mixtral, dict, transformers.MixtralForCausalLM, False),
}


def member(name: str, folder: Path) -> Member:
    """A model under a short name in place of its fingerprint, taken as it is now."""
    with CheckpointReader(folder) as reader:
        return Member(name, folder, name, "float32", 0, reader.files)


@pytest.mark.parametrize("is_reversed", [False, True], ids=["", "reversed"])
@pytest.mark.parametrize("pair", PAIRS)
def test_what_an_engine_makes_of_a_mixture_is_the_mean_of_what_it_makes_of_the_models(
    tmp_path: Path, pair: str, is_reversed: bool
) -> None:
    base_model, base_names, expert_model, expert_names, cls, is_encoder = PAIRS[pair]
    base = save(base_model(), tmp_path / "base", seed=1, rename=base_names, encoder=is_encoder)
    expert = save(expert_model(), tmp_path / "expert", seed=2, rename=expert_names, encoder=is_encoder)
    if is_reversed:
        base, expert = expert, base

    report = compare(base, expert)
    assert report.problems == ()

    recipe = Recipe("b", (("b", 0.25), ("e", 0.75)), "float32")
    mixed = dict(iter_mixture(recipe, {"b": member("b", base), "e": member("e", expert)}))
    with CheckpointReader(base) as reader:
        assert mixed.keys() == reader.tensors.keys(), "a mixture has the names that the engine was started on"
    if not is_encoder:  # the class that saved the base is what an engine makes of it
        cls = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    names = parameter_names(base)
    made = dict(names.converted(mixed.items()))
    mine, theirs = cls.from_pretrained(base), cls.from_pretrained(expert)
    read = [name for name, _ in mine.named_parameters() if names.target(name).is_read]
    assert len(read) > 15
    for name in read:
        expected = 0.25 * mine.get_parameter(name).double() + 0.75 * theirs.get_parameter(name).double()
        assert torch.allclose(made[name].double(), expected, atol=1e-6), name


def test_a_mixture_of_a_hub_gpt2_has_no_causal_masks(tmp_path: Path) -> None:
    base = save(gpt2(), tmp_path / "base", seed=1, rename=as_openai_published)
    with CheckpointReader(base) as reader:
        assert [name for name in reader.tensors if name.endswith(".attn.bias")] == []
        assert reader.tensors["h.0.attn.c_attn.bias"].shape == (96,), "a bias is a parameter"


def test_an_expert_that_lacks_what_the_engine_reads(tmp_path: Path) -> None:
    def without_a_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if ".h.1.mlp.c_fc." not in name}

    base = save(gpt2(), tmp_path / "base", seed=1, rename=as_openai_published)
    expert = save(gpt2(), tmp_path / "expert", seed=2, rename=without_a_layer)
    problems = {finding.subject: finding for finding in compare(base, expert).problems}
    assert problems.keys() == {"tensor h.1.mlp.c_fc.weight", "tensor h.1.mlp.c_fc.bias"}
    assert problems["tensor h.1.mlp.c_fc.weight"].expert == "none"


def test_a_copy_of_an_expert_of_other_names_is_the_same_expert(
    tmp_path: Path, opened: Callable[..., Pool], decoders: dict[str, Path]
) -> None:
    """Its files look new, so it is read again: under its own names, which its fingerprint is of."""
    base = save(gpt2(), tmp_path / "base", seed=1, rename=as_openai_published)
    expert = save(gpt2(), tmp_path / "expert", seed=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(decoders["base"] / name, base)
    pool = opened({"base": base, "expert": expert}, "decoder")
    recipe = make_recipe(pool, {"base": 0.5, "expert": 0.5}, dtype="float32")
    before = dict(iter_mixture(recipe, pool.by_fingerprint))
    shutil.copy(expert / WEIGHTS, tmp_path / "copy")
    (tmp_path / "copy").replace(expert / WEIGHTS)
    after = dict(iter_mixture(recipe, pool.by_fingerprint))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("is_hub", [True, False], ids=["base-without-prefix", "base-with-prefix"])
def test_two_tensors_for_one_parameter_must_be_the_same(tmp_path: Path, is_hub: bool) -> None:
    base = save(gpt2(), tmp_path / "base", seed=0, rename=as_openai_published if is_hub else dict)
    expert = save(gpt2(), tmp_path / "expert", seed=1)
    tensors = load_file(expert / WEIGHTS)
    twice = tensors | {"wte.weight": tensors["transformer.wte.weight"].clone()}
    save_file(twice, expert / WEIGHTS)
    assert compare(base, expert).problems == ()
    twice["wte.weight"][3] += 1
    save_file(twice, expert / WEIGHTS)
    (found,) = compare(base, expert).problems
    names = {"wte.weight", "transformer.wte.weight"}
    assert {found.subject.removeprefix("tensor "), found.expert.split()[4].rstrip(",")} == names


def test_names_that_the_library_does_not_know_are_compared_as_they_are(tmp_path: Path) -> None:
    def as_another_tool(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"tool.{name}": tensor for name, tensor in tensors.items()}

    base = save(gpt2(), tmp_path / "base", seed=1, rename=as_another_tool)
    expert = save(gpt2(), tmp_path / "expert", seed=2)
    problems = [finding.subject for finding in compare(base, expert).problems]
    assert "tensor tool.transformer.h.0.attn.c_attn.weight" in problems
    assert "tensor transformer.h.0.attn.c_attn.weight" in problems


def test_models_of_the_same_names_are_read_without_transformers(
    decoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("names were asked for")

    monkeypatch.setattr("cocktail_serve.checkpoints.naming.parameter_names", refuse)
    with CheckpointReader(decoders["base"]) as base, read_expert(decoders["nq"], base) as expert:
        assert expert.tensors.keys() == base.tensors.keys()
