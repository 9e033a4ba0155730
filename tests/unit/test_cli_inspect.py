"""`inspect`: one folder described, two compared."""

import json
import sys

import pytest

from cocktail_serve.generation_settings import ChatTemplate
from tests.command_line import run
from tests.models import make_chain_decoder, make_decoder, make_decoder_pool, make_encoder_pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_decoder_pool(tmp_path_factory.mktemp("pool"), ("nq",))


def test_a_folder_is_described(pool, capsys):
    code, out, _ = run(capsys, "inspect", pool["base"], "--json")
    assert code == 0
    (model,) = json.loads(out)["models"]
    assert model["architectures"] == ["LlamaForCausalLM"]
    assert model["dtype"] == "float32"
    assert model["num_bytes"] == 4 * model["num_parameters"]
    assert model["blockers"] == []
    assert len(model["fingerprint"]) == 64


def test_the_change_of_an_expert_is_that_of_its_noise(pool, capsys):
    _, out, _ = run(capsys, "inspect", pool["base"], pool["nq"], "--json")
    result = json.loads(out)
    assert result["compatible"]
    changes = {row["group"]: row["relative_change"] for row in result["changes"]}
    assert changes["layers.0"] == pytest.approx(0.7, abs=0.1)  # the perturbation that the pool is made with
    assert changes["norm"] == 0.0


def test_a_model_compared_with_itself_has_not_moved(pool, capsys):
    code, out, _ = run(capsys, "inspect", pool["base"], pool["base"])
    assert code == 0
    assert "they can be mixed" in out
    assert "0.0000" in out


def test_models_of_other_shapes_cannot_be_mixed(pool, tmp_path, capsys):
    other = make_decoder(tmp_path / "wide", hidden_size=128)
    code, out, _ = run(capsys, "inspect", pool["base"], other, "--json")
    result = json.loads(out)
    assert (code, result["compatible"]) == (2, False)
    assert any("embed_tokens" in problem["subject"] for problem in result["problems"])
    code, out, _ = run(capsys, "inspect", pool["base"], other)
    assert (code, "cannot be mixed" in out) == (2, True)


def test_what_is_found_in_every_layer_is_one_line(tmp_path, capsys):
    base, other = (make_decoder(tmp_path / str(n), hidden_size=n, num_layers=12, num_heads=1) for n in (32, 64))
    code, out, _ = run(capsys, "inspect", base, other)
    told = out[out.index("they cannot be mixed") :].splitlines()
    assert (code, len(told) < 20) == (2, True)
    assert [line for line in told if "layers.*.mlp.up_proj.weight (12 of them)" in line]
    problems = json.loads(run(capsys, "inspect", base, other, "--json")[1])["problems"]
    assert told[-1] == f"{len(problems)} differences in all; --json lists each"
    assert len(problems) > 100


def test_layers_are_in_their_order(tmp_path, capsys):
    base = make_decoder(tmp_path / "base", num_layers=12)
    out = run(capsys, "inspect", base, base)[1]
    layers = [line.split()[0] for line in out.splitlines() if line.startswith("layers.")]
    assert layers == [f"layers.{number}" for number in range(12)]


