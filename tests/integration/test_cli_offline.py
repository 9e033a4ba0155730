"""`weigh` and `mix`: the server's numbers and checks without a server."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.weighting.softmax import softmax_weights
from tests.command_line import refusal, run
from tests.merging import linear, merged
from tests.models import (
    make_decoder_pool,
    make_encoder_decoder_pool,
    make_encoder_pool,
    make_reranker_pool,
    pool_section,
)

DECODER_ROWS = [
    {"input": "the capital of france is", "output": "paris"},
    {
        "messages": [
            {"role": "user", "content": "my card was stolen"},
            {"role": "assistant", "content": "open a bank account"},
        ]
    },
]
TEXT_ROWS = [
    {"input": "the capital of france is", "output": "paris"},
    {"input": "my card was stolen", "output": "open a bank account"},
]
PAIR_ROWS = [
    {"query": "my card was stolen", "pos": ["card lost"], "neg": ["red fish", "good dog"]},
    {"query": "capital of france", "pos": ["paris"], "neg": ["berlin"]},
]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    decoders = make_decoder_pool(folder / "flan")
    encoders = make_encoder_pool(folder / "bge")
    rerankers = make_reranker_pool(folder / "ranker")
    encoder_decoders = make_encoder_decoder_pool(folder / "t5")
    path = folder / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "store": {"cache_dir": "cache"},
                "pools": [
                    pool_section("flan", "decoder", decoders, {"type": "vllm", "max_model_len": 64}),
                    pool_section("bge", "encoder", encoders, {"type": "sentence_transformers"}),
                    pool_section("ranker", "reranker", rerankers, {"type": "sentence_transformers"}),
                    pool_section("t5", "encoder_decoder", encoder_decoders, {"type": "offline"}),
                ],
            }
        )
    )
    return path


@pytest.fixture
def examples(tmp_path):
    def write(rows):
        path = tmp_path / "examples.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    return write


@pytest.mark.parametrize(
    ("pool", "rows"), [("flan", DECODER_ROWS), ("bge", PAIR_ROWS), ("ranker", PAIR_ROWS), ("t5", TEXT_ROWS)]
)
def test_weights_follow_from_the_losses(config, examples, capsys, pool, rows):
    code, out, _ = run(
        capsys, "weigh", config, "--pool", pool, "--examples", examples(rows), "--temperature", 0.5, "--json"
    )
    assert code == 0
    result = json.loads(out)
    assert next(iter(result["losses"])) == "base"
    assert len(set(result["losses"].values())) == 3
    assert result["merging_weights"] == pytest.approx(softmax_weights(result["losses"], temperature=0.5))
    assert result["num_examples"] == 2


def test_an_array_of_rows_is_as_good_as_lines(config, examples, tmp_path, capsys):
    array = tmp_path / "examples.json"
    array.write_text(json.dumps(PAIR_ROWS, indent=2))
    told = [
        json.loads(run(capsys, "weigh", config, "--pool", "ranker", "--examples", file, "--json")[1])["losses"]
        for file in (array, examples(PAIR_ROWS))
    ]
    assert told[0] == pytest.approx(told[1], rel=1e-4)  # passes are cut as threads come free


def test_the_decoders_losses_are_those_of_transformers(config, examples, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = {"input": "the film was", "output": "a joy"}
    _, out, _ = run(capsys, "weigh", config, "--pool", "flan", "--examples", examples([row]), "--json")
    folder = config.parent / "flan" / "nq"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("the film was").input_ids
    ids = [*tokenizer("the film was a joy").input_ids, tokenizer.eos_token_id]
    labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
    with torch.inference_mode():
        reference = model(torch.tensor([ids]), labels=labels).loss.item()
    assert json.loads(out)["losses"]["nq"] == pytest.approx(reference, rel=1e-5)


def test_the_rerankers_losses_are_those_of_cross_encoders(config, examples, capsys):
    from sentence_transformers import CrossEncoder

    row = PAIR_ROWS[0]
    _, out, _ = run(capsys, "weigh", config, "--pool", "ranker", "--examples", examples([row]), "--json")
    model = CrossEncoder(str(config.parent / "ranker" / "quora"), device="cpu", activation_fn=torch.nn.Identity())
    logits = model.predict([(row["query"], text) for text in (*row["pos"], *row["neg"])])
    reference = torch.nn.functional.cross_entropy(torch.from_numpy(logits)[None], torch.tensor([0])).item()
    assert json.loads(out)["losses"]["quora"] == pytest.approx(reference, rel=1e-4)


def test_the_encoder_decoders_losses_are_those_of_transformers(config, examples, capsys):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    _, out, _ = run(capsys, "weigh", config, "--pool", "t5", "--examples", examples(TEXT_ROWS), "--json")
    folder = config.parent / "t5" / "nq"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        losses = [
            model(**tokenizer(row["input"], text_target=row["output"], return_tensors="pt")).loss.item()
            for row in TEXT_ROWS
        ]
    assert json.loads(out)["losses"]["nq"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_search_chooses_what_a_search_by_hand_chooses(config, examples, capsys):
    """Leave one out, mixtures in float64 over transformers' own state dicts, losses by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [("the film was", "a joy"), ("the capital of france is", "paris"), ("the lazy dog", "jumps over the fox")]
    given = examples([{"input": source, "output": output} for source, output in rows])
    args = ("--pool", "flan", "--examples", given, "--weighting", "search", "--seed", 3, "--json")
    _, out, _ = run(capsys, "weigh", config, *args)
    result = json.loads(out)

    names = ["base", "ag-news", "nq"]
    tokenizer = AutoTokenizer.from_pretrained(config.parent / "flan" / "base")
    models = [AutoModelForCausalLM.from_pretrained(config.parent / "flan" / name) for name in names]
    states = [{key: value.double() for key, value in model.state_dict().items()} for model in models]

    def loss(weights, row):
        mixed = {key: sum(w * state[key] for w, state in zip(weights, states, strict=True)) for key in states[0]}
        models[0].load_state_dict({key: value.float() for key, value in mixed.items()})
        source, output = rows[row]
        prompt = tokenizer(source).input_ids
        ids = [*tokenizer(f"{source} {output}").input_ids, tokenizer.eos_token_id]
        assert ids[: len(prompt)] == prompt
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.inference_mode():
            return models[0](torch.tensor([ids]), labels=labels).loss.item()

    alone = torch.tensor([[loss(torch.eye(3)[model].tolist(), row) for row in range(3)] for model in range(3)])
    by_hand = {}
    for tau in (5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05):
        held_out = []
        for row in range(3):
            rest = [other for other in range(3) if other != row]
            weights = torch.softmax(-alone.double()[:, rest].mean(dim=1) / tau, dim=0)
            held_out.append(loss(weights.tolist(), row))
        by_hand[tau] = sum(held_out) / 3

    assert result["temperature"] == min(by_hand, key=by_hand.__getitem__)
    assert len(result["candidates"]) >= 5
    for candidate in result["candidates"]:
        assert candidate["loss"] == pytest.approx(by_hand[candidate["temperature"]], rel=1e-4)
    final = torch.softmax(-alone.double().mean(dim=1) / result["temperature"], dim=0)
    assert result["merging_weights"] == pytest.approx(dict(zip(names, final.tolist(), strict=True)), rel=1e-4)
    assert result["mixed_loss"] == pytest.approx(sum(loss(final.tolist(), row) for row in range(3)) / 3, rel=1e-4)


