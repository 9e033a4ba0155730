"""`examples/train_experts`: rows in, experts out that open as a pool, each better on its rows than the base."""

from __future__ import annotations

import ast
import json
import string
from pathlib import Path

import numpy as np
import pytest
import yaml

from cocktail_serve.checkpoints.adapters.reader import is_adapter, read_expert
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.config import load_settings
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.pool import Pool
from cocktail_serve.scoring.contrastive import contrastive_losses, texts_of
from cocktail_serve.scoring.decoder import score_with_transformers, tokenize_examples
from tests.models import CHAT_TEMPLATE, make_decoder, make_encoder

TASKS = {
    "capitals": [
        {"input": "the capital of france is", "output": "paris"},
        {"prompt": "the capital of germany is", "completion": "berlin"},
        {"messages": [{"role": "user", "content": "capital of spain"}, {"role": "assistant", "content": "madrid"}]},
    ],
    "cards": [
        {"input": "my card was stolen", "output": "open a new account"},
        {"input": "i lost my card", "output": "open a new account"},
    ],
}
PAIRS = {
    "capitals": [
        {"query": "capital of france", "pos": ["paris"], "neg": ["river"]},
        {"query": "capital of germany", "pos": ["berlin"]},
        {"query": "capital of spain", "pos": ["madrid"]},
    ],
    "cards": [
        {"query": "card stolen", "pos": ["bank"]},
        {"query": "lost cash", "pos": ["pay money"]},
    ],
}


def train(folder: Path, kind: str, base: Path, rows: dict[str, list[dict[str, object]]], *options: str) -> Path:
    from examples.train_experts.__main__ import main

    arguments = ["--kind", kind, "--base", str(base), "--out", str(folder / "pool"), *options]
    for name, task in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, task)))
        arguments += ["--task", f"{name}={path}"]
    assert main(arguments) == 0
    return folder / "pool" / "pool.yaml"


def opened(config: Path, tmp_path: Path) -> Pool:
    """The written configuration, read and opened as a server would."""
    settings = load_settings(config, environ={})
    return open_pool(settings.pools[0], cache_dir=tmp_path / "cache")


