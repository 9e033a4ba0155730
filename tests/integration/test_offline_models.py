"""Models of a pool one after another in one place: the same parameters as a model made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.errors import CheckpointError
from cocktail_serve.offline.models import TransformersModels, check_loads
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import make_recipe
from tests.models import make_decoder_pool, make_encoder_decoder_pool, pool_section
from tests.zoo.making import publish
from tests.zoo.specimens import POSITIONS, find

EMBEDDINGS = "model.embed_tokens.weight"
MIXTURES = ({"base": 1.0}, {"base": 0.5, "one": 0.5}, {"one": 0.25, "two": 0.75}, {"base": 1.0})


def opened(folders: dict[str, Path], kind: str, engine: str, tmp_path: Path) -> tuple[Pool, PoolConfig]:
    config = PoolConfig.model_validate(pool_section("p", kind, folders, {"type": engine}))
    return open_pool(config, cache_dir=tmp_path / "cache"), config


@pytest.mark.parametrize("tied", [False, True])
def test_a_mixture_filled_in_is_the_mixture_made_anew(tmp_path: Path, tied: bool) -> None:
    pool, config = opened(make_decoder_pool(tmp_path, ("one", "two"), tied=tied), "decoder", "vllm", tmp_path)
    models, used = TransformersModels(pool, config), []
    for weights in MIXTURES:
        recipe = make_recipe(pool, weights, dtype="float32")
        model = models.use(recipe)
        used.append(id(model))
        expected = models.make(recipe)
        ids = torch.arange(5, 15)[None]
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
        for (name, ours), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name
    assert len(set(used)) == 1, "parameters go into the model that is there"


def test_a_checkpoint_whose_names_are_not_the_models_is_loaded_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, config = opened(make_decoder_pool(tmp_path, ("one", "two")), "decoder", "vllm", tmp_path)
    models = TransformersModels(pool, config)
    first = models.use(make_recipe(pool, {"base": 1.0}, dtype="float32"))
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    own = first.state_dict()
    monkeypatch.setattr(first, "state_dict", lambda: {f"model.{name}": tensor for name, tensor in own.items()})
    recipe = make_recipe(pool, {"one": 1.0}, dtype="float32")
    second = models.use(recipe)
    assert second is not first
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.items()), "nothing was half filled in"
    assert torch.equal(second.lm_head.weight, models.make(recipe).lm_head.weight)


def test_encoder_decoders_share_their_tables_after_a_swap(tmp_path: Path) -> None:
    pool, config = opened(make_encoder_decoder_pool(tmp_path, ("one", "two")), "encoder_decoder", "offline", tmp_path)
    models = TransformersModels(pool, config)
    for weights in MIXTURES:
        recipe = make_recipe(pool, weights, dtype="float32")
        model, expected = models.use(recipe), models.make(recipe)
        for (name, ours), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("name", ["gpt-2", "gemma-3-multimodal"])
def test_the_context_length_is_read_by_the_name_that_the_architecture_gives_it(tmp_path: Path, name: str) -> None:
    """`n_positions` of GPT-2, and `text_config` of models that also see."""
    specimen = find(name)
    folder = publish(tmp_path / "base", specimen)
    pool, config = opened({"base": folder}, "decoder", "vllm", tmp_path)
    assert TransformersModels(pool, config).max_tokens == POSITIONS


def test_attention_that_is_capped_is_capped(tmp_path: Path) -> None:
    """As in vLLM; the attention that transformers takes by default leaves Gemma 2's soft cap out."""
    config = Gemma2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, attn_logit_softcapping=0.5,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder = make_decoder_pool(tmp_path, ())["base"]
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    pool, pool_config = opened({"base": folder}, "decoder", "vllm", tmp_path)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        ours = TransformersModels(pool, pool_config).use(make_recipe(pool, {"base": 1.0}, dtype="float32"))(ids).logits
        eager, default = (
            Gemma2ForCausalLM.from_pretrained(folder, attn_implementation=attention)(ids).logits
            for attention in ("eager", "sdpa")
        )
    assert torch.allclose(ours, eager, atol=1e-4)
    assert not torch.allclose(default, eager, atol=1e-2), "else this test says nothing"


@pytest.mark.parametrize("kind", ["untied", "tied", "encoder-decoder"])
def test_parameters_that_are_all_there(tmp_path: Path, kind: str) -> None:
    if kind == "encoder-decoder":
        pool, _ = opened(make_encoder_decoder_pool(tmp_path, ()), "encoder_decoder", "offline", tmp_path)
    else:
        pool, _ = opened(make_decoder_pool(tmp_path, (), tied=kind == "tied"), "decoder", "vllm", tmp_path)
    check_loads(pool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: params.pop("lm_head.weight"), r"lacks parameters .*: lm_head\.weight; save it whole"),
        (
            lambda params: params.update({EMBEDDINGS: params[EMBEDDINGS][:300].clone()}),
            r"embed_tokens\.weight is \[300, 64\] in its files, but \[320, 64\] by its config\.json",
        ),
    ],
    ids=["missing", "of another shape"],
)
def test_parameters_that_the_configuration_does_not_find(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    folders = make_decoder_pool(tmp_path, ())
    params = load_file(folders["base"] / "model.safetensors")
    change(params)
    save_file(params, folders["base"] / "model.safetensors", metadata={"format": "pt"})
    pool, _ = opened(folders, "decoder", "vllm", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        check_loads(pool)
