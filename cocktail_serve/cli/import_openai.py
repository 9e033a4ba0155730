"""`import-openai`: what a file of OpenAI's fine-tuning is here, row by row, before anything is uploaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from cocktail_serve.cli.options import AsJSON
from cocktail_serve.cli.terminal import print_json, print_warnings, stderr, stdout
from cocktail_serve.decision_rows import DecisionExample
from cocktail_serve.errors import InvalidExamplesError, InvalidRequestError
from cocktail_serve.examples import ChatExample, Example, jsonl_lines, parse_examples, parse_line

MAX_SHOWN = 60
"""Characters of an output that a line shows."""


@dataclass(frozen=True, slots=True)
class ImportedRow:
    """A line of the file.

    Attributes:
        becomes: what it is here, in words.
        refused: why it is nothing; None: it is an example.
        notes: what of it is left aside.
    """

    line: int
    becomes: str = ""
    refused: str | None = None
    notes: Sequence[str] = ()
    example: Example | None = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        return {"line": self.line, "becomes": self.becomes, "refused": self.refused, "notes": list(self.notes)}


def import_openai(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.jsonl",
            help="A training file as it was uploaded to OpenAI, or exported from there.",
            show_default=False,
            exists=True,
            dir_okay=False,
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the examples there, without what is left aside.", show_default=False, dir_okay=False),
    ] = None,
    leave_out: Annotated[bool, typer.Option("--leave-out", help="Go on without rows that are refused.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Check a training file of OpenAI's fine-tuning and say what each row becomes: an example, or why it is none."""
    rows = list(read_training_file(file))
    refused = [row for row in rows if row.refused is not None]
    if as_json:
        print_json({"object": "import", "file": str(file), "rows": [row.to_json() for row in rows], **_counts(rows)})
    else:
        _show(rows)
    if len(refused) == len(rows) or (refused and not leave_out):
        rest = "" if len(refused) == len(rows) else "; --leave-out goes on without them"
        raise InvalidRequestError(f"{len(refused)} of {len(rows)} rows are no examples{rest}")
    if out is not None:
        examples = [row.example for row in rows if row.example is not None]
        text = "".join(json.dumps(example.to_json(), ensure_ascii=False) + "\n" for example in examples)
        out.write_text(text, encoding="utf-8")
        stderr().print(f"{len(examples)} examples in {out}", markup=False)


def read_training_file(file: Path) -> Iterator[ImportedRow]:
    """The rows of a file, in order.

    Raises:
        InvalidRequestError: it is no text, or holds no row.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{file} is not UTF-8 text: {error.reason}") from error
    num_rows = 0
    for number, line in jsonl_lines(text):
        num_rows += 1
        try:
            row = parse_line(line, number)
            (example,) = parse_examples([row], "decoder")
        except InvalidExamplesError as error:
            yield ImportedRow(number, refused=error.message.removeprefix(f"row {error.row}: "))
        else:
            yield ImportedRow(number, _told(example), notes=tuple(_notes(row, example)), example=example)
    if not num_rows:
        raise InvalidRequestError(f"{file} holds no rows: a training file has one JSON object on each line")


def _told(example: Example) -> str:
    if isinstance(example, ChatExample):
        *before, (_, output) = example.messages
        roles = ", ".join(role for role, _ in before)
        calls = "" if not example.details or not example.details[-1].get("tool_calls") else " and calls of tools"
        tools = f" with {len(example.tools)} tools" if example.tools else ""
        return f"chat ({roles}){tools} -> {_short(output)}{calls}"
    if isinstance(example, DecisionExample):
        return f"decision -> {_short(example.question.options[example.answer].text)}"
    row = example.to_json()
    return f"text -> {_short(row['output'] if 'output' in row else row['completion'])}"


def _short(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}...")


def _notes(row: Any, example: Example) -> Iterator[str]:
    """What OpenAI's training reads of a row and is not in the example."""
    # chats of other tools say theirs elsewhere
    if not isinstance(row, Mapping) or not isinstance(example, ChatExample) or "messages" not in row:
        return
    messages = row["messages"]
    answers = [message for message in messages if message.get("role") == "assistant"]
    scored = [message for message in answers if message.get("weight") != 0]
    if len(scored) > 1:
        yield f"the last answer alone is scored, earlier ones are its context: {len(scored) - 1}"
    if len(scored) < len(answers):
        yield f"not scored, of weight 0: {len(answers) - len(scored)}"
    if len(messages) > len(example.messages):
        yield f"left out, behind the scored answer: {len(messages) - len(example.messages)}"
    if row.get("parallel_tool_calls") is not None:
        yield "parallel_tool_calls is left aside"


def _counts(rows: Sequence[ImportedRow]) -> dict[str, int]:
    counted = Counter("refused" if row.refused is not None else "examples" for row in rows)
    return {"examples": counted["examples"], "refused": counted["refused"]}


def _show(rows: Sequence[ImportedRow]) -> None:
    console = stdout()
    for row in rows:
        said = f"refused: {row.refused}" if row.refused is not None else row.becomes
        notes = f" ({'; '.join(row.notes)})" if row.notes else ""
        console.print(f"line {row.line}: {said}{notes}", markup=False)
    counts = _counts(rows)
    console.print(f"{counts['examples']} examples, {counts['refused']} rows refused", markup=False)
    if counts["examples"] > 100:
        print_warnings(console, ["five examples are enough: above a pool's max_examples (100) a sample is taken"])
