"""`extract`: full experts as adapters that peft loads, with errors that hold, and a pool of them that opens."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cocktail_serve.checkpoints.adapters.reader import is_adapter
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import load_settings
from cocktail_serve.offline import extraction
from cocktail_serve.offline.extraction import extract_adapter
from cocktail_serve.pool import Member
from tests.adapters import parameters_of, train_adapter
from tests.command_line import answer, exit_code, run
from tests.models import make_decoder_pool, make_encoder_pool, pool_section

ROWS = [
    {"input": "the capital of france is", "output": "paris"},
    {"input": "my card was stolen", "output": "open a bank account"},
    {"input": "the film was", "output": "a joy"},
]
RANK = 4


def edit_parameters(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def move_vectors(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 0.05 * torch.arange(tensor.numel()) / tensor.numel() if tensor.ndim == 1 else tensor


def write_config(folder: Path, folders: Mapping[str, Path], kind: str = "decoder", **engine: Any) -> Path:
    settings = {"type": "fake" if kind == "decoder" else "sentence_transformers", **engine}
    path = folder / "config.yaml"
    section = pool_section("flan", kind, folders, settings, max_examples=50)
    path.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": [section]}))
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`ag-news` differs in its norms, too; `nq` has the base's embeddings and its second layer."""
    made = make_decoder_pool(tmp_path_factory.mktemp("pool"), tied=request.param)
    edit_parameters(made["ag-news"], move_vectors)
    own = load_file(made["base"] / "model.safetensors")
    edit_parameters(made["nq"], lambda name, tensor: tensor if "layers.0" in name else own[name])
    return made


@pytest.fixture(scope="module")
def config(folders: dict[str, Path]) -> Path:
    return write_config(folders["base"].parent, folders, max_model_len=64)


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture
def extracted(config: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    words = ("--pool", "flan", "--rank", RANK, "--out", tmp_path / "adapters", "--examples", examples)
    told: dict[str, Any] = answer(capsys, "extract", config, *words)
    return told


def difference(expert: Path, base: Path) -> dict[str, torch.Tensor]:
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (base, expert))
    return {name: theirs[name].double() - mine[name].double() for name in mine}


def test_each_layer_loses_what_the_exact_decomposition_loses(
    extracted: dict[str, Any], folders: dict[str, Path]
) -> None:
    for name, told in extracted["experts"].items():
        wanted = difference(folders[name], folders["base"])
        layers = {layer["name"]: layer for layer in told["layers"]}
        assert layers.keys() == {each for each, delta in wanted.items() if delta.ndim == 2 and delta.any()}
        for each, layer in layers.items():
            values = torch.linalg.svdvals(wanted[each])
            exact = (values[RANK:].square().sum() / values.square().sum()).sqrt().item()
            assert layer["relative_error"] == pytest.approx(exact, rel=2e-3)
            assert layer["relative_error"] >= exact * (1 - 1e-6)
            assert (layer["rank"], layer["shape"]) == (RANK, list(wanted[each].shape))
            assert layer["difference"] == pytest.approx(wanted[each].norm().item(), rel=1e-5)
            assert layer["kind"] == ("embedding" if "embed" in each else "linear")


def test_the_errors_that_are_told_are_those_of_the_adapter_that_is_written(
    extracted: dict[str, Any], folders: dict[str, Path]
) -> None:
    for name, told in extracted["experts"].items():
        expert = load_file(folders[name] / "model.safetensors")
        wanted = difference(folders[name], folders["base"])
        made = parameters_of(Path(extracted["out"]) / name, folders["base"])
        assert made.keys() == expert.keys()
        lacking = {each: (made[each].double() - tensor.double()).norm().item() for each, tensor in expert.items()}
        whole = math.hypot(*(delta.norm().item() for delta in wanted.values()))
        assert told["relative_error"] == pytest.approx(math.hypot(*lacking.values()) / whole, rel=1e-4)
        assert told["relative_error_at"][str(RANK)] == pytest.approx(told["relative_error"], rel=1e-4)
        for layer in told["layers"]:
            norm = wanted[layer["name"]].norm().item()
            assert layer["relative_error"] == pytest.approx(lacking[layer["name"]] / norm, rel=1e-4)
        vectors = {each for each, delta in wanted.items() if delta.ndim == 1 and delta.any()}
        assert {each["name"] for each in told["lost"]} == vectors
        lost = math.hypot(*(wanted[each].norm().item() for each in vectors))
        assert told["lost_share"] == pytest.approx((lost / whole) ** 2, rel=1e-4)
        assert bool(vectors) == (name == "ag-news")


