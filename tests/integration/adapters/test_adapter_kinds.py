"""Every kind of adapter that is accepted is the model that peft makes of it: trained, saved and merged by peft."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import EvaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    NomicBertConfig,
    NomicBertModel,
)

from cocktail_serve.checkpoints.adapters.changes import (
    CONV1D_MODEL_TYPES,
    CONV1D_MODULES,
    Change,
    FactorPair,
    why_merged,
)
from cocktail_serve.checkpoints.adapters.reader import AdapterReader
from cocktail_serve.checkpoints.compatibility import compare
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import one_hot
from tests.adapters import edit_config, parameters_of, train_adapter
from tests.models import make_decoder, make_encoder_decoder, make_reranker

Folders = dict[str, Path]
Open = Callable[..., Pool]
TEXT = torch.arange(3, 15)[None]


def assert_is(folder: Path, base: Path, merged: dict[str, Tensor]) -> None:
    """The adapter makes the merged parameters of the base, and not the base's own."""
    made, before = parameters_of(folder, base), load_file(base / "model.safetensors")
    assert made.keys() == before.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor.float(), merged[name], rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(made[name].float(), before[name].float()) for name in made)


def changed(folder: Path, base: Path) -> set[str]:
    """Parameters with other values than the base's."""
    before = load_file(base / "model.safetensors")
    return {name for name, tensor in parameters_of(folder, base).items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "target_modules": ["down_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["input_layernorm", "k_proj"], "target_modules": ["q_proj"]},
        {"trainable_token_indices": [9, 3, 5]},
        {"trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [7, 1]}},
        {
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "up_proj": 3},
            "alpha_pattern": {r".*\.1\.mlp\..*": 5},
        },
        {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["q_proj"]},
        {"exclude_modules": ["q_proj"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "eva", "eva_config": EvaConfig()},
        {"velora_config": VeloraConfig()},
        {"monteclora_config": MontecloraConfig()},
        {"lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
    ],
    ids=lambda options: ", ".join(f"{name} {value}" for name, value in options.items())[:70],
)
def test_of_a_decoder(decoders: Folders, tmp_path: Path, options: dict[str, Any]) -> None:
    trained = train_adapter(decoders["base"], tmp_path / "lora", **options)
    assert_is(trained.folder, decoders["base"], trained.merged())


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [4, 2]}], ids=str
)
def test_embeddings_that_are_saved_on_request_are_taken_as_saved(
    decoders: Folders, tmp_path: Path, options: dict[str, Any]
) -> None:
    saving = {"save_embedding_layers": True}
    trained = train_adapter(decoders["base"], tmp_path / "lora", saving=saving, **options)
    assert_is(trained.folder, decoders["base"], trained.merged())


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"use_dora": True, "target_modules": ["query", "word_embeddings"]},
        {"modules_to_save": ["pooler"]},
        {"target_modules": ["word_embeddings", "position_embeddings"]},
    ],
    ids=str,
)
def test_of_an_encoder(encoders: Folders, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"target_modules": ["query", "dense"], **options}
    trained = train_adapter(encoders["base"], tmp_path / "lora", auto_class=AutoModel, **options)
    assert_is(trained.folder, encoders["base"], trained.merged())


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta"])
def test_of_a_reranker_with_its_head(tmp_path: Path, architecture: Any) -> None:
    base = make_reranker(tmp_path / "base", architecture=architecture)
    trained = train_adapter(
        base,
        tmp_path / "lora",
        auto_class=AutoModelForSequenceClassification,
        target_modules=["query"],
        task_type="SEQ_CLS",
    )
    assert json.loads((trained.folder / "adapter_config.json").read_text())["modules_to_save"] == [
        "classifier",
        "score",
    ]
    assert_is(trained.folder, base, trained.merged())
    assert [name for name in changed(trained.folder, base) if name.startswith("classifier.")]


