"""`import-openai`: what the rows of a training file become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.examples import parse_examples, read_jsonl
from tests.command_line import answer, refusal, run

USER = {"role": "user", "content": "what is the capital of france"}
PARIS = {"role": "assistant", "content": "paris"}
ROWS: list[Any] = [
    {"messages": [{"role": "system", "content": "be brief"}, USER, PARIS]},
    {
        "messages": [USER, PARIS, USER, {"role": "assistant", "content": "lyon", "weight": 0}],
        "parallel_tool_calls": False,
    },
    {"messages": [USER, PARIS, USER, PARIS]},
    {"prompt": "the capital of france is", "completion": " paris"},
]
REFUSED: list[Any] = [
    {"input": {"messages": [USER]}, "preferred_output": [PARIS], "non_preferred_output": [PARIS]},
    {"messages": [USER, {**PARIS, "weight": 0}]},
    {"messages": [USER, PARIS], "functions": [{"name": "f"}]},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("\n\n".join(json.dumps(row) for row in rows))
    return file


def test_each_row_is_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "import-openai", file)
    assert code == 0
    assert out.splitlines() == [
        "line 1: chat (system, user) -> 'paris'",
        "line 3: chat (user) -> 'paris' (not scored, of weight 0: 1; left out, behind the scored answer: 2; "
        "parallel_tool_calls is left aside)",
        "line 5: chat (user, assistant, user) -> 'paris' (the last answer alone is scored, earlier ones are its "
        "context: 1)",
        "line 7: text -> ' paris'",
        "4 examples, 0 rows refused",
    ]


def test_rows_of_other_tools_and_decisions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "the capital?"}, {"from": "gpt", "value": "paris"}]},
        {"input": "my card", "question": {"type": "predicate", "instructions": "it is lost"}, "answer": False},
    ]
    code, out, _ = run(capsys, "import-openai", write(tmp_path / "rows.jsonl", rows))
    assert (code, out.splitlines()[:2]) == (0, ["line 1: chat (user) -> 'paris'", "line 3: decision -> 'false'"])


def test_examples_are_written_as_they_are_scored(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, "import-openai", file, "--out", tmp_path / "out.jsonl")
    assert (told["examples"], told["refused"], len(told["rows"])) == (4, 0, 4)
    written = read_jsonl((tmp_path / "out.jsonl").read_text())
    assert written[1] == {"messages": [USER, PARIS]}
    assert parse_examples(written, "decoder") == parse_examples(ROWS, "decoder")


def test_rows_that_are_no_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", [*REFUSED, ROWS[0]])
    out = tmp_path / "out.jsonl"
    code, told, said = run(capsys, "import-openai", file, "--out", out)
    assert (code, out.exists()) == (2, False)
    assert "line 1: refused: this is a row of preferences" in told
    assert "line 3: refused: every answer of the assistant has weight 0" in told
    assert "line 5: refused: 'functions' is not served" in told
    assert "3 of 4 rows are no examples; --leave-out goes on without them" in said
    code, _, said = run(capsys, "import-openai", file, "--out", out, "--leave-out")
    assert (code, "1 examples in" in said) == (0, True)
    assert len(read_jsonl(out.read_text())) == 1


def test_what_is_no_training_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert "does not exist" in refusal(capsys, "import-openai", file)
    file.write_text("\n")
    assert "holds no rows" in refusal(capsys, "import-openai", file)
    file.write_bytes(b"\xff\xfe")
    assert "not UTF-8 text" in refusal(capsys, "import-openai", file)
    file.write_text("{")
    code, told, said = run(capsys, "import-openai", file)
    assert code == 2
    assert "line 1: refused: not a JSON object" in told
    assert "1 of 1 rows are no examples" in said
