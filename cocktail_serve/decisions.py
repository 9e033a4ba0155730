"""Questions with given answers, as models are asked them: each option is an example, whose output it would be."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cocktail_serve.chat_rows import Message
from cocktail_serve.examples import ChatExample, ExampleSet, TextExample
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.questions import Question

Reading = Literal["labels", "verbatim"]
"""How a model's answer is read: the first token of its reply, where the options stand under letters; or the likelihood
of each option's own text as the whole reply."""

Form = Literal["chat", "text"]
"""How a model is asked: in turns that its chat template renders, or by a text that it goes on from."""

DEFAULT_READING: Reading = "verbatim"
"""What a model's examples are weighed by, and what was right more often where it was measured: docs/benchmarks.md."""

LABELS = string.ascii_uppercase
"""The letters that options stand under, in their order."""

_ASK_FOR_LABEL = "Answer with the letter of one option alone."
_LEAD_TO_LABEL = "\nAnswer:"
"""Of a text, behind which the letter comes next."""


@dataclass(frozen=True, slots=True)
class PosedQuestion:
    """A question about an input, as a model is asked it.

    Attributes:
        turns: the input; roles `system`, `developer`, `user` and `assistant`.
        separator: as of `examples.parse_examples`, of a text.
    """

    turns: tuple[Message, ...]
    question: Question
    reading: Reading
    form: Form
    separator: str | None = None

    @property
    def examples(self) -> tuple[TextExample | ChatExample, ...]:
        """One of each option, in their order: the same input, and as its output the option's text, or its letter.

        Written anew each time: each question has the whole input in its examples, and a request has many questions.
        """
        labelled = self.reading == "labels"
        options = self.question.options
        asked = _labelled(self.question) if labelled else _plain(self.question)
        outputs = LABELS[: len(options)] if labelled else [option.text for option in options]
        if self.form == "chat":
            asking = _asking(self.turns, asked)
            return tuple(ChatExample((*asking, ("assistant", output))) for output in outputs)
        text = "\n\n".join(filter(None, [_as_text(self.turns), asked])) + (_LEAD_TO_LABEL if labelled else "")
        return tuple(TextExample.joined(text, output, self.separator) for output in outputs)


def form_of(examples: ExampleSet | None) -> Form | None:
    """How the models were asked that were weighed by these examples; None: not at all, or as any model is."""
    if examples is None or examples.are_decisions:
        return None
    return "chat" if any(isinstance(example, ChatExample) for example in examples) else "text"


def default_form(chat_template: ChatTemplate | None) -> Form:
    """How a model is asked of which nobody says it: by its chat template, where it has one."""
    return "text" if chat_template is None else "chat"


def pose(
    turns: Sequence[Message], question: Question, *, reading: Reading, form: Form, separator: str | None = None
) -> PosedQuestion:
    """Asks a question about an input. The input comes first, so that all questions about it begin alike.

    A text whose question is empty is the input alone: what an example's input and output make of the same text.

    Args:
        turns, separator: as of `PosedQuestion`.

    Raises:
        ValueError: there are more options than letters to read them by.
    """
    if reading == "labels" and len(question.options) > len(LABELS):
        raise ValueError(f"{len(question.options)} options, and {len(LABELS)} letters to read them by")
    return PosedQuestion(tuple(turns), question, reading, form, separator)


def _labelled(question: Question) -> str:
    lines = [f"{label}. {option.shown}" for label, option in zip(LABELS, question.options, strict=False)]
    return "\n".join(filter(None, [question.instructions, *lines, _ASK_FOR_LABEL]))


def _plain(question: Question) -> str:
    is_described = any(option.description for option in question.options)
    lines = [f"- {option.shown}" for option in question.options] if is_described else []
    return "\n".join(filter(None, [question.instructions, *lines, question.cue]))


def _asking(turns: Sequence[Message], asked: str) -> tuple[Message, ...]:
    """The turns of a chat with the question in the user's last, or in one of its own."""
    if not asked:
        return tuple(turns)
    *before, (role, content) = turns
    if role == "user":
        return (*before, (role, "\n\n".join(filter(None, [content, asked]))))
    return (*turns, ("user", asked))


def _as_text(turns: Sequence[Message]) -> str:
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in turns)
