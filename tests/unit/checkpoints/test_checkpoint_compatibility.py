"""The compatibility report: what differs between a base and an expert, before a parameter is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cocktail_serve.checkpoints.compatibility import CompatibilityReport, Finding, compare
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError
from tests.models import make_decoder, make_decoder_reranker, make_encoder

Folders = dict[str, Path]
Copy = Callable[..., Path]
Edit = Callable[..., None]
WEIGHTS = "model.safetensors"


def problems(base: Path, expert: Path) -> dict[str, Finding]:
    report = compare(base, expert)
    assert report.is_compatible is not bool(report.problems)
    return {finding.subject: finding for finding in report.problems}


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


@pytest.mark.parametrize("pool", ["decoders", "tied_decoders", "encoders", "cls_encoders"])
def test_a_base_and_its_experts_have_no_problems(pool: str, request: pytest.FixtureRequest) -> None:
    folders = request.getfixturevalue(pool)
    for expert in folders.values():
        report = compare(folders["base"], expert)
        assert report.problems == ()
        report.raise_if_incompatible()


def test_another_architecture_is_one_finding(decoders: Folders, encoders: Folders) -> None:
    found = problems(decoders["base"], encoders["base"])
    assert (found["config model_type"].base, found["config model_type"].expert) == ("'llama'", "'bert'")
    assert not [subject for subject in found if subject.startswith("config ") and subject != "config model_type"]


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"hidden_size": 128}, "config hidden_size"),
        ({"num_layers": 3}, "config num_hidden_layers"),
        ({"num_heads": 4}, "config num_attention_heads"),
        ({"head_dim": 64}, "config head_dim"),
        ({"max_position": 512}, "config max_position_embeddings"),
        ({"tie_word_embeddings": True}, "config tie_word_embeddings"),
    ],
    ids=str,
)
def test_another_size_names_the_setting(
    decoders: Folders, tmp_path: Path, options: dict[str, Any], setting: str
) -> None:
    assert setting in problems(decoders["base"], make_decoder(tmp_path / "other", **options))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"rms_norm_eps": 1e-3}, "config rms_norm_eps"),
        ({"hidden_act": "gelu"}, "config hidden_act"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "config rope_parameters.rope_theta"),
        ({"attention_bias": True}, "config attention_bias"),
        # no setting of Llama's, and read of every architecture
        ({"is_causal": False}, "config is_causal"),
        ({"logit_scale": 0.5}, "config logit_scale"),
    ],
    ids=str,
)
def test_a_setting_that_changes_what_parameters_mean(
    decoders: Folders, copy: Copy, edit_json: Edit, changes: dict[str, Any], setting: str
) -> None:
    expert = copy(decoders["nq"])
    edit_json(expert / "config.json", **changes)
    assert list(problems(decoders["base"], expert)) == [setting]


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "/home/someone/output", "transformers_version": "4.30.0"},
        {"dtype": None, "torch_dtype": "bfloat16"},
        {"attention_dropout": 0.1, "initializer_range": 0.5, "use_cache": False},
        {"pad_token_id": 2, "eos_token_id": [2, 3]},
        # written by a release before the rope settings moved
        {"rope_parameters": None, "rope_theta": 10000.0},
        {"is_causal": True},
    ],
    ids=str,
)
def test_settings_that_say_nothing_of_the_parameters(
    decoders: Folders, copy: Copy, edit_json: Edit, changes: dict[str, Any]
) -> None:
    expert = copy(decoders["nq"])
    edit_json(expert / "config.json", **changes)
    assert problems(decoders["base"], expert) == {}


def test_a_resized_vocabulary_names_the_tensor_both_shapes_and_the_fix(decoders: Folders, copy: Copy) -> None:
    expert = copy(decoders["nq"])
    rewrite(expert, **{"model.embed_tokens.weight": torch.zeros(328, 64)})
    with pytest.raises(IncompatibleModelsError) as caught:
        compare(decoders["base"], expert).raise_if_incompatible()
    message = caught.value.message
    assert "tensor model.embed_tokens.weight" in message
    assert "float32[320, 64]" in message
    assert "float32[328, 64]" in message
    assert "resize it back" in message
    assert str(expert) in message


def test_missing_and_further_tensors(decoders: Folders, copy: Copy) -> None:
    expert = copy(decoders["nq"])
    rewrite(expert, **{"model.norm.weight": None, "model.extra": torch.zeros(3)})
    report = compare(decoders["base"], expert)
    assert [(finding.subject, finding.expert) for finding in report.problems] == [("tensor model.norm.weight", "none")]
    # the architecture has no such parameter: whoever loads the expert leaves it out
    assert [(finding.subject, finding.base) for finding in report.warnings] == [("tensor model.extra", "none")]


def test_integer_buffers_that_only_one_release_stores(encoders: Folders, copy: Copy) -> None:
    expert = copy(encoders["quora"])
    rewrite(expert, **{"embeddings.position_ids": torch.arange(128)[None]})
    assert problems(encoders["base"], expert) == {}
    assert problems(expert, encoders["base"]) == {}


def test_a_tensor_that_is_an_integer_in_one_model_alone(decoders: Folders, copy: Copy) -> None:
    expert = copy(decoders["nq"])
    rewrite(expert, **{"model.norm.weight": torch.ones(64, dtype=torch.int64)})
    assert problems(decoders["base"], expert)["tensor model.norm.weight"].expert == "int64[64]"


def test_tied_embeddings_may_be_stored_or_left_out(tied_decoders: Folders, copy: Copy) -> None:
    expert = copy(tied_decoders["nq"])
    embeddings = load_file(expert / WEIGHTS)["model.embed_tokens.weight"]
    rewrite(expert, **{"lm_head.weight": embeddings.clone()})
    assert problems(tied_decoders["base"], expert) == {}
    assert problems(expert, tied_decoders["base"]) == {}


def tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def swap_two_ids(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        (swap_two_ids, "tokenizer id of 'a'"),
        (lambda c: c["model"]["merges"].reverse(), "tokenizer merges"),
        (lambda c: c["added_tokens"].append({**c["added_tokens"][0], "id": 320, "content": "<x>"}), "id of '<x>'"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "tokenizer normalizer"),
    ],
    ids=["vocab", "merges", "added", "normalizer"],
)
def test_another_tokenizer(
    decoders: Folders, copy: Copy, change: Callable[[dict[str, Any]], None], subject: str
) -> None:
    expert = copy(decoders["nq"])
    tokenizer(expert, change)
    assert [subject in found for found in problems(decoders["base"], expert)] == [True]


def test_the_same_tokenizer_written_by_another_release(decoders: Folders, copy: Copy) -> None:
    expert = copy(decoders["nq"])

    def rewritten(content: dict[str, Any]) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        content["truncation"] = {"max_length": 16, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}

    tokenizer(expert, rewritten)
    assert problems(decoders["base"], expert) == {}


def test_an_expert_without_tokenizer_uses_the_bases(decoders: Folders, copy: Copy) -> None:
    expert = copy(decoders["nq"])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (expert / name).unlink()
    assert problems(decoders["base"], expert) == {}


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {"vocab": 3}}', "{", '{"model": {"vocab": [1]}}'])
def test_a_tokenizer_that_cannot_be_read(decoders: Folders, copy: Copy, content: str) -> None:
    expert = copy(decoders["nq"])
    (expert / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        compare(decoders["base"], expert)


def test_another_pooling(encoders: Folders, tmp_path: Path) -> None:
    found = problems(encoders["base"], make_encoder(tmp_path / "cls", pooling="cls"))
    assert (found["pooling"].base, found["pooling"].expert) == ("mean", "cls")


def test_another_chain_of_modules(encoders: Folders, tmp_path: Path) -> None:
    found = problems(encoders["base"], make_encoder(tmp_path / "raw", normalize=False))
    assert found["modules.json"].base == "Transformer > Pooling > Normalize"
    assert found["modules.json"].expert == "Transformer > Pooling"


def test_a_pooling_that_leaves_prompts_out(encoders: Folders, copy: Copy, edit_json: Edit) -> None:
    expert = copy(encoders["quora"])
    edit_json(expert / "1_Pooling" / "config.json", include_prompt=False)
    found = problems(encoders["base"], expert)
    assert list(found) == ["1_Pooling/config.json include_prompt"]
    edit_json(expert / "1_Pooling" / "config.json", include_prompt=None)
    assert problems(encoders["base"], expert) == {}


def test_lower_casing_counts_where_the_tokenizer_keeps_case(encoders: Folders, copy: Copy, edit_json: Edit) -> None:
    base, expert = copy(encoders["base"], "base"), copy(encoders["quora"])
    edit_json(expert / "sentence_bert_config.json", do_lower_case=True)
    assert problems(base, expert) == {}
    for folder in (base, expert):
        content = json.loads((folder / "tokenizer.json").read_text())
        content["normalizer"]["lowercase"] = False
        (folder / "tokenizer.json").write_text(json.dumps(content))
    found = problems(base, expert)["sentence_bert_config.json do_lower_case"]
    assert (found.base, found.expert) == ("False", "True")


def test_pooling_as_older_releases_wrote_it(encoders: Folders, copy: Copy) -> None:
    expert = copy(encoders["quora"])
    flags = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in ("cls_token", "mean_tokens", "max_tokens")}
    (expert / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    modules = json.loads((expert / "modules.json").read_text())
    for module, name in zip(modules, ("Transformer", "Pooling", "Normalize"), strict=True):
        module["type"] = f"sentence_transformers.models.{name}"
    (expert / "modules.json").write_text(json.dumps(modules))
    assert problems(encoders["base"], expert) == {}


def test_an_encoder_without_modules_uses_the_bases(encoders: Folders, copy: Copy) -> None:
    expert = copy(encoders["quora"])
    (expert / "modules.json").unlink()
    assert problems(encoders["base"], expert) == {}


def test_modules_that_are_code_of_the_checkpoint(encoders: Folders, copy: Copy) -> None:
    expert = copy(encoders["quora"])
    (expert / "modules.json").write_text(json.dumps([{"type": "custom_st.Transformer", "path": ""}]))
    with pytest.raises(CheckpointError, match=r"'custom_st\.Transformer' is code"):
        compare(encoders["base"], expert)


def test_an_architecture_that_is_code_of_the_checkpoint(decoders: Folders, copy: Copy, edit_json: Edit) -> None:
    expert = copy(decoders["nq"])
    edit_json(expert / "config.json", model_type="mine", auto_map={"AutoConfig": "code.MineConfig"})
    (expert / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match="'mine' comes as code with the checkpoint"):
        compare(decoders["base"], expert)


def test_code_beside_a_known_architecture_is_left_aside(decoders: Folders, copy: Copy, edit_json: Edit) -> None:
    expert = copy(decoders["nq"])
    edit_json(expert / "config.json", auto_map={"AutoModelForCausalLM": "code.Mine", "AutoConfig": "code.MineConfig"})
    (expert / "code.py").write_text("raise SystemExit('ran')")
    assert problems(decoders["base"], expert) == {}


@pytest.mark.parametrize(
    "changes", [{"model_type": None}, {"model_type": "nonsense"}, {"hidden_size": "wide"}], ids=str
)
def test_a_config_that_transformers_cannot_read(
    decoders: Folders, copy: Copy, edit_json: Edit, changes: dict[str, Any]
) -> None:
    expert = copy(decoders["nq"])
    edit_json(expert / "config.json", **changes)
    with pytest.raises(CheckpointError, match=r"transformers cannot read config\.json"):
        compare(decoders["base"], expert)


def test_the_message_lists_the_first_findings_alone() -> None:
    findings = tuple(Finding(f"tensor {n}", "1", "2", "fix it") for n in range(100))
    with pytest.raises(IncompatibleModelsError) as caught:
        CompatibilityReport(Path("base"), Path("expert"), findings).raise_if_incompatible()
    assert caught.value.message.count("fix it") == 5
    assert "and 95 more" in caught.value.message


def warned(base: Path, expert: Path) -> list[str]:
    report = compare(base, expert)
    assert report.problems == ()
    return [finding.subject for finding in report.warnings]


@pytest.mark.parametrize(
    ("changes", "subjects"),
    [
        ({"unsloth_version": "2026.1.1", "unsloth_fixed": True}, ["config unsloth_fixed", "config unsloth_version"]),
        (
            {"sentence_transformers": {"version": "6.2.0", "activation_fn": "torch.nn.modules.linear.Identity"}},
            ["config sentence_transformers.activation_fn", "config sentence_transformers.version"],
        ),
        ({"a_trainers_note": [1, 2]}, ["config a_trainers_note"]),
    ],
    ids=["unsloth", "sentence-transformers", "unknown"],
)
def test_settings_that_no_architecture_has_are_told_and_do_not_refuse(
    decoders: Folders, copy: Copy, edit_json: Edit, changes: dict[str, Any], subjects: list[str]
) -> None:
    expert = copy(decoders["nq"])
    edit_json(expert / "config.json", **changes)
    assert warned(decoders["base"], expert) == subjects
    assert warned(expert, decoders["base"]) == subjects


def with_dense(folder: Path, activation: str, **settings: Any) -> Path:
    """An encoder with a Dense behind its pooling, as sentence-transformers writes it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    model = SentenceTransformer(str(folder), device="cpu")
    dense = modules.Dense(32, 16, activation_function=getattr(torch.nn, activation)(), **settings)
    SentenceTransformer(modules=[model[0], model[1], dense], device="cpu").save(str(folder / "dense"))
    return folder / "dense"