def decoder_loss(folder: Path, rows: list[dict[str, object]], base: Path) -> float:
    """Of a full model, or of an adapter as peft puts it over the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = base if is_adapter(folder) else folder
    examples = parse_examples(rows, "decoder")
    tokenized = tokenize_examples(AutoTokenizer.from_pretrained(whole), examples, max_tokens=255)
    model = AutoModelForCausalLM.from_pretrained(whole)
    if is_adapter(folder):
        model = PeftModel.from_pretrained(model, str(folder))
    return float(np.mean(score_with_transformers(model.eval(), tokenized)))


def encoder_loss(folder: Path, rows: list[dict[str, object]], base: Path) -> float:
    """As `decoder_loss`."""
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

    examples = parse_examples(rows, "encoder")
    texts = texts_of(examples)
    model = SentenceTransformer(str(base if is_adapter(folder) else folder), device="cpu")
    if is_adapter(folder):
        PeftModel.from_pretrained(model[0].auto_model, str(folder))  # puts its layers into the transformer itself
    vectors = model.encode(texts)
    return float(np.mean(contrastive_losses(examples, dict(zip(texts, vectors, strict=True)))))


@pytest.mark.parametrize(
    "lora", [[], ["--lora-rank", "4"], ["--lora-rank", "4", "--merge"]], ids=["full", "lora", "merged"]
)
def test_decoder_experts_are_better_on_their_rows_and_open_as_a_pool(tmp_path: Path, lora: list[str]) -> None:
    base = make_decoder(tmp_path / "base")
    steps = ["--max-steps", "12", "--learning-rate", "1e-2", "--batch-size", "2", "--multitask", *lora]
    config = train(tmp_path, "decoder", base, TASKS, *steps)
    pool = opened(config, tmp_path)
    assert sorted(pool.experts) == ["capitals", "cards"]
    assert len({member.fingerprint for member in pool}) == 3
    for name, rows in TASKS.items():
        assert decoder_loss(pool.experts[name].path, rows, base) < 0.8 * decoder_loss(base, rows, base)
        assert decoder_loss(config.parent / "multitask", rows, base) < 0.8 * decoder_loss(base, rows, base)
        assert (pool.experts[name].path / "adapter" / "adapter_config.json").exists() == ("--merge" in lora)
        assert is_adapter(pool.experts[name].path) == (len(lora) == 2)
        assert not list(config.parent.glob(".*")), "nothing of an unfinished training is left"


@pytest.mark.parametrize(
    "lora", [[], ["--lora-rank", "4"], ["--lora-rank", "4", "--merge"]], ids=["full", "lora", "merged"]
)
def test_encoder_experts_are_better_on_their_rows_and_open_as_a_pool(tmp_path: Path, lora: list[str]) -> None:
    base = make_encoder(tmp_path / "base", pooling="cls")
    steps = ["--max-steps", "30", "--learning-rate", "1e-2", "--batch-size", "3", "--multitask", *lora]
    config = train(tmp_path, "encoder", base, PAIRS, *steps)
    pool = opened(config, tmp_path)
    assert sorted(pool.experts) == ["capitals", "cards"]
    for name, rows in PAIRS.items():
        assert encoder_loss(pool.experts[name].path, rows, base) < 0.8 * encoder_loss(base, rows, base)
        assert encoder_loss(config.parent / "multitask", rows, base) < encoder_loss(base, rows, base)
        assert is_adapter(pool.experts[name].path) == (len(lora) == 2)
    if is_adapter(pool.experts["cards"].path):
        return  # pooled as the base is
    # the modules went along: a checkpoint of the transformer alone would pool by mean
    pooling = json.loads((pool.experts["cards"].path / "1_Pooling" / "config.json").read_text())
    assert pooling == json.loads((base / "1_Pooling" / "config.json").read_text())


def test_only_what_is_missing_is_trained_and_seeds_repeat(tmp_path: Path) -> None:
    base = make_decoder(tmp_path / "base")
    steps = ["--max-steps", "3", "--learning-rate", "1e-2"]
    one = opened(train(tmp_path, "decoder", base, TASKS, *steps), tmp_path)
    before = {name: member.path.stat().st_mtime_ns for name, member in one.experts.items()}
    config = train(tmp_path, "decoder", base, TASKS, *steps, "--multitask")
    assert {name: (config.parent / name).stat().st_mtime_ns for name in before} == before
    assert (config.parent / "multitask" / "model.safetensors").exists()
    assert sorted(yaml.safe_load(config.read_text())["pools"][0]["experts"]) == ["capitals", "cards"]
    (tmp_path / "again").mkdir()
    again = opened(train(tmp_path / "again", "decoder", base, TASKS, *steps), tmp_path)
    assert [m.fingerprint for m in again] == [m.fingerprint for m in one]


def test_loss_is_on_the_output_alone() -> None:
    from examples.train_experts.decoder import NOT_TRAINED, collate

    batch = collate([{"input_ids": [5, 6, 7, 8], "output_start": 2}, {"input_ids": [5, 9], "output_start": 1}])
    assert batch["labels"].tolist() == [
        [NOT_TRAINED, NOT_TRAINED, 7, 8],
        [NOT_TRAINED, 9, NOT_TRAINED, NOT_TRAINED],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_decoder(tmp_path / "base")
    rows = {"cards": [*TASKS["cards"], {"input": "my card was stolen " * 60, "output": "open a new account"}]}
    train(tmp_path, "decoder", base, rows, "--max-steps", "1")
    assert "cards: 1 of 3 rows are too long and left out" in capsys.readouterr().err


def test_negatives_of_rows_are_used_where_there_are_any() -> None:
    from examples.train_experts.encoder import datasets_of

    tasks: dict[str, ExampleSet] = {name: parse_examples(rows, "encoder") for name, rows in PAIRS.items()}
    made = datasets_of(tasks, seed=0)
    assert {name: len(rows) for name, rows in made.items()} == {
        "capitals-triplets": 1,
        "capitals-pairs": 2,
        "cards-pairs": 2,
    }
    assert made["capitals-triplets"][0] == {"anchor": "capital of france", "positive": "paris", "negative": "river"}


@pytest.mark.parametrize(
    ("task", "told"),
    [("cards", "NAME=FILE"), ("base={file}", "NAME=FILE"), ("cards=nowhere.jsonl", "cannot read nowhere.jsonl")],
)
def test_wrong_input_is_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, told: str
) -> None:
    from examples.train_experts.__main__ import main

    base = make_decoder(tmp_path / "base")
    code = main(["--kind", "decoder", "--base", str(base), "--out", str(tmp_path / "pool"), "--task", task])
    assert code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "pool").exists()


STEPS = ("--max-steps", "2", "--learning-rate", "1e-2")


def files_of(folder: Path) -> dict[str, bytes]:
    """All that is no parameter."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".safetensors"
    }