def test_lower_ranks_lose_what_extracting_them_would(
    extracted: dict[str, Any], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lower"
    lower = answer(capsys, "extract", config, "--pool", "flan", "--rank", 2, "--out", out)
    for name, told in lower["experts"].items():
        assert list(extracted["experts"][name]["relative_error_at"]) == ["1", "2", "4"]
        assert extracted["experts"][name]["relative_error_at"]["2"] == pytest.approx(told["relative_error"], rel=1e-3)


def test_peft_loads_the_adapters_and_computes_the_same(extracted: dict[str, Any], folders: dict[str, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    for name in ("ag-news", "nq"):
        folder = Path(extracted["out"]) / name
        reference = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32).eval()
        reference.load_state_dict(parameters_of(folder, folders["base"]), strict=False)
        base = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of layers that one of configuration and file lacks
            model = PeftModel.from_pretrained(base, str(folder)).eval()
        held = load_file(folder / "adapter_model.safetensors")
        taken = {each.replace(".default", "") for each, _ in model.named_parameters() if "lora_" in each}
        assert {each.removesuffix(".weight") for each in taken} == {each.removesuffix(".weight") for each in held}
        with torch.inference_mode():
            with model.disable_adapter():
                assert not torch.allclose(model(ids).logits, reference(ids).logits, atol=0.1)
            torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)


def test_losses_are_those_of_weigh(
    extracted: dict[str, Any], config: Path, examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = answer(capsys, "weigh", config, "--pool", "flan", "--examples", examples)["losses"]
    after = answer(capsys, "weigh", extracted["pool_file"], "--pool", "flan", "--examples", examples)["losses"]
    assert extracted["num_examples"] == len(ROWS)
    assert extracted["base_loss"] == pytest.approx(before["base"], rel=1e-6)
    assert before["base"] == pytest.approx(after["base"], rel=1e-6)
    for name, told in extracted["experts"].items():
        assert (told["loss"], told["adapter_loss"]) == pytest.approx((before[name], after[name]), rel=1e-5)
        assert before[name] != pytest.approx(after[name], rel=1e-3)


def test_the_pool_file_is_ready_for_doctor(
    extracted: dict[str, Any], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, "doctor", extracted["pool_file"], "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert checks["pool flan"]["status"] == "ok", checks
    before, after = (
        load_settings(config, environ={}).pools[0],
        load_settings(extracted["pool_file"], environ={}).pools[0],
    )
    assert after.model_copy(update={"experts": before.experts}) == before
    pool = open_pool(after, cache_dir=tmp_path / "cache")
    assert all(is_adapter(member.path) for member in pool.experts.values())
    assert pool.merged_only is None, "that is what adapters are extracted for"
    kept = json.loads((Path(extracted["out"]) / "extraction.json").read_text())
    assert kept == {name: value for name, value in extracted.items() if name != "seconds"}
    card = (Path(extracted["out"]) / "nq" / "README.md").read_text()
    assert "cut out of the full expert `nq` of the pool `flan`" in card
    assert open_pool(before, cache_dir=tmp_path / "cache").experts["nq"].fingerprint[:12] in card
    assert "--rank 4" in card


def test_at_full_rank_an_adapter_is_its_expert(
    config: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, "extract", config, "--pool", "flan", "--rank", 500, "--out", tmp_path / "adapters")
    made = parameters_of(tmp_path / "adapters" / "nq", folders["base"])
    for name, tensor in load_file(folders["nq"] / "model.safetensors").items():
        torch.testing.assert_close(made[name], tensor, rtol=1e-5, atol=1e-5)
    assert told["experts"]["nq"]["relative_error"] < 1e-5
    settings = json.loads((tmp_path / "adapters" / "nq" / "adapter_config.json").read_text())
    # the layers are 64 or 128 wide: ranks are true, and every scaling stays 1
    assert set(settings["rank_pattern"].values()) == {64}
    assert settings["rank_pattern"] == settings["alpha_pattern"]
    assert {layer["rank"] for layer in told["experts"]["nq"]["layers"]} == {64}


def test_an_expert_of_low_rank_gets_no_more_than_it_has(tmp_path: Path) -> None:
    folders = make_decoder_pool(tmp_path / "pool", ("nq",))
    generator = torch.Generator().manual_seed(0)

    def whole_numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    # so that sums and differences are exact
    edit_parameters(folders["base"], lambda name, own: whole_numbers(*own.shape) if "q_proj" in name else own)
    own = load_file(folders["base"] / "model.safetensors")
    edit_parameters(
        folders["nq"],
        lambda name, _: own[name] + whole_numbers(64, 2) @ whole_numbers(2, 64) if "q_proj" in name else own[name],
    )
    base, expert = (Member(name, folders[name], "", "float32", 0) for name in ("base", "nq"))
    found = extract_adapter(base, expert, tmp_path / "adapter", rank=16, source="base")
    assert {layer.rank for layer in found.layers} == {2}
    assert found.relative_error < 1e-5


def test_the_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(vocab_size=320, n_embd=48, n_layer=2, n_head=2, n_positions=64)
    for seed, name in enumerate(("base", "nq")):
        torch.manual_seed(seed)
        GPT2LMHeadModel(settings).save_pretrained(tmp_path / name)
    base, expert = (Member(name, tmp_path / name, "", "float32", 0) for name in ("base", "nq"))
    found = extract_adapter(base, expert, tmp_path / "adapter", rank=8, source="base")
    assert {layer.kind for layer in found.layers} == {"conv1d", "embedding"}
    made, wanted = (
        parameters_of(tmp_path / "adapter", tmp_path / "base"),
        load_file(tmp_path / "nq" / "model.safetensors"),
    )
    for layer in found.layers:
        error = (made[layer.name].double() - wanted[layer.name].double()).norm().item()
        assert error == pytest.approx(layer.error, rel=1e-4)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    reference.load_state_dict(made, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)


def test_adapters_pass_through_and_experts_are_called_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = make_decoder_pool(tmp_path / "pool", ("nq",), dtype=torch.bfloat16)
    train_adapter(folders["base"], tmp_path / "pool" / "lora")
    (folders["nq"] / "chat_template.jinja").write_text("{{ messages }}")
    (folders["nq"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.3}))
    config = write_config(tmp_path, {**folders, "lora": tmp_path / "pool" / "lora"}, mode="merged")
    code, out, _ = run(capsys, "extract", config, "--pool", "flan", "--rank", 2, "--out", tmp_path / "out")
    assert code == 0
    assert "adapters already, named as they are: lora" in " ".join(out.split())
    after = load_settings(tmp_path / "out" / "pool.yaml", environ={}).pools[0]
    assert after.experts["lora"].path == str(tmp_path / "pool" / "lora")
    assert after.engine.mode is None, "merged was for full experts"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["extraction.json", "nq", "pool.yaml"]
    before = open_pool(load_settings(config, environ={}).pools[0], cache_dir=tmp_path / "cache")
    pool = open_pool(after, cache_dir=tmp_path / "cache")
    assert pool.experts["nq"].generation == before.experts["nq"].generation
    assert pool.experts["lora"].fingerprint == before.experts["lora"].fingerprint
    assert {t.dtype for t in load_file(tmp_path / "out" / "nq" / "adapter_model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--pool", "flam", "--rank", 2), "it has: flan"),
        (("--pool", "flan", "--rank", 0), "greater than or equal to 1"),
        (("--pool", "flan"), "--rank"),
        (("--pool", "flan", "--rank", 2, "--examples", "no-such-file.jsonl"), "no-such-file"),
    ],
)
def test_bad_input_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], told: str
) -> None:
    assert told in refusal_of(capsys, config, tmp_path / "out", *words)
    assert not list(tmp_path.iterdir())