@pytest.mark.parametrize(("pool", "rows"), [("flan", DECODER_ROWS), ("bge", PAIR_ROWS)])
def test_blackbox_is_no_worse_than_the_base_and_the_same_each_time(config, examples, capsys, pool, rows):
    args = ("--pool", pool, "--examples", examples(rows), "--weighting", "blackbox", "--budget", 6, "--json")
    _, out, _ = run(capsys, "weigh", config, *args)
    result = json.loads(out)
    assert len(result["candidates"]) == 6
    assert result["candidates"][0]["merging_weights"]["base"] == 1.0
    (chosen,) = [candidate for candidate in result["candidates"] if candidate["chosen"]]
    assert chosen["merging_weights"] == result["merging_weights"]
    assert result["mixed_loss"] == pytest.approx(chosen["loss"], rel=1e-6)
    assert result["mixed_loss"] <= result["losses"]["base"] * (1 + 1e-9)
    _, again, _ = run(capsys, "weigh", config, *args)
    assert json.loads(again)["candidates"] == result["candidates"]


@pytest.mark.parametrize(("pool", "rows"), [("flan", DECODER_ROWS), ("bge", PAIR_ROWS)])
def test_learned_coefficients_lose_no_more_than_the_base_and_are_the_same_each_time(
    config, examples, capsys, pool, rows
):
    args = ("--pool", pool, "--examples", examples(rows), "--weighting", "gradient", "--json")
    _, out, _ = run(capsys, "weigh", config, *args)
    result = json.loads(out)
    base, best, start = result["candidates"][:3]
    assert base["merging_weights"]["base"] == 1.0
    assert base["loss"] == pytest.approx(result["losses"]["base"], rel=1e-6)
    assert sorted(best["merging_weights"].values()) == [0.0, 0.0, 1.0]
    assert start["temperature"] == result["temperature"] or result["temperature"] is None
    (chosen,) = [candidate for candidate in result["candidates"] if candidate["chosen"]]
    assert chosen["merging_weights"] == result["merging_weights"]
    assert chosen["loss"] == min(candidate["loss"] for candidate in result["candidates"])
    assert sum(chosen["merging_weights"].values()) == pytest.approx(1.0, abs=1e-9)
    _, again, _ = run(capsys, "weigh", config, *args)
    assert json.loads(again)["candidates"] == result["candidates"]


