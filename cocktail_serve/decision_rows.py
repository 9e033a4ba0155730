"""Rows of examples that are decisions: an input, a question about it, and which of its options is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from cocktail_serve.errors import InvalidExamplesError
from cocktail_serve.example_rows import separator_of, text_of
from cocktail_serve.questions import MAX_OPTIONS, TRUTH, Question, QuestionType, fault_of_values, make_question

_OPTIONS: Mapping[str, tuple[str, str]] = {"choice": ("choices", "value"), "score": ("levels", "label")}
"""By type, where a question has its options, and where an option has its value."""

FORM = '{"input", "question" or "choices", "answer"}'


@dataclass(frozen=True, slots=True)
class DecisionExample:
    """`{"input", "question", "answer"}`, or with `choices` in place of a question that the input asks itself: the loss
    is the cross-entropy of the answer among the options.

    Attributes:
        kind: type of the question.
        values: of the options, in order; `descriptions` likewise.
        answer: index of the one that is right.
        separator: between the text that asks and the option; None: as `examples.parse_examples` has it.
    """

    input: str
    kind: QuestionType
    instructions: str
    values: tuple[str | bool, ...]
    descriptions: tuple[str, ...]
    answer: int
    separator: str | None = None

    @property
    def question(self) -> Question:
        """As a model is asked it."""
        return make_question(self.kind, self.instructions, self.values, self.descriptions)

    def to_json(self) -> dict[str, Any]:
        """The row that says the same in every release and pool."""
        question: dict[str, Any] = {"type": self.kind, "instructions": self.instructions}
        if self.kind in _OPTIONS:
            options, value = _OPTIONS[self.kind]
            question[options] = [
                {value: each, **({"description": description} if description else {})}
                for each, description in zip(self.values, self.descriptions, strict=True)
            ]
        separator = {} if self.separator is None else {"separator": self.separator}
        return {"input": self.input, "question": question, "answer": self.values[self.answer], **separator}


def is_decision(row: Mapping[str, Any]) -> bool:
    """Whether a row is one, right or wrong: others may have choices beside their output, which decide nothing."""
    return "answer" in row and "input" in row and bool({"question", "choices"} & row.keys())


def decision_example(row: Mapping[str, Any], number: int, separator: str | None) -> DecisionExample:
    """The example of a row.

    Args:
        number: of the row, from 1.
        separator: the pool's; None: it has none.

    Raises:
        InvalidExamplesError: what is asked, or which answer is right, cannot be told.
    """
    if odd := row.keys() - {"input", "question", "choices", "answer", "separator", "id"}:
        raise InvalidExamplesError(f"a decision is {FORM}; this row has {sorted(odd)} too", row=number)
    kind, instructions, values, descriptions = _question(row, number)
    fault = fault_of_values(values)
    if fault is not None:
        raise InvalidExamplesError(f"option {fault[0]} {fault[1]}", row=number)
    if not 2 <= len(values) <= MAX_OPTIONS:
        raise InvalidExamplesError(f"a question has 2 to {MAX_OPTIONS} options, this one {len(values)}", row=number)
    text = text_of(row["input"], "input", number, may_be_empty=bool(instructions))
    own = separator if row.get("separator") is None else separator_of(row, number)
    answer = _answer(row["answer"], kind, values, number)
    return DecisionExample(text, kind, instructions, values, descriptions, answer, own)


def _question(row: Mapping[str, Any], number: int) -> tuple[QuestionType, str, tuple[str | bool, ...], tuple[str, ...]]:
    asked = row.get("question", "")
    if isinstance(asked, str):
        if "choices" not in row:
            raise InvalidExamplesError(
                "'question' is a text, so 'choices' must say what may be answered; or give it as /v1/decisions does",
                row=number,
            )
        instructions = text_of(asked, "question", number, may_be_empty=True)
        return ("choice", instructions, *_options(row["choices"], "choice", "choices", number))
    kind = asked.get("type") if isinstance(asked, Mapping) else None
    if kind not in ("predicate", "choice", "score") or "choices" in row:
        raise InvalidExamplesError(
            "'question' must be a text beside 'choices', or an object of type predicate, choice or score as "
            f"/v1/decisions takes it, got {asked!r:.60}",
            row=number,
        )
    instructions = text_of(asked.get("instructions"), "question.instructions", number, may_be_empty=True)
    key = _OPTIONS[kind][0] if kind in _OPTIONS else None
    if odd := asked.keys() - {"type", "instructions", "name", key}:
        raise InvalidExamplesError(f"question: a {kind} has no {sorted(map(str, odd))}", row=number)
    if key is None:
        return "predicate", instructions, TRUTH, ("", "")
    return (cast(QuestionType, kind), instructions, *_options(asked.get(key), kind, f"question.{key}", number))


def _options(value: Any, kind: str, where: str, number: int) -> tuple[tuple[str | bool, ...], tuple[str, ...]]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidExamplesError(f"{where} must be a list, got {type(value).__name__}", row=number)
    key = _OPTIONS[kind][1]
    values: list[str | bool] = []
    descriptions: list[str] = []
    for index, item in enumerate(value):
        said = item.get(key) if isinstance(item, Mapping) else item
        description = (item.get("description") if isinstance(item, Mapping) else None) or ""
        if not (isinstance(said, str) or (kind == "choice" and isinstance(said, bool))) or not isinstance(
            description, str
        ):
            raise InvalidExamplesError(f"{where}[{index}] says no {key}, got {item!r:.60}", row=number)
        values.append(said if isinstance(said, bool) else text_of(said, f"{where}[{index}]", number))
        descriptions.append(text_of(description, f"{where}[{index}].description", number, may_be_empty=True))
    return tuple(values), tuple(descriptions)


def _answer(answer: Any, kind: str, values: Sequence[str | bool], number: int) -> int:
    """Its index among the values; of a score it may be given itself."""
    if kind == "score" and isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(values):
        return answer
    for index, value in enumerate(values):
        if type(value) is type(answer) and value == answer:
            return index
    raise InvalidExamplesError(f"the answer {answer!r:.60} is none of the options", row=number)
