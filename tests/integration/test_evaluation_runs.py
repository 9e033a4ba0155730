"""Systems on pico pools: each row works, what is measured is what a look by hand finds, and a run goes on."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cocktail_serve.cli.eval import show
from cocktail_serve.config import load_settings
from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.evaluation.measure import Measuring, first_line
from cocktail_serve.evaluation.report import Report
from cocktail_serve.evaluation.runs import RunEntry, open_evaluation, run
from cocktail_serve.evaluation.systems import SYSTEMS, NotMade, find_systems
from cocktail_serve.evaluation.tasks import load_task, sample_examples
from tests.models import make_decoder, make_decoder_pool, make_encoder_pool, pool_section

WORDS = ("paris", "berlin", "madrid")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    decoders = make_decoder_pool(folder / "flan")
    encoders = make_encoder_pool(folder / "bge")
    make_decoder(folder / "many", perturbation_seed=9)

    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "store": {"cache_dir": "cache"},
                "pools": [
                    pool_section("flan", "decoder", decoders, {"type": "vllm", "max_model_len": 64}),
                    pool_section("bge", "encoder", encoders, {"type": "sentence_transformers"}),
                ],
            }
        )
    )
    capitals = [{"input": f"the capital of {place} is", "output": WORDS[i % 3]} for i, place in enumerate("abcdefgh")]
    _write(folder / "tasks/capitals/train.jsonl", capitals[:5])
    _write(folder / "tasks/capitals/test.jsonl", [row | {"choices": list(WORDS)} for row in capitals])
    free = [{"input": f"what is {i}", "output": "a dog", "references": ["a cat"]} for i in range(4)]
    _write(folder / "tasks/free/test.jsonl", free)
    _write(folder / "tasks/free/train.jsonl", [{"input": f"who is {i}", "output": "a bird"} for i in range(5)])
    _write(folder / "tasks/web/corpus.jsonl", [{"_id": f"d{i}", "text": f"my card {i}"} for i in range(9)])
    _write(folder / "tasks/web/queries.jsonl", [{"_id": f"q{i}", "text": f"card {i}"} for i in range(5)])
    (folder / "tasks/web/qrels.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(4)))
    _write(
        folder / "tasks/web/train.jsonl",
        [{"query": f"pay {i}", "pos": [f"cash {i}"], "neg": ["dog"]} for i in range(3)],
    )
    return folder


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def entry(folder: Path, name: str, kind="decoder", target=None) -> RunEntry:
    path = folder / "tasks" / name
    return RunEntry(load_task(path, kind), sample_examples(path, kind), target)


@pytest.fixture(scope="module")
def everything(folder):
    """All decoder systems on both tasks, and where it was kept."""
    settings, out = load_settings(folder / "config.yaml"), folder / "out"
    entries = [entry(folder, "capitals", target="nq"), entry(folder, "free")]
    how = Measuring(max_new_tokens=4)
    with open_evaluation(settings, "flan", out=out, how=how, multitask=folder / "many") as evaluation:
        systems = find_systems(None, "decoder")
        return run(evaluation, entries, systems, temperatures=(5.0, 0.1), budget=3), out


def test_every_decoder_system_is_a_row(everything):
    result, _ = everything
    made = {cell.system for cell in result.cells}
    expected = set()
    for system in find_systems(None, "decoder"):
        taus = (" tau=5", " tau=0.1") if system.reads_temperature else ("",)
        expected |= {f"{system.name}{tau}" for tau in taus}
    assert made == expected
    needs_target = {"fine-tuned", "lm-cocktail-2", "lm-cocktail-10 tau=5", "lm-cocktail-10 tau=0.1", "search-10"}
    assert {system for system, task in result.skipped} == needs_target
    assert {task for _, task in result.skipped} == {"free"}


def test_metrics_follow_from_what_a_task_has(everything):
    result, _ = everything
    for cell in result.cells:
        if cell.task == "capitals":
            assert list(cell.metrics) == ["accuracy", "loss", "brier", "ece"]
        else:
            assert list(cell.metrics) == ["exact_match", "f1", "rouge_l", "loss"]
        assert {len(values) for values in cell.metrics.values()} == {8 if cell.task == "capitals" else 4}


def test_the_target_is_in_no_mixture_but_its_own(everything):
    result, _ = everything
    weights = {
        cell.system: cell.about["merging_weights"]
        for cell in result.cells
        if cell.task == "capitals" and cell.system not in ("icl", "tune")
    }
    assert weights["lm-cocktail-2"] == {"base": 0.5, "nq": 0.5}
    assert weights["lm-cocktail-10 tau=5"]["nq"] == 0.5
    for system in ("lm-cocktail tau=5", "soup", "blackbox", "ensemble tau=5", "best-single"):
        assert "nq" not in weights[system]
    assert all("multitask" not in of_system for name, of_system in weights.items() if name != "multitask")


def test_a_tuned_base_tells_how_far_it_went_and_is_tuned_once(folder, monkeypatch):
    from cocktail_serve.offline import tuning

    settings, out, tunings = load_settings(folder / "config.yaml"), folder / "tuned", []
    tune = tuning.tune
    monkeypatch.setattr(tuning, "tune", lambda *args, **how: tunings.append(1) or tune(*args, **how))
    losses = []
    for _ in range(2):
        with open_evaluation(settings, "flan", out=out) as evaluation:
            task = entry(folder, "capitals", target="nq")
            contender = evaluation.make(SYSTEMS["tune"], evaluation.occasion(task))
            cell = evaluation.measure("tune", contender, task.task)
            of_base = evaluation.measure("base", evaluation.make(SYSTEMS["base"], evaluation.occasion(task)), task.task)
            losses.append(cell.metrics["loss"])
    assert len(tunings) == 1
    assert losses[0] == losses[1]
    held_out = cell.about["held_out"]
    assert held_out[cell.about["num_steps"]] == min(held_out) <= held_out[0]
    assert cell.about["num_steps"] > 0
    assert cell.mean("loss") < of_base.mean("loss")


def test_without_peft_nothing_is_tuned_and_the_command_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setattr("cocktail_serve.offline.tuning.is_available", lambda: False)
    with open_evaluation(load_settings(folder / "config.yaml"), "flan") as evaluation:
        occasion = evaluation.occasion(entry(folder, "capitals"))
        with pytest.raises(NotMade, match=r"peft.*pip install 'cocktail-serve\[eval\]'"):
            evaluation.make(SYSTEMS["tune"], occasion)


def test_likelihoods_are_those_of_transformers(everything, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result, _ = everything
    cell = next(cell for cell in result.cells if (cell.system, cell.task) == ("fine-tuned", "capitals"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "flan/nq")
    model = AutoModelForCausalLM.from_pretrained(folder / "flan/nq").eval()
    right, losses = [], []
    for row in load_task(folder / "tasks/capitals", "decoder").rows:
        sums = []
        for choice in row.choices:
            start = len(tokenizer(row.input).input_ids)
            ids = torch.tensor([[*tokenizer(f"{row.input} {choice}").input_ids, tokenizer.eos_token_id]])
            with torch.inference_mode():
                log_probs = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
            told = log_probs.gather(1, ids[0, 1:, None])[start - 1 :, 0]
            sums.append(told[:-1].sum().item())  # without the end token
            if choice == row.output:
                losses.append(-told.mean().item())
        right.append(float(row.choices[int(np.argmax(sums))] == row.output))
    assert cell.metrics["accuracy"] == right
    assert cell.metrics["loss"] == pytest.approx(losses, rel=1e-4)


def test_an_ensembles_loss_is_that_of_the_mean_probability(folder):
    settings = load_settings(folder / "config.yaml")
    task = entry(folder, "capitals")
    with open_evaluation(settings, "flan", how=Measuring(metrics=("loss",))) as evaluation:
        occasion = evaluation.occasion(task, temperature=5.0)
        ensemble = evaluation.make(SYSTEMS["ensemble"], occasion)
        measured = evaluation.measure("ensemble", ensemble, task.task).metrics["loss"]
        singles = {}
        from cocktail_serve.examples import ExampleSet, TextExample
        from cocktail_serve.scoring.decoder import tokenize_examples

        examples = ExampleSet.of(TextExample(row.input, row.output) for row in task.task.rows)
        tokenized = tokenize_examples(evaluation.backend.tokenizer, examples, max_tokens=63)
        for part in ensemble.parts:
            singles[part.share] = evaluation.backend.log_probs(part.recipe, tokenized)
    for number, loss in enumerate(measured):
        probs = sum(share * np.exp(of_model[number]) for share, of_model in singles.items())
        assert loss == pytest.approx(-np.log(probs).mean(), rel=1e-6)
    assert math.fsum(singles) == pytest.approx(1.0)
    assert len(singles) == 3


def test_an_ensemble_of_one_model_twice_says_what_the_model_says(folder):
    from cocktail_serve.evaluation.backend import EnsemblePart

    settings = load_settings(folder / "config.yaml")
    with open_evaluation(settings, "flan") as evaluation:
        recipe = evaluation.make(SYSTEMS["base"], evaluation.occasion(entry(folder, "free"))).parts[0].recipe
        prompts = [evaluation.backend.tokenizer(text).input_ids for text in ("my card", "what is the capital of")]
        alone = evaluation.backend.generate([EnsemblePart(recipe, 1.0)], prompts, max_new_tokens=6)
        twice = evaluation.backend.generate(
            [EnsemblePart(recipe, 0.4), EnsemblePart(recipe, 0.6)], prompts, max_new_tokens=6
        )
    assert alone == twice
    assert all(alone)


def test_a_run_goes_on_where_it_was(everything, folder, monkeypatch):
    first, out = everything
    settings = load_settings(folder / "config.yaml")
    entries = [entry(folder, "capitals", target="nq"), entry(folder, "free")]

    def refuse(*_, **__):
        raise AssertionError("what is kept was measured again")

    monkeypatch.setattr("cocktail_serve.scoring.decoder.token_log_probs", refuse)
    monkeypatch.setattr("cocktail_serve.evaluation.generation.generate_texts", refuse)
    how = Measuring(max_new_tokens=4)
    with open_evaluation(settings, "flan", out=out, how=how, multitask=folder / "many") as evaluation:
        again = run(evaluation, entries, find_systems(None, "decoder"), temperatures=(5.0, 0.1), budget=3)
    assert [cell.to_json() for cell in again.cells] == [cell.to_json() for cell in first.cells]


def test_examples_in_context_change_the_prompt_and_fit_it(everything):
    result, _ = everything
    cells = {(cell.system, cell.task): cell for cell in result.cells}
    icl, base = cells["icl", "capitals"], cells["base", "capitals"]
    assert icl.metrics["loss"] != base.metrics["loss"]
    assert 0 < icl.about["num_shots"] < 5  # the context of 64 tokens does not hold all


def test_encoder_systems_rank_by_their_own_embeddings(folder):
    from sentence_transformers import SentenceTransformer

    settings = load_settings(folder / "config.yaml")
    web = entry(folder, "web", "encoder", target="quora")
    with open_evaluation(settings, "bge") as evaluation:
        result = run(evaluation, [web], find_systems(None, "encoder"), temperatures=(1.0,), budget=2)
    assert {cell.system for cell in result.cells} == {s.name for s in find_systems(None, "encoder")} - {"multitask"}
    model = SentenceTransformer(str(folder / "bge/quora"), device="cpu")
    scores = model.encode(list(web.task.queries.values())) @ model.encode(list(web.task.corpus.values())).T
    ranks = [1 + int((row > row[place]).sum()) for place, row in enumerate(scores)]
    cell = next(cell for cell in result.cells if cell.system == "fine-tuned")
    assert cell.metrics["mrr@10"] == pytest.approx([1 / rank for rank in ranks])
    assert list(cell.metrics) == ["ndcg@10", "mrr@10", "recall@10", "recall@100"]
    report = Report(result)
    assert report.notes == [
        "Documents of equal scores are ranked by document id, descending, for every metric, as trec_eval does.",
        "web: 1 query is left out, without a relevant document in the corpus.",  # q4 is not judged
    ]
    assert all(note in report.markdown() for note in report.notes)
    assert report.to_json()["settings"]["tasks"]["web"]["num_without_relevant"] == 1


def test_the_report_says_the_same_in_every_form(everything, tmp_path):
    result, _ = everything
    report = Report(result)
    files = {path.name: path.read_text() for path in report.write(tmp_path)}
    told = json.loads(files["results.json"])
    assert len(told["cells"]) == len(result.cells)
    assert len(files["results.csv"].splitlines()) == 1 + sum(len(cell.metrics) for cell in result.cells)
    columns, rows = report.rows()
    assert columns == ["system", "capitals (accuracy)", "free (exact_match)", "mean", "gain over base"]
    assert [row[0] for row in rows] == list(dict.fromkeys(cell.system for cell in result.cells))
    base = next(line for line in report.summary if line.system == "base")
    assert base.gain is None
    fine_tuned = next(line for line in report.summary if line.system == "fine-tuned")
    assert fine_tuned.mean is None  # not made for both tasks
    assert "### loss, smaller is better" in files["results.md"]
    assert "- fine-tuned, free:" in files["results.md"]


def test_a_lower_loss_is_a_gain(everything):
    report = Report(everything[0])
    losses = {line.system: line for line in report.lines("loss")}
    line = next(line for line in losses.values() if line.gain is not None and line.mean is not None)
    lower = sum(losses["base"].tasks[task].mean - line.tasks[task].mean for task in line.tasks) / len(line.tasks)
    assert line.gain.mean == pytest.approx(lower)
    assert lower != 0


def test_free_text_is_shown_by_more_than_exact_matches(everything, capsys):
    result, _ = everything
    assert [title for title, _, _ in Report(result).tables_beside()] == ["f1", "loss, smaller is better"]
    show(Report(result))
    out = capsys.readouterr().out
    assert [title in out.splitlines() for title in ("f1", "loss, smaller is better")] == [True, True]
    assert "free (f1)" in out
    assert "capitals (loss)" in out


def test_what_is_missing_is_said(folder):
    settings = load_settings(folder / "config.yaml")
    with open_evaluation(settings, "flan") as evaluation:
        occasion = evaluation.occasion(RunEntry(load_task(folder / "tasks/free", "decoder")))
        for name in ("fine-tuned", "multitask", "lm-cocktail", "unified"):
            with pytest.raises(NotMade):
                evaluation.make(SYSTEMS[name], occasion)
    with pytest.raises(InvalidRequestError, match="there are: base"):
        find_systems(["nothing"], "decoder")
    with pytest.raises(InvalidRequestError, match="decoder pools"):
        find_systems(["icl"], "encoder")


def test_cross_measures_what_is_made_for_one_task_on_the_other(folder):
    settings = load_settings(folder / "config.yaml")
    entries = [entry(folder, "capitals", target="nq"), entry(folder, "free", target="ag-news")]
    with open_evaluation(settings, "flan", how=Measuring(metrics=("loss",))) as evaluation:
        result = run(evaluation, entries, [SYSTEMS["base"], SYSTEMS["fine-tuned"]], cross=True)
    assert {(cell.system, cell.made_for, cell.task) for cell in result.cells} == {
        (system, made_for, task)
        for system in ("base", "fine-tuned")
        for made_for in ("capitals", "free")
        for task in ("capitals", "free")
    }
    assert "### Made for one task, measured on another" in Report(result).markdown()


@pytest.mark.parametrize(("said", "answer"), [(" a dog\nand more", "a dog"), ("\n\n b ", "b"), ("", "")])
def test_the_first_line_is_the_answer(said, answer):
    assert first_line(said) == answer