def test_the_candidates_of_a_search_are_shown(config, examples, capsys):
    _, out, _ = run(
        capsys, "weigh", config, "--pool", "bge", "--examples", examples(PAIR_ROWS), "--weighting", "search"
    )
    assert all(word in out for word in ("candidates", "tau", "0.05", "*", "loss of the mixture"))


def test_a_target_is_scored_but_not_weighed(config, examples, capsys):
    args = ("--pool", "flan", "--examples", examples(DECODER_ROWS), "--target", "nq", "--alpha", 0.25, "--json")
    _, out, _ = run(capsys, "weigh", config, *args)
    result = json.loads(out)
    assert result["merging_weights"]["nq"] == pytest.approx(0.25)
    assert sum(result["merging_weights"].values()) == pytest.approx(1.0)
    assert set(result["losses"]) == {"base", "ag-news", "nq"}


def test_the_table_names_every_model(config, examples, capsys):
    code, out, err = run(capsys, "weigh", config, "--pool", "bge", "--examples", examples(PAIR_ROWS))
    assert code == 0
    assert all(name in out for name in ("base", "hotpotqa", "quora", "█", "temperature 5"))
    assert "scoring" in err  # progress as plain lines, since this is no terminal


def test_a_mixture_is_the_weighted_sum_and_loads(config, tmp_path, capsys):
    out_folder = tmp_path / "new" / "mixed"
    args = ("--pool", "flan", "--weights", "base=0.25,ag-news=0.75", "--out", out_folder, "--json")
    code, out, _ = run(capsys, "mix", config, *args)
    assert code == 0
    result = json.loads(out)
    assert json.loads((out_folder / "recipe.json").read_text())["digest"] == result["recipe"]["digest"]
    pool = config.parent / "flan"
    with (
        CheckpointReader(pool / "base") as base,
        CheckpointReader(pool / "ag-news") as expert,
        CheckpointReader(out_folder) as mixed,
    ):
        for name in base.tensors:
            expected = 0.25 * base.get(name).double() + 0.75 * expert.get(name).double()
            torch.testing.assert_close(mixed.get(name).double(), expected, rtol=1e-6, atol=1e-7)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(out_folder)
    assert AutoTokenizer.from_pretrained(out_folder).chat_template


def test_a_mixture_by_another_method(config, tmp_path, capsys):
    out_folder, weights = tmp_path / "mixed", {"ag-news": 0.9, "nq": 0.4}
    method = ("--method", "ties", "--method-param", "density=0.3", "--method-param", "normalize=false")
    args = ("--pool", "flan", "--weights", "ag-news=0.9,nq=0.4", *method, "--out", out_folder, "--json")
    code, out, _ = run(capsys, "mix", config, *args)
    assert code == 0
    params = {"density": 0.3, "normalize": False, "lambda": 1.0}
    written = json.loads((out_folder / "recipe.json").read_text())["recipe"]
    assert (written["method"], written["method_params"]) == ("ties", params)
    assert json.loads(out)["recipe"].items() >= written.items()
    stored = {name: load_file(config.parent / "flan" / name / "model.safetensors") for name in ("base", *weights)}
    for name, tensor in load_file(out_folder / "model.safetensors").items():
        arrays = {model: tensors[name].double().numpy() for model, tensors in stored.items()}
        exact = torch.from_numpy(merged("ties", arrays, weights, density=0.3, normalize=False))
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-5)