def test_a_dense_module_with_another_activation(encoders: Folders, copy: Copy) -> None:
    base = with_dense(copy(encoders["base"], "base"), "Tanh")
    assert compare(base, with_dense(copy(encoders["quora"], "alike"), "Tanh")).problems == ()
    (found,) = compare(base, with_dense(copy(encoders["quora"], "other"), "Identity")).problems
    assert (found.subject, found.base, found.expert) == (
        "2_Dense/config.json activation_function",
        "'Tanh'",
        "'Identity'",
    )


def test_defaults_that_an_older_release_left_out(encoders: Folders, copy: Copy) -> None:
    base = with_dense(copy(encoders["base"], "base"), "Tanh")
    older = with_dense(copy(encoders["quora"], "older"), "Tanh")
    settings = {"in_features": 32, "out_features": 16, "bias": True}
    (older / "2_Dense" / "config.json").write_text(
        json.dumps(settings | {"activation_function": "torch.nn.modules.activation.Tanh"})
    )
    assert compare(base, older).problems == ()


def test_a_module_with_parameters_is_never_left_out(encoders: Folders, copy: Copy) -> None:
    base, expert = (with_dense(copy(encoders[name], name), "Tanh") for name in ("base", "quora"))
    content = (expert / "modules.json").read_text()
    (expert / "2_Dense").rename(expert / "2_Projection")
    (expert / "modules.json").write_text(content.replace("2_Dense", "2_Projection"))
    assert {f"tensor {folder}/linear.weight" for folder in ("2_Dense", "2_Projection")} < problems(base, expert).keys()
    (expert / "modules.json").unlink()
    found = problems(base, expert)
    assert found.keys() == {"tensor 2_Dense/linear.weight", "tensor 2_Dense/linear.bias"}
    assert "copy the base's modules.json" in found["tensor 2_Dense/linear.bias"].fix
    for name in ("1_Pooling", "2_Dense"):
        shutil.copytree(base / name, expert / name, dirs_exist_ok=True)
    shutil.copy(base / "modules.json", expert)
    assert problems(base, expert) == {}