def test_a_head_that_the_base_lacks_is_named(encoders: Folders, tmp_path: Path) -> None:
    auto_class = AutoModelForSequenceClassification
    folder = train_adapter(encoders["base"], tmp_path / "a", auto_class=auto_class, task_type="SEQ_CLS").folder
    with pytest.raises(IncompatibleModelsError, match=r"changes classifier.*does not hold"):
        parameters_of(folder, encoders["base"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_over_a_base_in_half_precision_it_is_not_rounded_to_that(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_decoder(tmp_path / "base", dtype=dtype)
    options: dict[str, Any] = {"modules_to_save": ["norm"], "trainable_token_indices": [3, 2], "use_dora": True}
    trained = train_adapter(base, tmp_path / "lora", **options)
    assert_is(trained.folder, base, trained.merged())


# Conv1D


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"]},
        {"target_modules": ["attn.c_proj"]},
        {"target_modules": ["c_proj", "wte"], "use_dora": True},
        {"target_modules": ["c_attn", "c_proj"], "lora_bias": True},
    ],
    ids=str,
)
def test_conv1d_is_turned_whatever_the_flag_says(
    gpt2: Path, tmp_path: Path, flag: bool, options: dict[str, Any]
) -> None:
    """c_proj of the attention is square, 32 by 32: no shape tells how it is stored."""
    trained = train_adapter(gpt2, tmp_path / "lora", **options)
    edit_config(trained.folder, fan_in_fan_out=flag)
    assert_is(trained.folder, gpt2, trained.merged())


def test_a_flag_on_a_linear_layer_turns_nothing(decoders: Folders, tmp_path: Path) -> None:
    trained = train_adapter(decoders["base"], tmp_path / "lora", target_modules=["q_proj"])  # square
    edit_config(trained.folder, fan_in_fan_out=True)
    assert_is(trained.folder, decoders["base"], trained.merged())


def test_a_base_under_the_names_of_its_publisher(gpt2: Path, tmp_path: Path) -> None:
    """GPT-2 is published without the prefix that its class with a head has."""
    trained = train_adapter(gpt2, tmp_path / "lora")
    tensors = load_file(gpt2 / "model.safetensors")
    base = tmp_path / "published"
    base.mkdir()
    (base / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, base / "model.safetensors"
    )
    merged = {name.removeprefix("transformer."): tensor for name, tensor in trained.merged().items()}
    assert_is(trained.folder, base, merged)


def test_the_architectures_with_conv1d_are_those_of_transformers() -> None:
    models = Path(__import__("transformers").__file__).parent / "models"
    using = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if "from ...pytorch_utils import Conv1D" in path.read_text()
    }
    assert {{"openai": "openai-gpt"}.get(name, name) for name in using} == CONV1D_MODEL_TYPES


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_the_modules_that_are_conv1d_have_names_of_their_own(model_type: str) -> None:
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.for_model(
        model_type, vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8, add_cross_attention=True
    )
    model = AutoModelForCausalLM.from_config(config)
    kinds = {
        kind: {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kind)}
        for kind in (Conv1D, torch.nn.Linear, torch.nn.Embedding)
    }
    assert kinds[Conv1D] <= CONV1D_MODULES
    assert not CONV1D_MODULES & (kinds[torch.nn.Linear] | kinds[torch.nn.Embedding])


# names


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("base_model.model.", ""),
        ("base_model.model.model.", "base_model.model."),
        ("base_model.model.model.", "base_model.model.model.language_model."),
        ("base_model.model.model.", "base_model.model.language_model.model."),
    ],
)
def test_names_may_begin_otherwise(decoders: Folders, tmp_path: Path, before: str, after: str) -> None:
    """As classes without a head have them, and those for text and images."""
    trained = train_adapter(decoders["base"], tmp_path / "lora")
    path = trained.folder / "adapter_model.safetensors"
    save_file({name.replace(before, after, 1): tensor for name, tensor in load_file(path).items()}, path)
    assert_is(trained.folder, decoders["base"], trained.merged())


@pytest.fixture(scope="module")
def nomic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored under its publisher's names, with queries, keys and values joined."""
    torch.manual_seed(0)
    config = NomicBertConfig(
        vocab_size=96, num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64
    )
    folder = tmp_path_factory.mktemp("nomic")
    NomicBertModel(config).save_pretrained(folder)
    return folder


def test_a_base_whose_tensors_are_renamed_on_loading(nomic: Path, tmp_path: Path) -> None:
    modules = ["up_proj", "down_proj", "o_proj", "word_embeddings"]
    trained = train_adapter(nomic, tmp_path / "lora", auto_class=AutoModel, target_modules=modules)
    trained.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_is(trained.folder, nomic, load_file(tmp_path / "merged" / "model.safetensors"))
    assert {name for name in changed(trained.folder, nomic) if ".0." in name} == {
        f"encoder.layers.0.{name}.weight" for name in ("attn.out_proj", "mlp.fc11", "mlp.fc2")
    }