def test_weigh_shows_what_the_method_makes_of_the_weights(config, examples, capsys):
    args = ("--pool", "bge", "--examples", examples(PAIR_ROWS), "--json")
    linear = json.loads(run(capsys, "weigh", config, *args)[1])
    dare = json.loads(run(capsys, "weigh", config, *args, "--method", "dare_linear", "--seed", 3)[1])
    assert dare["merging_weights"] == {**linear["merging_weights"], "base": 1.0}
    assert (dare["method"], dare["method_params"]["seed"]) == ("dare_linear", 3)


def test_a_mixed_reranker_scores_the_same_wherever_it_is_loaded(config, tmp_path, capsys):
    from sentence_transformers import CrossEncoder
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    weights = {"base": 0.25, "quora": 0.75}
    out_folder = tmp_path / "mixed"
    by_hand = ",".join(f"{name}={weight}" for name, weight in weights.items())
    code, _, _ = run(capsys, "mix", config, "--pool", "ranker", "--weights", by_hand, "--out", out_folder)
    assert code == 0
    apart = AutoModelForSequenceClassification.from_pretrained(config.parent / "ranker" / "base").eval()
    states = {
        name: AutoModelForSequenceClassification.from_pretrained(config.parent / "ranker" / name).state_dict()
        for name in weights
    }
    apart.load_state_dict(linear(states, weights))
    texts = ["paris", "my card was stolen", "the capital of france"]
    tokenizer = AutoTokenizer.from_pretrained(out_folder)
    batch = tokenizer(["capital of france"] * 3, texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        want = apart(**batch).logits[:, 0]
        loaded = AutoModelForSequenceClassification.from_pretrained(out_folder).eval()
        torch.testing.assert_close(loaded(**batch).logits[:, 0], want, rtol=1e-4, atol=1e-5)
    scores = CrossEncoder(str(out_folder), device="cpu").predict([("capital of france", text) for text in texts])
    torch.testing.assert_close(torch.from_numpy(scores), torch.sigmoid(want), rtol=1e-4, atol=1e-5)


def test_a_mixed_encoder_decoder_loads_with_the_logits_of_parameters_merged_apart(config, tmp_path, capsys):
    from safetensors import safe_open
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    weights = {"base": 0.25, "nq": 0.75}
    by_hand = ",".join(f"{name}={weight}" for name, weight in weights.items())
    code, _, _ = run(capsys, "mix", config, "--pool", "t5", "--weights", by_hand, "--out", tmp_path / "mixed")
    assert code == 0
    with safe_open(tmp_path / "mixed" / "model.safetensors", "pt") as file:
        assert [name for name in file.keys() if "embed" in name or "lm_head" in name or "shared" in name] == [  # noqa: SIM118
            "shared.weight"  # encoder, decoder and output read this one: it is mixed and stored once
        ]
    apart = AutoModelForSeq2SeqLM.from_pretrained(config.parent / "t5" / "base").eval()
    states = {name: AutoModelForSeq2SeqLM.from_pretrained(config.parent / "t5" / name).state_dict() for name in weights}
    apart.load_state_dict(linear(states, weights))
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "mixed").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "mixed")("my card", text_target="paris", return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(**batch).logits, apart(**batch).logits, rtol=1e-4, atol=1e-4)


def test_an_encoder_decoder_is_not_served(config, capsys):
    code, _, err = run(capsys, "serve", config)
    assert code == 2
    assert "pool 't5' cannot be served" in err


def test_a_mixture_from_examples_tells_its_losses(config, examples, tmp_path, capsys):
    out_folder = tmp_path / "mixed"
    code, _, _ = run(capsys, "mix", config, "--pool", "bge", "--examples", examples(PAIR_ROWS), "--out", out_folder)
    assert code == 0
    weighing = json.loads((out_folder / "weighing.json").read_text())
    recipe = json.loads((out_folder / "recipe.json").read_text())
    assert recipe["merging_weights"] == pytest.approx(weighing["merging_weights"])


