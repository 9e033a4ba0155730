"""The few-shot examples of a task: parsed and checked row by row, digested, sampled with a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from cocktail_serve.chat_rows import Details, Message, checked_tools, scored_messages
from cocktail_serve.decision_rows import FORM as DECISION_FORM
from cocktail_serve.decision_rows import DecisionExample, decision_example, is_decision
from cocktail_serve.digest import digest_of
from cocktail_serve.errors import InvalidExamplesError
from cocktail_serve.example_rows import plain_row, separator_of, text_of
from cocktail_serve.pool import Kind, with_article

ONE_SPACE = " "
"""What LM-Cocktail's reference joins input and output by."""


@dataclass(frozen=True, slots=True)
class TextExample:
    """`{"input", "output"}`, or `{"prompt", "completion"}`: the loss is that of the output given the input.

    Attributes:
        separator: what stands between the two, where there is an input. It is predicted with the output.
    """

    input: str
    output: str
    separator: str = ONE_SPACE

    @classmethod
    def joined(cls, text: str, output: str, separator: str | None = None) -> Self:
        """An input and its output.

        Args:
            separator: as of `parse_examples`.
        """
        if separator is None:
            separator = "" if text[-1:].isspace() else ONE_SPACE
        return cls(text, output, separator if text else ONE_SPACE)

    @property
    def output_start(self) -> int:
        """Characters of the text before the output."""
        return len(self.input) + len(self.separator) if self.input else 0

    @property
    def text(self) -> str:
        """Input and output as the model reads them."""
        return f"{self.input}{self.separator}{self.output}" if self.input else self.output

    def to_json(self) -> dict[str, Any]:
        """The row that says the same in every release and pool; the reference's as it always was, for its digest."""
        if self.separator == "":
            return {"prompt": self.input, "completion": self.output}
        other = {} if self.separator == ONE_SPACE else {"separator": self.separator}
        return {"input": self.input, "output": self.output, **other}


@dataclass(frozen=True, slots=True)
class ChatExample:
    """`{"messages": [...]}`: the last assistant turn is the output, all before it, chat-templated, the input.

    Attributes:
        messages: `(role, content)` pairs; the last role is `assistant`.
        details: what each message has beside these (its name, calls of tools), for the chat template; empty where no
            message has any.
        tools: definitions of the tools that may be called, for the chat template.
    """

    messages: tuple[Message, ...]
    details: tuple[Details, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        details = self.details or ({},) * len(self.messages)
        messages = [
            {"role": role, "content": content, **more}
            for (role, content), more in zip(self.messages, details, strict=True)
        ]
        return {"messages": messages, **({"tools": list(self.tools)} if self.tools else {})}


@dataclass(frozen=True, slots=True)
class RetrievalExample:
    """`{"query", "pos", "neg"}`: texts that answer the query and texts that do not."""

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"query": self.query, "pos": list(self.pos), "neg": list(self.neg)}


Example = TextExample | ChatExample | DecisionExample | RetrievalExample


def example_digest(example: Example) -> str:
    """SHA-256 of one example, 64 hex characters: the key its loss is kept under."""
    return digest_of(example.to_json())


@dataclass(frozen=True)
class ExampleSet:
    """The examples of one task, in the order given.

    Attributes:
        examples: of one kind: text and chat for a decoder, or decisions; text for an encoder-decoder, retrieval for
            encoders and rerankers.
        num_given: how many there were before sampling.
    """

    examples: tuple[Example, ...]
    num_given: int

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @property
    def are_decisions(self) -> bool:
        """Whether their loss is that of an answer among options, and not of an output."""
        return bool(self.examples) and isinstance(self.examples[0], DecisionExample)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all examples in order."""
        return digest_of([example.to_json() for example in self.examples])

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """`example_digest` of each example, in order."""
        return tuple(map(example_digest, self.examples))

    def subset(self, rows: Iterable[int]) -> ExampleSet:
        """The examples at these indices, as if they were all there are."""
        return ExampleSet.of(self.examples[row] for row in rows)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Self:
        """Examples that are all there are."""
        chosen = tuple(examples)
        return cls(examples=chosen, num_given=len(chosen))

    def to_json(self) -> list[dict[str, Any]]:
        return [example.to_json() for example in self.examples]


def read_rows(text: str) -> list[Any]:
    """The rows of a text that is JSONL, or one JSON array of them.

    Raises:
        InvalidExamplesError: neither; of JSONL, carries the line's number.
    """
    if text.lstrip("\ufeff \t\r\n").startswith("["):
        try:
            rows = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise InvalidExamplesError(f"it begins as a JSON array and is none: {error}") from error
        assert isinstance(rows, list)
        return rows
    return read_jsonl(text)


def read_jsonl(text: str) -> list[Any]:
    """The rows of a JSONL text, blank lines skipped. A row's number is that of its line only if no line is blank.

    Raises:
        InvalidExamplesError: a line is not JSON; carries the line number.
    """
    return [parse_line(line, number) for number, line in jsonl_lines(text)]


def jsonl_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a JSONL text that hold something, each with its number from 1.

    Only a line feed ends a line: JSON strings may hold the other characters that `str.splitlines` cuts at.
    """
    lines = enumerate(text.removeprefix("\ufeff").split("\n"), start=1)
    return ((number, line) for number, line in lines if line.strip())


