"""Rows that are decisions."""

from __future__ import annotations

from typing import Any

import pytest

from cocktail_serve.decision_rows import DecisionExample
from cocktail_serve.errors import InvalidExamplesError
from cocktail_serve.examples import TextExample, parse_examples
from cocktail_serve.questions import Option, Question

TEXT = "the film was a joy"
CHOICES = {"input": TEXT, "choices": ["good", "bad"], "answer": "bad"}
SCORE = {"type": "score", "instructions": "how?", "levels": [{"label": "low"}, {"label": "high"}]}


def one(**row: Any) -> DecisionExample:
    (example,) = parse_examples([row], "decoder")
    assert isinstance(example, DecisionExample)
    return example


def test_choices_of_an_input_that_asks_itself() -> None:
    example = one(**CHOICES)
    assert example == DecisionExample(TEXT, "choice", "", ("good", "bad"), ("", ""), 1)
    assert example.question == Question("", (Option("good"), Option("bad")))


@pytest.mark.parametrize(
    ("row", "kind", "values", "answer"),
    [
        ({"question": "good?", "choices": [True, "true"], "answer": "true"}, "choice", (True, "true"), 1),
        ({"question": {"type": "predicate", "instructions": "good"}, "answer": False}, "predicate", (True, False), 1),
        ({"question": SCORE, "answer": "high"}, "score", ("low", "high"), 1),
        ({"question": SCORE, "answer": 0}, "score", ("low", "high"), 0),
        (
            {
                "question": {"type": "choice", "instructions": "", "choices": [{"value": "a"}, {"value": "b"}]},
                "answer": "a",
            },
            "choice",
            ("a", "b"),
            0,
        ),
    ],
)
def test_questions(row: dict[str, Any], kind: str, values: tuple[Any, ...], answer: int) -> None:
    example = one(input=TEXT, **row)
    assert (example.kind, example.values, example.answer) == (kind, values, answer)
    assert one(**example.to_json()) == example, "what is kept says the same again"


def test_descriptions_and_separators_are_part_of_what_is_asked() -> None:
    plain, described = one(**CHOICES), one(**{**CHOICES, "choices": [{"value": "good", "description": "d"}, "bad"]})
    assert described.question.options[0] == Option("good", "d")
    assert one(**described.to_json()) == described
    separated = one(**CHOICES, separator="\n")
    assert separated.separator == "\n"
    digests = {parse_examples([each.to_json()], "decoder").digest for each in (plain, described, separated)}
    assert len(digests) == 3
    (of_pool,) = parse_examples([CHOICES], "decoder", separator="\n")
    assert of_pool == separated


def test_choices_beside_an_output_decide_nothing() -> None:
    (example,) = parse_examples([{"input": TEXT, "output": "good", "choices": ["good", "bad"]}], "decoder")
    assert example == TextExample(TEXT, "good")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**CHOICES, "answer": "worse"}, "'worse' is none of the options"),
        ({**CHOICES, "choices": [True, False], "answer": 1}, "1 is none of the options"),
        ({**CHOICES, "choices": ["good"], "answer": "good"}, "2 to 400 options, this one 1"),
        ({**CHOICES, "choices": ["good", "good"], "answer": "good"}, "option 1 is 'good', which came before"),
        ({**CHOICES, "choices": ["good", " "], "answer": "good"}, "is empty"),
        ({**CHOICES, "choices": ["good", 1], "answer": "good"}, r"choices\[1\] says no value"),
        ({**CHOICES, "choices": "good"}, "choices must be a list"),
        ({**CHOICES, "output": "good"}, r"this row has \['output'\] too"),
        ({**CHOICES, "input": ""}, "'input' is empty"),
        ({**CHOICES, "separator": 1}, "'separator' must be a string"),
        ({**CHOICES, "separator": "-" * 17}, "'separator' must be a string of at most 16 characters"),
        ({**CHOICES, "separator": "\ud800"}, "'separator' holds a lone surrogate"),
        ({**CHOICES, "question": "\ud800"}, "'question' holds a lone surrogate"),
        ({"input": TEXT, "question": "good?", "answer": "a"}, "'choices' must say"),
        ({"input": TEXT, "question": {"type": "rank"}, "answer": "a"}, "type predicate, choice or score"),
        ({**CHOICES, "question": SCORE}, "'question' must be a text beside 'choices'"),
        ({"input": TEXT, "question": {**SCORE, "choices": []}, "answer": "a"}, "a score has no"),
        ({"input": TEXT, "question": SCORE, "answer": 2}, "2 is none of the options"),
        ({"input": TEXT, "question": SCORE, "answer": True}, "True is none of the options"),
        ({"input": TEXT, "question": {"type": "predicate"}, "answer": True}, "instructions"),
    ],
)
def test_what_is_no_decision_names_its_row(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidExamplesError, match=f"row 2: .*{message}"):
        parse_examples([CHOICES, row], "decoder")


def test_losses_of_two_kinds_are_no_mean() -> None:
    with pytest.raises(InvalidExamplesError, match="give either"):
        parse_examples([CHOICES, {"input": "a", "output": "b"}], "decoder")


def test_whether_rows_have_one_loss_hangs_on_no_sample() -> None:
    rows = [CHOICES, *({"input": f"{number}", "output": "b"} for number in range(20))]
    for seed in range(5):
        with pytest.raises(InvalidExamplesError, match="give either"):
            parse_examples(rows, "decoder", max_examples=2, seed=seed)


@pytest.mark.parametrize("kind", ["encoder", "reranker", "encoder_decoder"])
def test_other_pools_take_none(kind: Any) -> None:
    with pytest.raises(InvalidExamplesError, match="takes"):
        parse_examples([CHOICES], kind)
