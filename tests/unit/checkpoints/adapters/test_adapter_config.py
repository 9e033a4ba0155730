"""Every field of an adapter's configuration is decided about, and what a refusal says to do is done and accepted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from cocktail_serve.checkpoints.adapters.config import FIELDS, INITS, AdapterConfig
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.errors import CheckpointError
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import one_hot
from tests.adapters import Trained, edit_config, move_trained, parameters_of, train_adapter

Folders = dict[str, Path]
Open = Callable[..., Pool]
TEXT = torch.arange(3, 15)[None]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft advises against much of what users do


def test_every_field_of_the_installed_peft_is_decided_about() -> None:
    undecided = {field.name for field in dataclasses.fields(LoraConfig)} - FIELDS.keys()
    assert undecided == set(), "look at what each does to the parameters, and say so in FIELDS"


def test_every_kind_of_beginning_in_the_installed_peft_is_decided_about() -> None:
    annotation = str(next(field.type for field in dataclasses.fields(LoraConfig) if field.name == "init_lora_weights"))
    named = {part.strip("\"' ") for part in annotation.partition("Literal[")[2].partition("]")[0].split(",")}
    assert {"gaussian", "pissa", "pissa_niter_[number of iters", "olora"} <= named
    assert {name.replace("[number of iters", "N") for name in named} <= INITS.keys()


def write_config(folder: Path, **fields: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | fields))
    return folder


@pytest.mark.parametrize("field", [name for name, field in FIELDS.items() if field.use == "refused"])
def test_a_refused_field_is_named_and_may_be_off(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        AdapterConfig(write_config(tmp_path, **{field: [1]}))
    for off in (None, False, [], {}, 0):
        AdapterConfig(write_config(tmp_path, **{field: off}))


def test_what_a_newer_release_writes_is_accepted_while_it_is_off(tmp_path: Path) -> None:
    AdapterConfig(write_config(tmp_path, use_novelty=False, novelty_config=None, novelty_layers=[]))
    with pytest.raises(
        CheckpointError, match=r"novelty_rank is 3, .*peft_version '1.0'.*delete it from adapter_config"
    ):
        AdapterConfig(write_config(tmp_path, novelty_rank=3, peft_version="1.0"))


@pytest.mark.parametrize(
    "fields",
    [
        {"merge_weights": False, "enable_lora": None},  # peft 0.2
        {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM", "unsloth_fixed": True}, "revision": "main"},
        {"lora_dtype": "float32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6},  # ms-swift
        {"base_model_name_or_path": None, "inference_mode": False, "corda_config": {"corda_method": "ipm"}},
        {"megatron_config": {}, "megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}},
        {"init_lora_weights": None, "bias": None},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_trainers_write_is_accepted(tmp_path: Path, fields: dict[str, Any]) -> None:
    AdapterConfig(write_config(tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"r": 0}, "r must be a whole number above 0"),
        ({"r": 4.5}, "r must be a whole number above 0"),
        ({"lora_alpha": "much"}, "lora_alpha must be a number"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"init_lora_weights": "novel"}, "init_lora_weights is 'novel', which is not known"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"(": 3}}, "is no pattern"),
        ({"peft_type": "VERA"}, "its peft_type is 'VERA', not LORA"),
        ({"peft_type": ["LORA"]}, "its peft_type is"),
        ({"peft_type": None}, "it has no peft_type; save it with peft again"),
        ({"peft_type": "P_TUNING"}, "adds inputs and changes no parameter"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason.replace("(", r"\(")):
        AdapterConfig(write_config(tmp_path, **fields)).scaling_of("model.layers.0.q_proj")


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"rank_pattern": {"q_proj": 2}}, 4.0),
        ({"rank_pattern": {"^model.layers.0.q_proj": 8}}, 1.0),
        ({"rank_pattern": {"_proj": 8}}, 2.0),  # no whole component
        ({"rank_pattern": {"layers.1.q_proj": 8}}, 2.0),
        ({"rank_pattern": {"q_proj": 2, r"layers\.\d+\.q_proj": 1}}, 4.0),  # the first that matches
        ({"alpha_pattern": {"model.layers.0.q_proj": 1}}, 0.25),
    ],
    ids=str,
)
def test_scaling_is_that_of_peft(tmp_path: Path, fields: dict[str, Any], scaling: float) -> None:
    assert AdapterConfig(write_config(tmp_path, **fields)).scaling_of("model.layers.0.q_proj") == scaling


# what a refusal says to do, done


def logits_of(base: Path, folder: Path, opened: Open, out: Path) -> Tensor:
    pool = opened({"base": base, "expert": folder})
    save_mixture(one_hot(pool, "expert", dtype="float32"), pool, out)
    return logits(AutoModelForCausalLM.from_pretrained(out))


def logits(model: Any) -> Tensor:
    made: Tensor = model.eval()(TEXT).logits
    return made.detach()


def assert_close(made: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=2e-3)


def assert_refused(base: Path, folder: Path, opened: Open, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened({"base": base, "expert": folder})
    assert all(word in caught.value.message for word in words), caught.value.message


def merge_again(base: Path, folder: Path, out: Path) -> Path:
    """Loads an adapter with peft over its base, merges it, saves what that gives."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)}, "use_bdlora"),
        ({"kasa_config": KasaConfig()}, "kasa_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_merging_helps(decoders: Folders, tmp_path: Path, opened: Open, options: dict[str, Any], field: str) -> None:
    trained = train_adapter(decoders["base"], tmp_path / "lora", target_modules=["q_proj"], **options)
    live = logits(trained.model)
    assert_refused(decoders["base"], trained.folder, opened, field, "merge_and_unload", "over its base")
    merged = merge_again(decoders["base"], trained.folder, tmp_path / "merged")
    assert_close(logits_of(decoders["base"], merged, opened, tmp_path / "out"), live)


def test_merging_helps_where_factors_belong_to_parameters_of_experts(tmp_path: Path, opened: Open) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    MixtralForCausalLM(config).save_pretrained(base)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    trained = train_adapter(base, tmp_path / "lora", target_modules=["q_proj"], target_parameters=names)
    live = logits(trained.model)
    assert_refused(base, trained.folder, opened, "target_parameters", "merge_and_unload")
    merged = merge_again(base, trained.folder, tmp_path / "merged")
    assert_close(logits_of(base, merged, opened, tmp_path / "out"), live)


def backward(model: Any) -> None:
    model(TEXT, labels=TEXT).loss.backward()


def train_mutated(base: Path, kind: str, before: Path, after: Path) -> Trained:
    """An adapter whose beginning was taken out of the base: saved before training, and after."""
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    more = {"lora_ga_config": LoraGAConfig()} if kind == "lora_ga" else {}
    init: Any = False if kind == "loftq" else kind
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"], init_lora_weights=init, **more)
    if kind == "corda":
        preprocess_corda(model, config, run_model=lambda: [model(torch.randint(0, 320, (1, 64))) for _ in range(4)])
    if kind == "lora_ga":
        preprocess_loraga(model, config, lambda: backward(model))
    adapted = get_peft_model(model, config)
    if kind == "loftq":  # which peft begins with bitsandbytes alone
        for name, parameter in adapted.named_parameters():
            if name.endswith("base_layer.weight"):
                parameter.data = (parameter * 4).round() / 4
    adapted.save_pretrained(before)
    move_trained(adapted)
    adapted.save_pretrained(after)
    edit_config(after, init_lora_weights=kind)
    return Trained(after, adapted.eval())


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_saving_as_plain_lora_helps(decoders: Folders, tmp_path: Path, opened: Open, kind: str) -> None:
    before = tmp_path / "before"
    trained = train_mutated(decoders["base"], kind, before, tmp_path / "lora")
    live = logits(trained.model)
    assert_refused(decoders["base"], trained.folder, opened, f"'{kind}'", "path_initial_model_for_weight_conversion")
    trained.model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(before))
    assert_close(logits_of(decoders["base"], tmp_path / "plain", opened, tmp_path / "out"), live)