def test_rerankers_with_other_chat_templates(tmp_path: Path) -> None:
    base, expert = (make_decoder_reranker(tmp_path / name) for name in ("base", "expert"))
    (expert / "chat_template.jinja").write_text("{{ messages[0].content }}? {{ messages[1].content }}")
    assert list(problems(base, expert)) == ["chat template"]
    assert (problems(expert, base), warned(expert, base)) == ({}, ["chat template"])
    shutil.copy(expert / "chat_template.jinja", base)
    assert (problems(base, expert), warned(base, expert)) == ({}, [])


class TestRemedies:
    """What a refusal advises is done here, and then nothing is refused."""

    def test_a_setting_that_training_did_not_use(self, decoders: Folders, copy: Copy, edit_json: Edit) -> None:
        expert = copy(decoders["nq"])
        edit_json(expert / "config.json", rms_norm_eps=1e-3)
        (found,) = compare(decoders["base"], expert).problems
        assert "write that into the expert's config.json" in found.fix
        edit_json(expert / "config.json", rms_norm_eps=float(found.base))
        assert compare(decoders["base"], expert).problems == ()

    def test_an_expert_saved_without_its_head(self, decoders: Folders, copy: Copy) -> None:
        from transformers import LlamaForCausalLM, LlamaModel

        expert = copy(decoders["nq"])
        whole = LlamaForCausalLM.from_pretrained(expert)
        (expert / WEIGHTS).unlink()
        LlamaModel.from_pretrained(decoders["nq"]).save_pretrained(expert)
        (found,) = compare(decoders["base"], expert).problems
        assert found.subject == "tensor lm_head.weight"
        assert "with the class of the base" in found.fix
        whole.save_pretrained(expert)
        assert compare(decoders["base"], expert).problems == ()

    def test_a_base_saved_without_its_head(self, decoders: Folders, copy: Copy) -> None:
        from transformers import LlamaForCausalLM

        base = copy(decoders["base"])
        rewrite(base, **{"lm_head.weight": None})
        (found,) = compare(base, decoders["nq"]).problems
        assert (found.subject, found.base) == ("tensor lm_head.weight", "none")
        assert "the base too, if it was saved without its head" in found.fix
        LlamaForCausalLM.from_pretrained(decoders["base"]).save_pretrained(base)
        assert compare(base, decoders["nq"]).problems == ()

    def test_a_resized_vocabulary(self, decoders: Folders, copy: Copy) -> None:
        from transformers import LlamaForCausalLM

        expert = copy(decoders["nq"])
        model = LlamaForCausalLM.from_pretrained(expert)
        model.resize_token_embeddings(328, mean_resizing=False)
        model.save_pretrained(expert)
        for found in compare(decoders["base"], expert).problems:
            assert "`model.resize_token_embeddings(320)`" in found.fix, found
        model.resize_token_embeddings(320)
        model.save_pretrained(expert)
        assert compare(decoders["base"], expert).problems == ()

    def test_another_tokenizer_beside_a_model_trained_with_the_bases(self, decoders: Folders, copy: Copy) -> None:
        expert = copy(decoders["nq"])
        tokenizer(expert, swap_two_ids)
        (found,) = compare(decoders["base"], expert).problems
        assert "save the base's tokenizer files beside it" in found.fix
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (expert / name).write_bytes((decoders["base"] / name).read_bytes())
        assert compare(decoders["base"], expert).problems == ()

    def test_integers_where_the_base_has_floats(self, decoders: Folders, copy: Copy) -> None:
        expert = copy(decoders["nq"])
        rewrite(expert, **{"model.norm.weight": torch.ones(64, dtype=torch.int64)})
        (found,) = compare(decoders["base"], expert).problems
        assert "store it in the same kind of dtype" in found.fix
        rewrite(expert, **{"model.norm.weight": torch.ones(64)})
        assert compare(decoders["base"], expert).problems == ()