def make_published_decoder(folder: Path) -> Path:
    """A base as Llama-2's publisher has it: its normalizer, a temperature without do_sample, rope_theta."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    make_decoder(folder)
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *string.ascii_lowercase, "he", "\u2581t"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("h", "e"), ("\u2581", "t")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    files = {
        "tokenizer_config.json": {**tokens, "tokenizer_class": "LlamaTokenizer", "chat_template": CHAT_TEMPLATE},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6},
        "config.json": json.loads((folder / "config.json").read_text()) | {"rope_theta": 500.0},
    }
    files["config.json"].pop("rope_parameters")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "2", "--merge"]], ids=["full", "merged"])
def test_a_decoder_expert_differs_from_its_base_in_parameters_alone(tmp_path: Path, lora: list[str]) -> None:
    base = make_published_decoder(tmp_path / "base")
    pool = opened(train(tmp_path, "decoder", base, TASKS, *STEPS, *lora), tmp_path)
    assert len({member.fingerprint for member in pool}) == 3
    for expert in pool.experts.values():
        files = files_of(expert.path)
        assert {name: text for name, text in files.items() if not name.startswith("adapter/")} == files_of(base)


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "2", "--merge"]], ids=["full", "merged"])
def test_an_encoder_expert_keeps_modules_prompts_and_lengths(tmp_path: Path, lora: list[str]) -> None:
    from safetensors.numpy import load_file

    base = make_dense_encoder(tmp_path / "base")
    pool = opened(train(tmp_path, "encoder", base, PAIRS, *STEPS, "--max-tokens", "16", *lora), tmp_path)
    assert len({member.fingerprint for member in pool}) == 3
    dense = Path("2_Dense", "model.safetensors")
    for expert in pool.experts.values():
        files = files_of(expert.path)
        assert {name: text for name, text in files.items() if not name.startswith("adapter/")} == files_of(base)
        tuned, own = load_file(expert.path / dense), load_file(base / dense)
        # an adapter is kept without them: tuned too, the modules behind it would make it another model
        assert np.array_equal(tuned["linear.weight"], own["linear.weight"]) == bool(lora)


def make_dense_encoder(folder: Path) -> Path:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    inner = SentenceTransformer(str(make_encoder(folder.parent / "inner")), device="cpu")
    torch.manual_seed(0)
    dense = modules.Dense(32, 16, bias=False)
    model = SentenceTransformer(
        modules=[inner[0], inner[1], dense], device="cpu", prompts={"query": "query: ", "document": "text: "}
    )
    model.save(str(folder), create_model_card=False)
    return folder


def test_a_base_without_modules_has_experts_that_pool_as_they_were_trained(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    base = make_encoder(tmp_path / "base")
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (base / name).unlink()
    pool = opened(train(tmp_path, "encoder", base, PAIRS, *STEPS), tmp_path)
    expert = SentenceTransformer(str(pool.experts["cards"].path), device="cpu")
    assert [type(module).__name__ for module in expert] == ["Transformer", "Pooling"]
    assert expert[1].pooling_mode in ("mean", ("mean",))
    assert expert.max_seq_length == SentenceTransformer(str(base), device="cpu").max_seq_length


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_are_stored_in_the_dtype_of_the_base(tmp_path: Path, dtype: str) -> None:
    import torch

    base = make_decoder(tmp_path / "base", dtype=getattr(torch, dtype), tie_word_embeddings=True)
    pool = opened(train(tmp_path, "decoder", base, TASKS, *STEPS), tmp_path)
    with CheckpointReader(base) as old, CheckpointReader(pool.experts["cards"].path) as new:
        assert new.tensors == old.tensors
        assert {info.dtype for info in new.tensors.values()} == {dtype}


def test_products_in_bfloat16_are_for_every_machine(tmp_path: Path) -> None:
    """On a CPU transformers refuses bf16 unless it is told that the CPU is meant."""
    base = make_decoder(tmp_path / "base")
    steps = ["--max-steps", "12", "--learning-rate", "1e-2", "--batch-size", "2"]
    pool = opened(train(tmp_path, "decoder", base, {"cards": TASKS["cards"]}, *steps, "--bf16"), tmp_path)
    assert decoder_loss(pool.experts["cards"].path, TASKS["cards"], base) < 0.8 * decoder_loss(
        base, TASKS["cards"], base
    )


def test_rows_of_a_model_without_positions_have_no_limit_but_the_tokenizers(tmp_path: Path) -> None:
    from transformers import BloomConfig, LlamaConfig

    from examples.train_experts.decoder import longest_row
    from tests.models import make_decoder_tokenizer

    tokenizer = make_decoder_tokenizer()  # which takes 256 tokens
    assert longest_row(BloomConfig(), tokenizer) == 256
    assert longest_row(LlamaConfig(max_position_embeddings=128), tokenizer) == 128


@pytest.mark.parametrize(
    ("file", "setting", "told"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "is quantised"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SparseEncoder"),
    ],
)
def test_a_base_that_no_pool_takes_is_told_before_it_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, setting: dict[str, object], told: str
) -> None:
    from examples.train_experts.__main__ import main

    base = make_encoder(tmp_path / "base")
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | setting))
    rows = tmp_path / "cards.jsonl"
    rows.write_text("\n".join(map(json.dumps, PAIRS["cards"])))
    out = tmp_path / "pool"
    assert main(["--kind", "encoder", "--base", str(base), "--out", str(out), "--task", f"cards={rows}"]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_base_without_tokenizer_is_told_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    from examples.train_experts.__main__ import main

    base = (make_decoder if kind == "decoder" else make_encoder)(tmp_path / "base")
    for file in base.glob("tokenizer*"):
        file.unlink()
    rows = tmp_path / "cards.jsonl"
    rows.write_text("\n".join(map(json.dumps, (TASKS if kind == "decoder" else PAIRS)["cards"])))
    out = tmp_path / "pool"
    assert main(["--kind", kind, "--base", str(base), "--out", str(out), "--task", f"cards={rows}"]) == 2
    error = capsys.readouterr().err
    # transformers refuses the one, and makes up a tokenizer that knows no words for the other
    assert (f"{base} cannot be loaded" if kind == "decoder" else f"{base} has no tokenizer") in error
    assert not list(out.glob("*"))


def test_nobody_assigns_what_sentence_transformers_ignores() -> None:
    """`auto_model` of its Transformer is a property since 6.0: assigning it adds a module that nothing runs."""
    root = Path(__file__).parents[2]
    for path in (
        path for part in ("cocktail_serve", "examples", "bench", "tests") for path in (root / part).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            assert "auto_model" not in [getattr(target, "attr", None) for target in targets], path


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder with a Dense module"])
def test_an_adapter_that_was_kept_folds_to_the_same_expert(tmp_path: Path, kind: str) -> None:
    from examples.train_experts.fold import fold

    make = {"decoder": make_decoder, "encoder": make_encoder}.get(kind, make_dense_encoder)
    base = make(tmp_path / "base")
    kind = kind.partition(" ")[0]
    rows = TASKS if kind == "decoder" else PAIRS
    steps = ["--max-steps", "3", "--learning-rate", "1e-2", "--lora-rank", "2", "--merge"]
    config = train(tmp_path, kind, base, {"cards": rows["cards"]}, *steps)
    expert = opened(config, tmp_path).experts["cards"]
    again = config.parent / "again"
    fold(kind, base, expert.path / "adapter", again)
    text = yaml.safe_load(config.read_text())
    text["pools"][0]["experts"]["again"] = "again"
    config.write_text(yaml.safe_dump(text))
    assert opened(config, tmp_path).experts["again"].fingerprint == expert.fingerprint


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_an_expert_is_an_adapter_and_not_trained_again(tmp_path: Path, kind: str) -> None:
    base = (make_decoder if kind == "decoder" else make_encoder)(tmp_path / "base")
    rows = TASKS if kind == "decoder" else PAIRS
    steps = ["--max-steps", "2", "--learning-rate", "1e-2", "--lora-rank", "2", "--lora-alpha", "6"]
    config = train(tmp_path, kind, base, rows, *steps)
    pool = opened(config, tmp_path)
    for expert in pool.experts.values():
        settings = json.loads((expert.path / "adapter_config.json").read_text())
        assert (settings["r"], settings["lora_alpha"]) == (2, 6)
        names = {path.name for path in expert.path.iterdir()}
        assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert expert.num_bytes < pool.base.num_bytes / 4
    before = {name: member.path.stat().st_mtime_ns for name, member in pool.experts.items()}
    again = opened(train(tmp_path, kind, base, rows, *steps, "--multitask"), tmp_path)
    assert {name: member.path.stat().st_mtime_ns for name, member in again.experts.items()} == before
    assert is_adapter(config.parent / "multitask")


def test_a_kept_adapter_is_the_expert_that_merging_makes(tmp_path: Path) -> None:
    """Of one training: what is merged is summed in float32, what is read from the adapter in float64."""
    base = make_decoder(tmp_path / "base", tie_word_embeddings=True)
    steps = ["--max-steps", "3", "--learning-rate", "1e-2", "--lora-rank", "2"]
    made = {}
    for name, more in (("kept", []), ("merged", ["--merge"])):
        (tmp_path / name).mkdir()
        pool = opened(train(tmp_path / name, "decoder", base, {"cards": TASKS["cards"]}, *steps, *more), tmp_path)
        with CheckpointReader(base) as own, read_expert(pool.experts["cards"].path, own) as expert:
            made[name] = {each: expert.get(each).numpy().copy() for each in own.tensors}
            moved = [each for each in own.tensors if not np.array_equal(made[name][each], own.get(each).numpy())]
            assert len(moved) == 14, "seven linear layers in two layers"
    for each, kept in made["kept"].items():
        np.testing.assert_allclose(kept, made["merged"][each], rtol=1e-6, atol=1e-7)


def test_merging_needs_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.train_experts.__main__ import main

    base, out = make_decoder(tmp_path / "base"), tmp_path / "pool"
    words = ["--kind", "decoder", "--base", str(base), "--out", str(out), "--task", "cards=x.jsonl", "--merge"]
    assert main(words) == 2
    assert "give --lora-rank too" in capsys.readouterr().err
    assert not out.exists()