@pytest.mark.parametrize("kind", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_merging_the_model_in_training_helps(decoders: Folders, tmp_path: Path, opened: Open, kind: str) -> None:
    """Loaded again, these are merged into another base: what they began with is drawn anew, or lost."""
    trained = train_mutated(decoders["base"], kind, tmp_path / "before", tmp_path / "lora")
    live = logits(trained.model)
    assert_refused(decoders["base"], trained.folder, opened, kind, "merge the model it was trained in")
    trained.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_close(logits_of(decoders["base"], tmp_path / "merged", opened, tmp_path / "out"), live)


def test_a_base_of_as_many_layers_helps(decoders: Folders, tmp_path: Path, opened: Open) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}
    trained = train_adapter(decoders["base"], tmp_path / "lora", **options)
    live = logits(trained.model)
    assert_refused(decoders["base"], trained.folder, opened, "layer_replication", "layers repeated")
    model: Any = AutoModelForCausalLM.from_pretrained(decoders["base"])
    deeper = get_peft_model(model, LoraConfig(**options)).unload()
    deeper.config.num_hidden_layers = 3
    deeper.config.layer_types = None
    deeper.save_pretrained(tmp_path / "deeper", state_dict={k: v.clone() for k, v in deeper.state_dict().items()})
    edit_config(trained.folder, layer_replication=None)
    assert_close(logits_of(tmp_path / "deeper", trained.folder, opened, tmp_path / "out"), live)


