"""Questions with given answers: what may be answered, and the texts that say it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

QuestionType = Literal["predicate", "choice", "score"]
"""Whether a statement is true; which of several values it is; which of several levels, which are in order."""

PREDICATE_CUE = "True or false?"
"""Asked behind a statement where its options are not shown."""

TRUTH: tuple[bool, bool] = (True, False)
"""The values of a predicate."""

MAX_OPTIONS = 400
"""Of one question."""


@dataclass(frozen=True, slots=True)
class Option:
    """An answer that a question may have.

    Attributes:
        text: the answer itself.
        description: what it stands for; empty: it speaks for itself. Where one of a question has any, all are shown.
    """

    text: str
    description: str = ""

    @property
    def shown(self) -> str:
        """A line of the question."""
        return f"{self.text}: {self.description}" if self.description else self.text


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about an input.

    Attributes:
        instructions: the question itself; may be empty where the input asks it.
        options: at least two, their texts distinct.
        cue: asked behind the instructions where the options are not shown; empty: nothing.
    """

    instructions: str
    options: tuple[Option, ...]
    cue: str = ""


def make_question(
    kind: QuestionType, instructions: str, values: Sequence[str | bool], descriptions: Sequence[str]
) -> Question:
    """A question of a type, with the texts that a model is to say for its values.

    Booleans are said as JSON has them; where a text says the same as one of them, all values are said as JSON.

    Args:
        values: distinct, by type too; of a score the labels of its levels.
    """
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    if len(set(texts)) < len(texts):
        texts = [json.dumps(value, ensure_ascii=False) for value in values]
    options = tuple(map(Option, texts, descriptions))
    return Question(instructions, options, PREDICATE_CUE if kind == "predicate" else "")


def fault_of_values(values: Sequence[str | bool]) -> tuple[int, str] | None:
    """The first value that no question may have, and what is wrong with it; None: there is none."""
    seen: set[tuple[type, str | bool]] = set()
    for index, value in enumerate(values):
        if isinstance(value, str) and not value.strip():
            return index, "is empty"
        if (type(value), value) in seen:
            return index, f"is {value!r:.60}, which came before"
        seen.add((type(value), value))
    return None