def test_a_parameter_that_the_base_stores_joined_is_merged_by_peft(nomic: Path, tmp_path: Path) -> None:
    trained = train_adapter(nomic, tmp_path / "lora", auto_class=AutoModel, target_modules=["q_proj", "v_proj"])
    with pytest.raises(IncompatibleModelsError, match=r"q_proj.*joined.*Wqkv.*merge_and_unload"):
        parameters_of(trained.folder, nomic)
    live = trained.model(TEXT).last_hidden_state.detach()
    trained.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert compare(nomic, tmp_path / "merged").is_compatible
    merged = AutoModel.from_pretrained(tmp_path / "merged")(TEXT).last_hidden_state
    torch.testing.assert_close(merged.detach(), live, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")  # of peft's own conversion
def test_an_adapter_of_an_older_transformers_has_the_names_that_are_stored(tmp_path: Path) -> None:
    """It had a linear layer for each expert of a Mixtral, where there is one parameter for all now."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 96}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path / "base")
    factors = {}
    for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items():
        if "experts" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = torch.randn(3, tensor.shape[1])
            factors[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], 3)
    folder = tmp_path / "lora"
    LoraConfig(r=3, lora_alpha=6, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM").save_pretrained(folder)
    save_file(factors, folder / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_is(folder, tmp_path / "base", load_file(tmp_path / "merged" / "model.safetensors"))


def test_an_adapter_with_a_name_lies_in_a_folder_of_its_own(decoders: Folders, tmp_path: Path, opened: Open) -> None:
    trained = train_adapter(decoders["base"], tmp_path / "one")
    trained.model.add_adapter("billing", trained.model.peft_config["default"])
    trained.model.save_pretrained(tmp_path / "named", selected_adapters=["billing"])
    with pytest.raises(CheckpointError, match=r"folders of their own \(billing\).*/named/billing"):
        opened({"base": decoders["base"], "lora": tmp_path / "named"})
    opened({"base": decoders["base"], "lora": tmp_path / "named" / "billing"})


# tied embeddings: there merging is wrong, so that logits are compared with those of the model in training


def logits_of(base: Path, folder: Path, opened: Open, out: Path) -> Tensor:
    pool = opened({"base": base, "lora": folder})
    save_mixture(one_hot(pool, "lora", dtype="float32"), pool, out)
    logits: Tensor = AutoModelForCausalLM.from_pretrained(out).eval()(TEXT).logits
    return logits.detach()


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [9, 3, 5]},
        {"trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [9, 3]}},
        {"ensure_weight_tying": True, "target_modules": ["q_proj", "embed_tokens"]},
        {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_of_tied_embeddings_that_are_changed_alike(
    tied_decoders: Folders, tmp_path: Path, opened: Open, options: dict[str, Any]
) -> None:
    trained = train_adapter(tied_decoders["base"], tmp_path / "lora", **options)
    live = trained.model(TEXT).logits.detach()
    made = logits_of(tied_decoders["base"], trained.folder, opened, tmp_path / "out")
    torch.testing.assert_close(made, live, rtol=1e-4, atol=2e-3)
    assert "model.embed_tokens.weight" in changed(trained.folder, tied_decoders["base"])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"lm_head": [9, 3]}},
        {"trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [9, 4]}},
    ],
    ids=str,
)
def test_of_tied_embeddings_that_are_changed_apart_needs_a_base_that_holds_both(
    tied_decoders: Folders, tmp_path: Path, opened: Open, options: dict[str, Any]
) -> None:
    trained = train_adapter(tied_decoders["base"], tmp_path / "lora", **options)
    live = trained.model(TEXT).logits.detach()
    with pytest.raises(IncompatibleModelsError, match="set tie_word_embeddings to false"):
        opened({"base": tied_decoders["base"], "lora": trained.folder})
    model: Any = AutoModelForCausalLM.from_pretrained(tied_decoders["base"])
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "untied")
    made = logits_of(tmp_path / "untied", trained.folder, opened, tmp_path / "out")
    torch.testing.assert_close(made, live, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["shared"]},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["shared"], "target_modules": ["q"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q"]},
    ],
    ids=str,
)
def test_embeddings_that_encoder_decoder_and_head_share_are_changed_in_all_or_refused(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Of these four places peft changes one or two."""
    base = make_encoder_decoder(tmp_path / "base")
    folder = train_adapter(base, tmp_path / "lora", auto_class=AutoModelForSeq2SeqLM, **options).folder
    with pytest.raises(IncompatibleModelsError, match="one parameter for all: train it without its embeddings"):
        parameters_of(folder, base)


@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": [3, 4]}], ids=str)
def test_of_an_encoder_decoder(tmp_path: Path, options: dict[str, Any]) -> None:
    def logits(model: Any) -> Tensor:
        made: Tensor = model.eval()(input_ids=TEXT, decoder_input_ids=TEXT).logits
        return made.detach()

    base = make_encoder_decoder(tmp_path / "base")
    trained = train_adapter(base, tmp_path / "lora", auto_class=AutoModelForSeq2SeqLM, **options)
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    before = logits(model)
    assert not model.load_state_dict(parameters_of(trained.folder, base), strict=False).unexpected_keys
    torch.testing.assert_close(logits(model), logits(trained.model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), before, atol=0.1)


def test_embeddings_of_an_encoder_without_a_head_are_tied_to_nothing(encoders: Folders, tmp_path: Path) -> None:
    """BERT's configuration ties embeddings to a head that no encoder has."""
    trained = train_adapter(
        encoders["base"], tmp_path / "lora", auto_class=AutoModel, target_modules=["word_embeddings"]
    )
    assert changed(trained.folder, encoders["base"]) == {"embeddings.word_embeddings.weight"}


def test_new_tokens_need_a_base_that_has_them(decoders: Folders, tmp_path: Path, opened: Open) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(decoders["base"])
    model.resize_token_embeddings(322)
    model.save_pretrained(tmp_path / "grown")
    trained = train_adapter(tmp_path / "grown", tmp_path / "lora", trainable_token_indices=[320, 321])
    with pytest.raises(IncompatibleModelsError, match=r"trained token 321.*has 320: give the base the same tokens"):
        parameters_of(trained.folder, decoders["base"])
    assert_is(trained.folder, tmp_path / "grown", trained.merged())


def test_peft_is_the_release_whose_behaviour_was_looked_at() -> None:
    assert peft.__version__.startswith("0.21."), "look at what the new release saves, then raise this"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=str,
)
def test_no_parameter_exceeds_the_bound_that_is_kept_of_it(
    decoders: Folders, tmp_path: Path, opened: Open, options: dict[str, Any]
) -> None:
    folder = train_adapter(decoders["base"], tmp_path / "lora", **options).folder
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 50 for name, tensor in load_file(path).items()}, path)
    bound = opened({"base": decoders["base"], "lora": folder}).experts["lora"].largest
    largest = max(tensor.abs().max().item() for tensor in parameters_of(folder, decoders["base"]).values())
    base = max(tensor.abs().max().item() for tensor in load_file(decoders["base"] / "model.safetensors").values())
    assert base < largest <= bound


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, None),
        ({"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"q_proj": 2}, "use_rslora": True}, None),
        ({"target_modules": ["lm_head", "down_proj"], "alpha_pattern": {"lm_head": 3}}, None),
        ({"use_dora": True}, "it is DoRA.*: model.layers.0.mlp.down_proj.weight"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save.*: model.embed_tokens.weight"),
        ({"trainable_token_indices": [9, 3]}, "trainable_token_indices.*: model.embed_tokens.weight"),
    ],
    ids=str,
)
def test_which_decoders_adapters_need_no_merging(
    decoders: Folders, tmp_path: Path, options: dict[str, Any], why: str | None
) -> None:
    folder = train_adapter(decoders["base"], tmp_path / "lora", **options).folder
    with CheckpointReader(decoders["base"]) as base, AdapterReader(folder, base) as reader:
        assert (reader.merged_only is None) == (why is None)
        assert why is None or re.search(why, reader.merged_only or "")


def test_embeddings_that_are_saved_beside_their_factors_are_looked_at(decoders: Folders, tmp_path: Path) -> None:
    folder = train_adapter(decoders["base"], tmp_path / "lora", target_modules=["embed_tokens"]).folder
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    (saved,) = (name for name in tensors if name.endswith("embed_tokens.base_layer.weight"))
    with CheckpointReader(decoders["base"]) as base, AdapterReader(folder, base) as reader:
        assert [change.is_low_rank for change in reader.changes.values()] == [True]
    tensors[saved][0, 0] += 1
    save_file(tensors, file)
    with CheckpointReader(decoders["base"]) as base, AdapterReader(folder, base) as reader:
        assert [change.is_low_rank for change in reader.changes.values()] == [False]
        assert "modules_to_save" in (reader.merged_only or "")


def test_trained_biases_need_merging(encoders: Folders, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["query"], "bias": "lora_only", "auto_class": AutoModel}
    folder = train_adapter(encoders["base"], tmp_path / "lora", **options).folder
    with CheckpointReader(encoders["base"]) as base, AdapterReader(folder, base) as reader:
        assert re.search("trained biases: .*query.bias", reader.merged_only or "")


@pytest.mark.parametrize(
    ("parameter", "shape", "why"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 4), None),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", (8, 4), "MoE"),
        ("model.layers.0.self_attn.kv_b_proj.weight", (8, 4), "MLA"),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 8, 4), "no matrix"),
        ("backbone.layers.0.mixer.conv1d.weight", (8, 1, 4), "no matrix"),
    ],
)
def test_which_layers_are_plain_products(parameter: str, shape: tuple[int, ...], why: str | None) -> None:
    found = why_merged(parameter, Change(pair=FactorPair("a", "b", 1.0, False, None)), shape)
    assert (found is None) == (why is None)
    assert why is None or why in (found or "")
