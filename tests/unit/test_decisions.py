"""Questions as models are asked them, without a model."""

from __future__ import annotations

import tracemalloc

import pytest

from cocktail_serve.decisions import Form, default_form, form_of, pose
from cocktail_serve.examples import ChatExample, TextExample, parse_examples
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.questions import Option, Question

TEXT = (("user", "the film was a joy"),)
SENTIMENT = Question("Is it good or bad?", (Option("good"), Option("bad")))


def test_verbatim_an_option_is_the_output_of_an_example() -> None:
    posed = pose(TEXT, SENTIMENT, reading="verbatim", form="text")
    prompt = "the film was a joy\n\nIs it good or bad?"
    assert posed.reading == "verbatim"
    assert posed.examples == (TextExample(prompt, "good"), TextExample(prompt, "bad"))


@pytest.mark.parametrize(("text", "separator"), [("the film was a joy\nSentiment:", None), ("Sentiment:", "\n")])
def test_an_empty_question_asks_what_an_example_asks(text: str, separator: str | None) -> None:
    """The same text as of a row: what a cocktail was weighed by is what it is asked."""
    (row,) = parse_examples([{"input": text, "output": "good"}], "decoder", separator=separator)
    question = Question("", SENTIMENT.options)
    posed = pose((("user", text),), question, reading="verbatim", form="text", separator=separator)
    assert posed.examples[0] == row


def test_labels_show_the_options_under_letters() -> None:
    question = Question("Which?", (Option("good", "they liked it"), Option("bad")))
    posed = pose(TEXT, question, reading="labels", form="text")
    shown = "Which?\nA. good: they liked it\nB. bad\nAnswer with the letter of one option alone."
    assert [example.output for example in posed.examples if isinstance(example, TextExample)] == ["A", "B"]
    assert posed.examples[0] == TextExample(f"the film was a joy\n\n{shown}\nAnswer:", "A")
    (first, _) = pose(TEXT, question, reading="labels", form="chat").examples
    assert first == ChatExample((("user", f"the film was a joy\n\n{shown}"), ("assistant", "A")))


def test_descriptions_are_shown_whatever_the_reading() -> None:
    question = Question("Which?", (Option("good", "they liked it"), Option("bad")))
    posed = pose(TEXT, question, reading="verbatim", form="text")
    assert posed.examples[1] == TextExample("the film was a joy\n\nWhich?\n- good: they liked it\n- bad", "bad")


def test_a_chat_is_asked_in_the_users_last_turn_or_in_one_of_its_own() -> None:
    turns = (("system", "be brief"), ("user", "hello"), ("assistant", "hi"))
    (first, _) = pose(turns, SENTIMENT, reading="verbatim", form="chat").examples
    assert first == ChatExample((*turns, ("user", SENTIMENT.instructions), ("assistant", "good")))
    (first, _) = pose(turns[:2], SENTIMENT, reading="verbatim", form="chat").examples
    asking = ("user", f"hello\n\n{SENTIMENT.instructions}")
    assert first == ChatExample((turns[0], asking, ("assistant", "good")))
    (first, _) = pose(turns[:2], Question("", SENTIMENT.options), reading="verbatim", form="chat").examples
    assert first == ChatExample((*turns[:2], ("assistant", "good")))


def test_several_turns_are_one_text_that_says_whose_they_are() -> None:
    turns = (("system", "be brief"), ("user", "hello"))
    (first, _) = pose(turns, SENTIMENT, reading="verbatim", form="text").examples
    assert first == TextExample(f"system: be brief\n\nuser: hello\n\n{SENTIMENT.instructions}", "good")


@pytest.mark.parametrize("form", ["text", "chat"])
def test_questions_that_wait_hold_the_input_once(form: Form) -> None:
    """A request may have 400 of them about a text of megabytes."""
    turns = (("user", "word " * 50_000),)
    tracemalloc.start()
    try:
        posed = [pose(turns, SENTIMENT, reading="verbatim", form=form) for _ in range(100)]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < len(turns[0][1]) < sum(len(str(each.to_json())) for one in posed for each in one.examples)


def test_there_are_no_more_labels_than_letters() -> None:
    many = Question("?", tuple(Option(str(number)) for number in range(27)))
    assert len(pose(TEXT, many, reading="verbatim", form="text").examples) == 27
    with pytest.raises(ValueError, match="27 options, and 26 letters"):
        pose(TEXT, many, reading="labels", form="text")


def test_a_cocktail_is_asked_as_its_examples_ask() -> None:
    text = parse_examples([{"input": "a", "output": "b"}], "decoder")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = parse_examples([{"input": "a", "output": "b"}, {"messages": messages}], "decoder")
    assert (form_of(text), form_of(chat), form_of(None)) == ("text", "chat", None)
    assert default_form(None) == "text"
    assert default_form(ChatTemplate("x")) == "chat"