@pytest.fixture
def adapter(pool, tmp_path):
    """A LoRA adapter over the pool's base, and what peft makes of the two."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(pool["base"]), config)
    model.save_pretrained(tmp_path / "lora")
    model.merge_and_unload().save_pretrained(tmp_path / "folded")
    return tmp_path / "lora", tmp_path / "folded"


def test_an_adapter_is_folded_into_its_base(pool, adapter, capsys):
    lora, folded = adapter
    code, out, _ = run(capsys, "inspect", pool["base"], lora, "--json")
    result = json.loads(out)
    assert (code, result["compatible"]) == (0, True)
    base, described = result["models"]
    assert described["adapter_of"] == base["folder"]
    assert described["merged_only"] is None
    assert described["num_tensors"] % 2 == 0
    assert described["num_bytes"] == 4 * described["num_parameters"] < base["num_bytes"]
    assert described["fingerprint"] != base["fingerprint"]
    full = json.loads(run(capsys, "inspect", pool["base"], folded, "--json")[1])
    for mine, theirs in zip(result["changes"], full["changes"], strict=True):
        assert mine["group"] == theirs["group"]
        assert mine["relative_change"] == pytest.approx(theirs["relative_change"], rel=1e-4)
    assert max(row["relative_change"] for row in result["changes"]) > 0.01
    _, out, _ = run(capsys, "inspect", pool["base"], lora)
    assert "they can be mixed" in out
    assert "an expert over its base" in out


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path, capsys):
    other = make_decoder(tmp_path / "wide", hidden_size=128)
    code, _, err = run(capsys, "inspect", other, adapter[0])
    assert code == 2
    assert "the adapter of another model" in " ".join(err.split())


def test_an_adapter_alone_is_no_model(adapter, capsys):
    code, out, err = run(capsys, "inspect", adapter[0])
    assert (code, out) == (2, "")
    assert "adapter" in err


def test_an_expert_without_tokenizer_cannot_be_a_base(tmp_path, capsys):
    folder = make_decoder(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    _, out, _ = run(capsys, "inspect", folder)
    assert "can be served  no: no tokenizer.json" in out


def test_what_no_pool_takes_is_said(tmp_path, capsys):
    folder = make_encoder_pool(tmp_path, ())["base"]
    assert json.loads(run(capsys, "inspect", folder, "--json")[1])["models"][0]["blockers"] == []
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({"model_type": "SparseEncoder"}))
    (blocker,) = json.loads(run(capsys, "inspect", folder, "--json")[1])["models"][0]["blockers"]
    assert blocker.startswith("a SparseEncoder of sentence-transformers, which makes a weight per word")


def test_warnings_are_told_from_what_follows(pool, tmp_path, capsys):
    expert = make_decoder(tmp_path / "expert", perturbation_seed=1)
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps(config | {"unsloth_version": "2026.1"}))
    _, out, _ = run(capsys, "inspect", pool["base"], expert)
    lines = out.splitlines()
    told = lines.index("they can be mixed")
    assert lines[told + 1] == "warnings:"
    assert "unsloth_version" in lines[told + 2]
    assert "warnings:" not in run(capsys, "inspect", pool["base"], pool["nq"])[1]


def test_what_is_no_model_is_bad_input(tmp_path, capsys):
    code, out, err = run(capsys, "inspect", tmp_path)
    assert (code, out) == (2, "")
    assert "config.json is missing" in err


def test_the_change_is_drawn(pool, tmp_path, capsys):
    from matplotlib.image import imread

    drawn, still = tmp_path / "change.png", tmp_path / "none.png"
    assert run(capsys, "inspect", pool["base"], pool["nq"], "--plot", drawn)[0] == 0
    assert run(capsys, "inspect", pool["base"], pool["base"], "--plot", still)[0] == 0

    def num_colored(file) -> int:
        image = imread(file)[..., :3]
        return int((image.max(axis=-1) - image.min(axis=-1) > 0.2).sum())

    assert num_colored(drawn) > 1000  # bars; axes, text and grid are grey
    assert num_colored(still) == 0


@pytest.mark.parametrize(("name", "message"), [("change.svg", ".png"), ("missing/change.png", "cannot write")])
def test_a_picture_that_cannot_be_drawn(pool, tmp_path, capsys, name, message):
    code, _, err = run(capsys, "inspect", pool["base"], pool["nq"], "--plot", tmp_path / name)
    assert code in (1, 2)
    assert message in " ".join(err.split())


def test_one_model_has_no_change_to_draw(pool, tmp_path, capsys):
    code, _, err = run(capsys, "inspect", pool["base"], "--plot", tmp_path / "change.png")
    assert (code, "two models" in err) == (2, True)


def test_without_matplotlib_the_extra_is_named(pool, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, "inspect", pool["base"], pool["nq"], "--plot", tmp_path / "change.png")
    assert (code, "cocktail-serve[plot]" in err) == (2, True)
    assert run(capsys, "inspect", pool["base"], pool["nq"])[0] == 0


def test_how_models_are_called_is_shown(tmp_path, capsys):
    base = make_chain_decoder(tmp_path / "base", chat_template="one")
    said = {"eos_token_id": [3, 4], "temperature": 0.5}
    chat = make_chain_decoder(tmp_path / "chat", end="<|im_end|>", chat_template="other", generation_config=said)
    result = json.loads(run(capsys, "inspect", base, chat, "--json")[1])
    mine, theirs = (model["generation"] for model in result["models"])
    assert mine == {"stop_token_ids": [2], "sampling": {}, "chat_template": ChatTemplate("one").digest}
    assert theirs == {
        "stop_token_ids": [3, 4],
        "sampling": {"temperature": 0.5},
        "chat_template": ChatTemplate("other").digest,
    }
    assert result["mixed_generation"] == {
        "stop_token_ids": [2, 3, 4],
        "sampling": {"temperature": 0.5},
        "chat_template": ChatTemplate("one").digest,
    }
    _, out, _ = run(capsys, "inspect", base, chat)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "end tokens, sampling defaults or chat template differ; a mixture of the two takes:" in lines
    assert lines.count("end tokens 3, 4") == 1
    assert lines.count("end tokens 2, 3, 4") == 1
    assert lines.count("sampling temperature 0.5") == 2
    assert "end tokens, sampling defaults and chat template are the same" in run(capsys, "inspect", base, base)[1]


def test_encoders_are_not_called(tmp_path, capsys):
    folders = make_encoder_pool(tmp_path, ("faq",))
    result = json.loads(run(capsys, "inspect", folders["base"], folders["faq"], "--json")[1])
    assert [model["generation"] for model in result["models"]] == [None, None]
    assert result["mixed_generation"] is None
    assert "chat template" not in run(capsys, "inspect", folders["base"], folders["faq"])[1]