def parse_line(line: str, number: int) -> Any:
    """The row of one line of JSONL; InvalidExamplesError where it is not JSON, with its number and how it begins."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidExamplesError(
            f"not a JSON object: {error}; the line begins with {line.strip()[:MAX_SHOWN]!r}", row=number
        ) from error


MAX_SHOWN = 40
"""Characters of a line that an error shows."""


def parse_examples(
    rows: Iterable[Any],
    kind: Kind,
    *,
    max_examples: int = 100,
    seed: int = 0,
    separator: str | None = None,
) -> ExampleSet:
    """Checks rows against the pool's kind and makes an `ExampleSet` of them.

    Args:
        rows: JSON objects in a form of `_FORMS`, or of `example_rows`. Keys beyond the form's own are an error,
            save those that data sets carry beside the text and that change no loss.
        max_examples: more rows than this are sampled without replacement, in their order, by `seed`.
        separator: what joins `input` and `output` where a row does not say; None: one space, as the reference does,
            and nothing where the input ends in white space. A `prompt` and its `completion` are joined as they are.

    Raises:
        InvalidExamplesError: no rows, or one that is malformed or of another kind; carries its number, from 1.
    """
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise InvalidExamplesError(f"examples must be a list of objects, got {type(rows).__name__}")
    parsed = [_parse_row(row, kind, number, separator) for number, row in enumerate(rows, start=1)]
    if not parsed:
        raise InvalidExamplesError("there are no examples; give at least one, five are enough")
    _check_one_loss(parsed)
    num_given = len(parsed)
    if num_given > max_examples:
        chosen = sorted(random.Random(seed).sample(range(num_given), max_examples))
        parsed = [parsed[index] for index in chosen]
    _check_has_contrast(parsed)
    return ExampleSet(examples=tuple(parsed), num_given=num_given)


_FORMS: dict[frozenset[str], str] = {
    frozenset({"input", "output"}): "text",
    frozenset({"input", "output", "separator"}): "text",
    frozenset({"prompt", "completion"}): "text",
    frozenset({"messages"}): "chat",
    frozenset({"messages", "tools"}): "chat",
    frozenset({"query", "pos"}): "retrieval",
    frozenset({"query", "pos", "neg"}): "retrieval",
}

_TAKES: dict[Kind, tuple[str, ...]] = {
    "decoder": ("text", "chat"),
    "encoder": ("retrieval",),
    "reranker": ("retrieval",),
    "encoder_decoder": ("text",),
}

_EXPECTED: dict[Kind, str] = {
    "decoder": f'{{"input", "output"}}, {{"prompt", "completion"}}, {{"messages": [...]}} or {DECISION_FORM}',
    "encoder": '{"query", "pos": [...], "neg": [...]}',
    "reranker": '{"query", "pos": [...], "neg": [...]}',
    "encoder_decoder": '{"input", "output"} or {"prompt", "completion"}',
}


def _parse_row(row: Any, kind: Kind, number: int, separator: str | None) -> Example:
    if not isinstance(row, Mapping):
        raise InvalidExamplesError(f"expected an object {_EXPECTED[kind]}, got {type(row).__name__}", row=number)
    if kind == "decoder" and is_decision(row):
        return decision_example(row, number, separator)
    row = plain_row(row, kind, number)
    keys = frozenset(row)
    form = _FORMS.get(keys)
    if form not in _TAKES[kind]:
        raise InvalidExamplesError(
            f"{with_article(kind)} pool takes {_EXPECTED[kind]}; this row has the keys {sorted(map(str, keys))}",
            row=number,
        )
    if form == "chat":
        messages, details = scored_messages(row["messages"], number)
        return ChatExample(messages, details, checked_tools(row.get("tools", ()), number))
    if form == "retrieval":
        return _retrieval(row, kind, number)
    return _text(row, kind, number, separator)


def _text(row: Mapping[str, Any], kind: Kind, number: int, separator: str | None) -> TextExample:
    source, output = ("input", "output") if "input" in row else ("prompt", "completion")
    if source == "prompt":
        separator = ""
    elif "separator" in row:
        separator = separator_of(row, number)
    return TextExample.joined(
        # a decoder can be asked for the loss of a text alone, if its tokenizer begins with a token to predict it from
        text_of(row[source], source, number, may_be_empty=kind == "decoder"),
        text_of(row[output], output, number),
        # an encoder-decoder reads the two apart
        ONE_SPACE if kind == "encoder_decoder" else separator,
    )


def _retrieval(row: Mapping[str, Any], kind: Kind, number: int) -> RetrievalExample:
    neg = [] if row.get("neg") is None else row["neg"]
    example = RetrievalExample(
        query=text_of(row["query"], "query", number),
        pos=_texts(row["pos"], "pos", number, at_least_one=True),
        neg=_texts(neg, "neg", number, at_least_one=False),
    )
    if kind == "reranker" and not set(example.neg) - set(example.pos):
        raise InvalidExamplesError(
            "a reranker needs negatives in 'neg' that are not in 'pos' too: its loss compares the two, and without any "
            "it is 0 for every model",
            row=number,
        )
    return example


def _texts(value: Any, key: str, number: int, *, at_least_one: bool) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidExamplesError(f"{key!r} must be a list of strings, got {type(value).__name__}", row=number)
    if at_least_one and not value:
        raise InvalidExamplesError(f"{key!r} is empty", row=number)
    return tuple(text_of(item, f"{key}[{index}]", number) for index, item in enumerate(value))


def _check_one_loss(examples: Sequence[Example]) -> None:
    """Losses of outputs, by the token, and of answers among options are no one mean."""
    kinds = [isinstance(example, DecisionExample) for example in examples]
    if any(kinds) and not all(kinds):
        raise InvalidExamplesError(
            "some rows are decisions and others have an output, whose losses cannot be compared; give either"
        )


def _check_has_contrast(examples: Sequence[Example]) -> None:
    """Without anything to tell the positive from, the loss is 0 for every model and says nothing."""
    if len(examples) == 1 and isinstance(examples[0], RetrievalExample) and not examples[0].neg:
        raise InvalidExamplesError(
            "one retrieval example without negatives has loss 0 for every model; add 'neg', or a second example"
        )
