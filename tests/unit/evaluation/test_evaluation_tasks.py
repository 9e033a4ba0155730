"""Tasks from files: both layouts, samples by seed, and what is said about files that are none."""

import json
from pathlib import Path

import pytest

from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.evaluation.tasks import DecoderTask, EncoderTask, load_examples, load_task, sample_examples


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_beir(folder: Path) -> Path:
    write_rows(
        folder / "test" / "corpus.jsonl", [{"_id": f"d{i}", "title": "t", "text": f"text {i}"} for i in range(10)]
    )
    write_rows(folder / "test" / "queries.jsonl", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(4)])
    lines = ["query-id\tcorpus-id\tscore", "q0\td0\t2", "q0\td1\t0", "q1\td2\t1", "q2\tgone\t1"]
    (folder / "test" / "qrels.tsv").write_text("\n".join(lines) + "\n")
    write_rows(folder / "fewshot.jsonl", [{"query": "q", "pos": ["p"], "neg": ["n"]}])
    return folder


def test_a_decoder_task_is_a_file_or_a_folder_named_after_itself(tmp_path):
    rows = [{"input": "a", "output": "yes", "choices": ["yes", "no"], "other": 1}, {"input": "b", "output": "no"}]
    write_rows(tmp_path / "sst2" / "test.jsonl", rows)
    by_folder = load_task(tmp_path / "sst2", "decoder")
    by_file = load_task(tmp_path / "sst2" / "test.jsonl", "decoder")
    assert isinstance(by_folder, DecoderTask)
    assert (by_folder.name, by_folder.digest) == (by_file.name, by_file.digest)
    assert by_folder.name == "sst2"
    assert by_folder.rows[0].choices == ("yes", "no")
    assert not by_folder.has_choices  # the second row has none


def test_the_output_is_among_its_references(tmp_path):
    row = {"input": "who", "output": "Ann", "references": ["Ann Lee", "Ann"]}
    task = load_task(write_rows(tmp_path / "nq.jsonl", [row]), "decoder")
    assert task.rows[0].references == ("Ann", "Ann Lee")


def test_a_limit_samples_by_seed_in_order(tmp_path):
    file = write_rows(tmp_path / "t.jsonl", [{"input": str(i), "output": "x"} for i in range(50)])
    one, again, other = (load_task(file, "decoder", limit=10, seed=seed) for seed in (0, 0, 1))
    numbers = [int(row.input) for row in one.rows]
    assert one.digest == again.digest != other.digest
    assert numbers == sorted(numbers)
    assert (len(one), one.num_given) == (10, 50)


def test_an_encoder_task_keeps_the_queries_that_can_be_answered(tmp_path):
    task = load_task(write_beir(tmp_path / "shell"), "encoder")
    assert isinstance(task, EncoderTask)
    assert task.name == "shell"
    assert list(task.queries) == ["q0", "q1"]  # q2's document is not there, q3 is not judged
    assert (task.num_given, task.num_without_relevant) == (2, 2)
    assert task.qrels["q0"] == {"d0": 2, "d1": 0}
    assert task.corpus["d0"] == "t text 0"


def test_fewer_documents_keep_those_that_are_judged(tmp_path):
    task = load_task(write_beir(tmp_path / "shell"), "encoder", max_documents=2)
    assert {"d0", "d1", "d2"} <= set(task.corpus)
    assert len(task.corpus) == 5


def test_examples_are_sampled_from_the_train_file_beside(tmp_path):
    write_rows(tmp_path / "ag" / "test.jsonl", [{"input": "a", "output": "b"}])
    write_rows(tmp_path / "ag" / "train.jsonl", [{"input": str(i), "output": "x", "label": i} for i in range(20)])
    examples = sample_examples(tmp_path / "ag", "decoder", num=5, seed=3)
    assert len(examples) == 5
    assert examples.digest == sample_examples(tmp_path / "ag" / "test.jsonl", "decoder", num=5, seed=3).digest
    assert examples.digest != sample_examples(tmp_path / "ag", "decoder", num=5, seed=4).digest
    assert len(sample_examples(write_beir(tmp_path / "shell"), "encoder")) == 1


def test_examples_from_a_file_that_is_named(tmp_path):
    file = write_rows(tmp_path / "mine.jsonl", [{"input": str(i), "output": "x"} for i in range(9)])
    assert len(load_examples(file, "decoder")) == 9
    assert len(load_examples(file, "decoder", num=5)) == 5


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"input": "a"}], "row 1: expected"),
        ([{"input": "a", "output": "b", "choices": ["c"]}], "row 1: the output is not among its choices"),
        ([{"input": "a", "output": "b", "references": "b"}], "'references' must be a list"),
        ([], "is empty"),
    ],
)
def test_rows_that_are_no_task_are_named(tmp_path, rows, said):
    with pytest.raises(InvalidRequestError, match=said):
        load_task(write_rows(tmp_path / "t.jsonl", rows), "decoder")


def test_a_folder_without_a_corpus_is_no_retrieval_task(tmp_path):
    with pytest.raises(InvalidRequestError, match=r"corpus\.jsonl"):
        load_task(tmp_path, "encoder")


def test_other_kinds_have_no_tasks(tmp_path):
    with pytest.raises(InvalidRequestError, match="reranker"):
        load_task(tmp_path, "reranker")