def test_another_method_that_peft_merges_helps(decoders: Folders, tmp_path: Path, opened: Open) -> None:
    model = AutoModelForCausalLM.from_pretrained(decoders["base"])
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapted = get_peft_model(model, config)
    move_trained(adapted)
    adapted.save_pretrained(tmp_path / "ia3")
    live = logits(adapted)
    assert_refused(decoders["base"], tmp_path / "ia3", opened, "'IA3', not LORA", "merge_and_unload")
    merged = merge_again(decoders["base"], tmp_path / "ia3", tmp_path / "merged")
    assert_close(logits_of(decoders["base"], merged, opened, tmp_path / "out"), live)


def test_what_adds_inputs_is_never_to_be_merged(decoders: Folders, tmp_path: Path, opened: Open) -> None:
    model = AutoModelForCausalLM.from_pretrained(decoders["base"])
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "prompt")
    assert_refused(decoders["base"], tmp_path / "prompt", opened, "PROMPT_TUNING adds inputs", "train plain LoRA")


def test_deleting_a_harmless_setting_helps(decoders: Folders, tmp_path: Path, opened: Open) -> None:
    trained = train_adapter(decoders["base"], tmp_path / "lora")
    live = logits(trained.model)
    edit_config(trained.folder, novel_learning_rate=0.1)
    assert_refused(decoders["base"], trained.folder, opened, "novel_learning_rate", "delete it")
    edit_config(trained.folder, novel_learning_rate=None)
    assert_close(logits_of(decoders["base"], trained.folder, opened, tmp_path / "out"), live)


# what the file lacks or has too much of


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        ({"use_dora": True}, {"use_dora": False}, "use_dora unset, and .* has .*lora_magnitude_vector"),
        ({}, {"use_dora": True}, "use_dora set, and .* has no such tensor"),
        ({}, {"lora_bias": True}, "lora_bias set, and .* has no such tensor"),
        ({"trainable_token_indices": [3, 4]}, {"trainable_token_indices": None}, "a token for each of the 2 rows"),
        ({"trainable_token_indices": [3, 4]}, {"trainable_token_indices": [3]}, "a token for each of the 2 rows"),
        ({"trainable_token_indices": [3, 4]}, {"trainable_token_indices": [3, 3]}, "a token for each of the 2 rows"),
        ({}, {"modules_to_save": ["lm_head"]}, "lm_head was trained and saved whole .* does not hold it"),
    ],
    ids=str,
)
def test_configuration_and_file_must_agree(
    decoders: Folders, tmp_path: Path, options: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    folder = train_adapter(decoders["base"], tmp_path / "lora", **options).folder
    parameters_of(folder, decoders["base"])
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=reason):
        parameters_of(folder, decoders["base"])


def test_what_is_saved_whole_is_taken_whatever_the_configuration_says(decoders: Folders, tmp_path: Path) -> None:
    """As peft does, which loads every tensor that the model has a place for."""
    folder = train_adapter(decoders["base"], tmp_path / "lora", modules_to_save=["lm_head"]).folder
    before = parameters_of(folder, decoders["base"])["lm_head.weight"]
    edit_config(folder, modules_to_save=None)
    assert torch.equal(parameters_of(folder, decoders["base"])["lm_head.weight"], before)