def refusal_of(capsys: pytest.CaptureFixture[str], config: Path, out: Path, *words: object) -> str:
    code, shown, err = run(capsys, "extract", config, "--out", out, *words)
    assert (code, shown) == (2, ""), err
    return " ".join(err.replace("│", " ").split())


def test_examples_are_refused_before_anything_is_extracted(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "low_rank", lambda *args: pytest.fail("it was extracted"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input": "word " * 80, "output": "b"}))
    words = ("--pool", "flan", "--rank", 2, "--examples", path)
    assert "at most 63" in refusal_of(capsys, config, tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == [path]


def test_pools_without_full_decoders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoders = write_config(tmp_path, make_encoder_pool(tmp_path / "bge"), kind="encoder")
    words = ("--pool", "flan", "--rank", 2)
    assert "for decoders alone" in refusal_of(capsys, encoders, tmp_path / "out", *words)
    folders = make_decoder_pool(tmp_path / "pool", ())
    train_adapter(folders["base"], tmp_path / "lora")
    adapters = write_config(tmp_path, {**folders, "lora": tmp_path / "lora"})
    assert "adapters already" in refusal_of(capsys, adapters, tmp_path / "out", *words)
    own = load_file(folders["base"] / "model.safetensors")
    make_decoder_pool(tmp_path / "vectors", ("nq",))
    edit_parameters(tmp_path / "vectors" / "nq", lambda name, _: move_vectors(name, own[name]))
    vectors = write_config(tmp_path, {**folders, "nq": tmp_path / "vectors" / "nq"})
    told = refusal_of(capsys, vectors, tmp_path / "out", *words)
    assert "differs in model.layers.0.input_layernorm.weight" in told
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_overwritten(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").write_text("mine")
    assert "exists" in refusal_of(capsys, config, tmp_path, "--pool", "flan", "--rank", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 20:  # in the second expert
            assert list(tmp_path.rglob("adapter_model.safetensors")), "the first one is written"
            raise error
        return whole(*args)

    whole = extraction.low_rank
    monkeypatch.setattr(extraction, "low_rank", interrupted)
    code = exit_code("extract", config, "--pool", "flan", "--rank", 2, "--out", tmp_path / "new" / "out")
    assert code == (130 if error is KeyboardInterrupt else 1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cocktail_serve.checkpoints import folder

    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    code, _, err = run(capsys, "extract", config, "--pool", "flan", "--rank", 2, "--out", tmp_path / "out")
    assert (code, "the adapter needs" in err) == (1, True)
    assert not list(tmp_path.iterdir())


def test_what_is_shown(
    config: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "extract", config, "--pool", "flan", "--rank", 4, "--examples", examples)
    assert code == 0
    kept = json.loads((tmp_path / "flan-rank4" / "extraction.json").read_text())
    rows = [line.split() for line in out.splitlines()]
    told = kept["experts"]
    assert ["4", *(f"{told[name]['relative_error']:.3f}" for name in ("ag-news", "nq"))] in rows
    for name in ("ag-news", "nq"):
        row = next(row for row in rows if row[:1] == [name] and len(row) == 6)
        assert row[4:] == [f"{told[name]['loss']:.3f}", f"{told[name]['adapter_loss']:.3f}"]
    assert any(row[:1] == ["layers.1"] and len(row) == 2 for row in rows), "nq has the base's second layer"
    assert "ag-news: differs from the base in what LoRA cannot hold: input_layernorm.weight" in out