def test_the_model_card_tells_what_is_in_it_and_how_to_make_it_again(config, examples, tmp_path, capsys):
    from huggingface_hub import ModelCard

    out_folder = tmp_path / "mixed model"
    args = ("mix", config, "--pool", "ranker", "--examples", examples(PAIR_ROWS), "--temperature", 0.5)
    assert run(capsys, *args, "--out", out_folder)[0] == 0
    card = ModelCard.load(out_folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", "text-ranking")
    assert "merge" in card.data.tags
    assert card.data.base_model is None  # folders of this machine are no models of the hub
    weighing = json.loads((out_folder / "weighing.json").read_text())
    for name, weight in weighing["merging_weights"].items():
        assert f"| {name} | local folder | {weighing['losses'][name]:.4f} | {weight!r} |" in card.text
    assert f"Entropy of the coefficients: {weighing['entropy']:.3f} nats" in card.text
    assert str(config.parent) not in card.text.partition("## How to use it")[0]
    (command,) = (line for line in card.text.splitlines() if line.startswith("cocktail-serve mix"))
    words = shlex.split(command)
    assert words[1:] == [str(arg) for arg in (*args, "--out", out_folder)]
    again = tmp_path / "again"
    assert run(capsys, *words[1:-1], again)[0] == 0
    # the recipe gives the same bits; losses computed anew may differ in their last, as memory happens to be aligned
    made_again = load_file(again / "model.safetensors")
    for name, tensor in load_file(out_folder / "model.safetensors").items():
        torch.testing.assert_close(made_again[name], tensor)


def test_the_mergekit_configuration_is_the_same_recipe(config, tmp_path, capsys):
    run(capsys, "mix", config, "--pool", "flan", "--weights", "ag-news=0.25,nq=0.75", "--out", tmp_path / "mixed")
    written = yaml.safe_load((tmp_path / "mixed" / "mergekit.yaml").read_text())
    models = {Path(entry["model"]).name: entry["parameters"]["weight"] for entry in written["models"]}
    assert models == {"base": 0.0, "ag-news": 0.25, "nq": 0.75}
    assert written["base_model"] == str(config.parent / "flan" / "base")
    assert (written["merge_method"], written["parameters"]) == ("linear", {"normalize": False})
    assert (written["dtype"], written["out_dtype"]) == ("float32", "float32")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--weights", "base=0.5,ag-news=0.4"], "sum to 0.9"),
        (["--weights", "base=0.5,unknown=0.5"], "unknown"),
        (["--weights", "base=1", "--method", "fisher"], "'linear'"),
        (["--weights", "base=1", "--method", "ties", "--method-param", "density"], "density"),
        (["--weights", "base=1", "--method", "ties", "--method-param", "density=much"], "density=much"),
        (["--weights", "base=1", "--method", "ties", "--method-param", "density=2"], "at most 1"),
        (["--weights", "base=0.5,nq=0.5", "--method", "ties"], "always 1"),
        (["--weights", "base=one"], "base=one"),
        (["--weights", "base=0.5,base=0.5"], "twice"),
        (["--weights", "base=inf"], "base=inf"),
        (["--weights", "base=1", "--alpha", "0.5"], "alpha"),
        (["--target", "nq", "--alpha", "1.5"], "alpha"),
        (["--target", "none"], "none"),
        ([], "nothing to mix"),
        (["--examples", "no-such-file.jsonl"], "no-such-file"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(config, tmp_path, capsys, args, message):
    out_folder = tmp_path / "mixed"
    assert message in refusal(capsys, "mix", config, "--pool", "flan", "--out", out_folder, *args)
    assert not out_folder.exists()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], [], "no examples"),
        ([{"input": "a"}], [], "row 1"),
        ([{"input": "a", "output": "b"}], ["--temperature", "0"], "temperature"),
        ([{"input": "a", "output": "b"}], ["--weighting", "guess"], "weighting"),
        ([{"input": "word " * 80, "output": "b"}], [], "at most 63"),
        (PAIR_ROWS, [], "decoder"),
    ],
)
def test_bad_examples_are_refused(config, examples, capsys, *, rows, options, message):
    assert message in refusal(capsys, "weigh", config, "--pool", "flan", "--examples", examples(rows), *options)


def test_an_unreadable_row_names_its_line(config, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "a", "output": "b"}\n{"input": \n')
    code, _, err = run(capsys, "weigh", config, "--pool", "flan", "--examples", path)
    assert (code, "row 2" in err) == (2, True)


def test_an_existing_folder_is_not_overwritten(config, tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    code, _, err = run(capsys, "mix", config, "--pool", "flan", "--weights", "base=1", "--out", tmp_path)
    assert (code, "exists" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_full_disk_is_a_failure_and_leaves_nothing(config, tmp_path, capsys, monkeypatch):
    from cocktail_serve.checkpoints import folder

    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    code, _, err = run(capsys, "mix", config, "--pool", "flan", "--weights", "base=1", "--out", tmp_path / "mixed")
    assert (code, "make room" in err) == (1, True)
    assert not list(tmp_path.iterdir())


def test_an_unknown_pool_lists_the_known(config, examples, capsys):
    code, _, err = run(capsys, "weigh", config, "--pool", "flam", "--examples", examples(DECODER_ROWS))
    assert code == 2
    assert "flan, bge, ranker, t5" in err


def test_a_missing_configuration_is_bad_input(tmp_path, examples, capsys):
    code, _, err = run(capsys, "weigh", tmp_path / "no.yaml", "--pool", "x", "--examples", examples(DECODER_ROWS))
    assert (code, "no.yaml" in err) == (2, True)


THREE_ROWS = [{"input": f"the capital of {place} is", "output": word} for place, word in ("ab", "cd", "ef")]


def test_weigh_tells_whether_the_mixture_is_worth_using(config, examples, capsys):
    words = ["weigh", config, "--pool", "flan", "--examples", examples(THREE_ROWS), "--temperature", 0.5]
    _, shown, _ = run(capsys, *words)
    _, out, _ = run(capsys, *words, "--json")
    told = json.loads(out)
    findings = told["findings"]
    assert findings["num_folds"] == 3
    assert findings["text"] in " ".join(shown.split())
    assert f"base {told['losses']['base']:.2f}: " in findings["text"]
    assert findings["best_expert_loss"] == pytest.approx(min(told["losses"]["ag-news"], told["losses"]["nq"]))
    # three mixtures weighed on two examples each: not the mixture that is weighed on all
    assert findings["held_out_loss"] != pytest.approx(told["mixed_loss"], rel=1e-6)


def test_weigh_tells_what_tuning_on_the_examples_would_come_to(config, examples, capsys):
    words = ["weigh", config, "--pool", "flan", "--examples", examples(THREE_ROWS), "--no-judge", "--tune"]
    told = json.loads(run(capsys, *words, "--json")[1])
    tuning = told["tuning"]
    assert tuning["base_loss"] == pytest.approx(told["losses"]["base"], rel=1e-5), "no step is the base"
    assert tuning["held_out_loss"] <= tuning["base_loss"]
    _, shown, _ = run(capsys, *words)
    assert "a LoRA adapter tuned on these examples instead: " in " ".join(shown.split())


def test_tuning_says_why_it_is_not_done(config, examples, capsys, monkeypatch):
    words = ["weigh", config, "--tune", "--examples"]
    code, _, said = run(capsys, *words, examples(PAIR_ROWS), "--pool", "bge")
    assert code == 2
    assert "only decoders are tuned" in " ".join(said.split())
    monkeypatch.setattr("cocktail_serve.offline.tuning.is_available", lambda: False)
    code, _, said = run(capsys, *words, examples(THREE_ROWS), "--pool", "flan")
    assert code == 2
    assert "pip install 'cocktail-serve[eval]'" in " ".join(said.split())


def test_held_out_losses_are_those_of_mixtures_weighed_without_them(config, examples, capsys):
    words = ["--pool", "flan", "--temperature", 0.5, "--json", "--no-judge"]
    held_out = []
    for left_out in THREE_ROWS:
        others = [row for row in THREE_ROWS if row is not left_out]
        _, out, _ = run(capsys, "weigh", config, *words, "--examples", examples(others))
        assert json.loads(out)["findings"] is None
        weights = ",".join(f"{name}={weight!r}" for name, weight in json.loads(out)["merging_weights"].items())
        folder = config.parent / f"fold-{left_out['output']}"
        run(capsys, "mix", config, "--pool", "flan", "--weights", weights, "--out", folder)
        held_out.append(_loss(folder, left_out))
    _, out, _ = run(
        capsys, "weigh", config, "--pool", "flan", "--temperature", 0.5, "--json", "--examples", examples(THREE_ROWS)
    )
    assert json.loads(out)["findings"]["held_out_loss"] == pytest.approx(sum(held_out) / 3, rel=1e-4)


def _loss(folder, row):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    start = len(tokenizer(row["input"]).input_ids)
    ids = [*tokenizer(f"{row['input']} {row['output']}").input_ids, tokenizer.eos_token_id]
    labels = torch.tensor([[-100] * start + ids[start:]])
    with torch.inference_mode():
        return model(torch.tensor([ids]), labels=labels).loss.item()


def test_an_encoders_verdict_and_the_model_card(config, examples, tmp_path, capsys):
    rows = [*PAIR_ROWS, {"query": "happy dog", "pos": ["good dog"], "neg": ["bad cat"]}]
    out = tmp_path / "mixture"
    code, shown, _ = run(capsys, "mix", config, "--pool", "bge", "--examples", examples(rows), "--out", out)
    assert code == 0
    findings = json.loads((out / "weighing.json").read_text())["findings"]
    assert findings["num_folds"] == 3
    assert findings["text"] in " ".join(shown.split())
    assert f"**{findings['text']}**" in (out / "README.md").read_text()


def test_without_a_verdict_it_is_said_why(config, examples, capsys):
    _, out, _ = run(capsys, "weigh", config, "--pool", "flan", "--examples", examples(DECODER_ROWS[:1]), "--json")
    findings = json.loads(out)["findings"]
    assert findings["advice"] is None
    assert "one example cannot be held out" in findings["text"]


def _losses_of_messages(folder, capsys, examples, **args):
    """Loss of each model on a chat, in a pool whose base has no chat template."""
    (folder / "flan" / "base" / "chat_template.jinja").unlink(missing_ok=True)
    models = {path.name: path for path in (folder / "flan").iterdir()}
    engine = {"type": "vllm", "max_model_len": 64, "args": args}
    pools = [pool_section("flan", "decoder", models, engine)]
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": pools}))
    code, out, err = run(capsys, "weigh", config, "--pool", "flan", "--examples", examples(DECODER_ROWS[-1:]), "--json")
    return code, json.loads(out)["losses"] if code == 0 else err


def _loss_of(folder, prompt, output):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = before + tokenizer(output, add_special_tokens=False).input_ids
    with torch.inference_mode():
        labels = torch.tensor([[-100] * len(before) + ids[len(before) :]])
        return model(torch.tensor([ids]), labels=labels).loss.item()


def test_messages_are_scored_by_the_template_that_chats_are_rendered_with(tmp_path, examples, capsys):
    """The base's, else the experts', else the operator's, which goes before both; for every model the same text."""
    folders = make_decoder_pool(tmp_path / "flan")
    question, answer = "my card was stolen", "open a bank account"
    _, of_experts = _losses_of_messages(tmp_path, capsys, examples)
    prompt = f"<s><|user|>{question}</s><|assistant|>"
    for name in ("base", "nq"):
        assert of_experts[name] == pytest.approx(_loss_of(folders[name], prompt, f"{answer}</s>"), rel=1e-5)

    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}<s>{{ m['role'] }}</s>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant</s>{% endif %}"
    )
    # beside the configuration, whatever the current folder
    _, of_operator = _losses_of_messages(tmp_path, capsys, examples, **{"chat-template": "chat.jinja"})
    for name in ("base", "nq"):
        reference = _loss_of(folders[name], f"<s>user</s>{question}<s>assistant</s>", answer)
        assert of_operator[name] == pytest.approx(reference, rel=1e-5)

    (folders["nq"] / "chat_template.jinja").write_text("{{ messages }}")
    code, err = _losses_of_messages(tmp_path, capsys, examples)
    assert code == 2
    assert "row 1: the pool's base has no chat template" in " ".join(err.split())
    assert "set chat-template in engine.args" in " ".join(err.split())


def test_a_base_without_tokenizer_says_what_to_do(examples, tmp_path, capsys):
    folders = make_decoder_pool(tmp_path / "flan", ("nq",))
    config = tmp_path / "config.yaml"
    pool = pool_section("flan", "decoder", folders, {"type": "vllm", "max_model_len": 64})
    config.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": [pool]}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folders["base"] / file).unlink()
    weigh = ["weigh", config, "--pool", "flan", "--examples", examples(TEXT_ROWS), "--json"]
    code, out, err = run(capsys, *weigh)
    assert (code, out) == (2, "")
    assert "copy tokenizer.json and tokenizer_config.json there" in " ".join(err.split())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folders["base"] / file).write_bytes((folders["nq"] / file).read_bytes())
    code, out, err = run(capsys, *weigh)
    assert (code, set(json.loads(out)["losses"])) == (0, {"base", "nq"})
